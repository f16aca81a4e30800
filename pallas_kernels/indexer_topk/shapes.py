"""Indexer sizes of the models. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Index heads I, index head dim J and entries chosen k."""

    heads: int
    head_dim: int
    k: int

    def divided(self, by: int) -> "Shape":
        """The same proportions, small enough to test."""
        return Shape(max(1, self.heads // by), max(1, self.head_dim // by), max(1, self.k // by))


SHAPES = {
    "bench": Shape(heads=8, head_dim=64, k=128),
    "flash": Shape(heads=64, head_dim=128, k=512),
    "pro": Shape(heads=64, head_dim=128, k=1024),
}
