"""Sizes of the models' heads and their rotated channels. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads H, head dim K and rotated channels 2Q."""

    heads: int
    dim: int
    rotated: int


SHAPES = {
    "bench": Shape(heads=8, dim=128, rotated=32),
    "flash": Shape(heads=64, dim=512, rotated=64),
    "flash index": Shape(heads=64, dim=128, rotated=64),
    "pro": Shape(heads=128, dim=512, rotated=64),
    "pro index": Shape(heads=64, dim=128, rotated=64),
}
