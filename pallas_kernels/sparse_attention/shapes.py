"""CSA attention sizes of the models. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads H, head dim K, window length in tokens, and entries chosen k."""

    heads: int
    head_dim: int
    window: int
    k: int

    def divided(self, by: int) -> "Shape":
        """The same proportions, small enough to test."""
        sizes = (self.heads, self.head_dim, self.window, self.k)
        return Shape(*(max(1, size // by) for size in sizes))


SHAPES = {
    "bench": Shape(heads=8, head_dim=128, window=128, k=128),
    "flash": Shape(heads=64, head_dim=512, window=128, k=512),
    "pro": Shape(heads=128, head_dim=512, window=128, k=1024),
}
