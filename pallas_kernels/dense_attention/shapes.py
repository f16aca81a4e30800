"""Attention sizes of the models. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads H, head dim K and window length in tokens."""

    heads: int
    head_dim: int
    window: int

    def divided(self, by: int) -> "Shape":
        """The same proportions, small enough to test."""
        return Shape(
            max(1, self.heads // by), max(1, self.head_dim // by), max(1, self.window // by)
        )


SHAPES = {
    "bench": Shape(heads=8, head_dim=128, window=128),
    "flash": Shape(heads=64, head_dim=512, window=128),
    "pro": Shape(heads=128, head_dim=512, window=128),
}
