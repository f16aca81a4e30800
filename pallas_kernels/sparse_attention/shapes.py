"""CSA attention sizes of the models. Axis letters: as in the package."""

import dataclasses

from pallas_kernels.dense_attention import shapes


@dataclasses.dataclass(frozen=True)
class Shape(shapes.Shape):
    """Heads H, head dim K, window length in tokens, and entries chosen k."""

    k: int


SHAPES = {
    "bench": Shape(heads=8, head_dim=128, window=128, k=128),
    "flash": Shape(heads=64, head_dim=512, window=128, k=512),
    "pro": Shape(heads=128, head_dim=512, window=128, k=1024),
}
