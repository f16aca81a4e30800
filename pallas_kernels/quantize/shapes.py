"""Sizes of the models' quantised matrices. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A weight of N output and K input channels."""

    n: int
    k: int

    def divided(self, by: int) -> "Shape":
        """The same proportions, small enough to test, with K a multiple of 32."""
        return Shape(max(1, self.n // by), max(1, self.k // by // 32) * 32)


SHAPES = {
    "bench expert up": Shape(n=256, k=512),
    "flash query": Shape(n=32768, k=1024),
    "flash output": Shape(n=4096, k=8192),
    "flash expert up": Shape(n=2048, k=4096),
    "pro query": Shape(n=65536, k=1536),
    "pro output": Shape(n=7168, k=16384),
    "pro expert up": Shape(n=3072, k=7168),
}
