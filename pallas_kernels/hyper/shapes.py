"""Sizes of the models' residual streams. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Streams N and hidden size D."""

    streams: int
    hidden: int

    @property
    def mixes(self) -> int:
        """Q."""
        return self.streams * (2 + self.streams)


SHAPES = {
    "bench": Shape(streams=4, hidden=512),
    "flash": Shape(streams=4, hidden=4096),
    "pro": Shape(streams=4, hidden=7168),
}
