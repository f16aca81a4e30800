"""Sizes of the models' compressors. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Ratio M, entry channels K, windows per entry, rotated channels 2Q, rounding of entries."""

    ratio: int
    dim: int
    overlap: int
    rotated: int
    rounding: str

    @property
    def channels(self) -> int:
        """C, of kv or gate."""
        return self.overlap * self.dim

    @property
    def ring(self) -> int:
        """Rows of a cache's ring: the windows of an entry and eight spare ones."""
        return self.overlap * self.ratio + 8


def _model(dim: int, rotated: int, index_dim: int) -> dict[str, Shape]:
    return {
        "hca": Shape(ratio=128, dim=dim, overlap=1, rotated=rotated, rounding="fp8"),
        "csa": Shape(ratio=4, dim=dim, overlap=2, rotated=rotated, rounding="fp8"),
        "index": Shape(ratio=4, dim=index_dim, overlap=2, rotated=rotated, rounding="fp4"),
    }


SHAPES = {
    f"{model} {kind}": shape
    for model, shapes in {
        "bench": _model(128, 32, 64),
        "flash": _model(512, 64, 128),
        "pro": _model(512, 64, 128),
    }.items()
    for kind, shape in shapes.items()
}
