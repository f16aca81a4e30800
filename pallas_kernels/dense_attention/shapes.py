"""Attention sizes of the models. Axis letters: as in the package."""

import dataclasses
from typing import Self


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads H, head dim K and window length in tokens."""

    heads: int
    head_dim: int
    window: int

    def divided(self, by: int) -> Self:
        """The same proportions, small enough to test."""
        return type(self)(*(max(1, size // by) for size in dataclasses.astuple(self)))


SHAPES = {
    "bench": Shape(heads=8, head_dim=128, window=128),
    "flash": Shape(heads=64, head_dim=512, window=128),
    "pro": Shape(heads=128, head_dim=512, window=128),
}
