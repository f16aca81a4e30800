"""Group layers into segments of a repeating pattern, so that programs do not grow with depth.

Flash is 2 x [sliding + hash], [CSA + hash], [HCA + hash], 20 x [CSA, HCA] and so on: each segment
is one `lax.scan` over its repeats, whatever their number.
"""

import dataclasses

from v4jax.model.config import LayerKind, ModelConfig

_LONGEST_PATTERN = 4


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` copies of `pattern`; `first` is the index of its first layer."""

    first: int
    pattern: tuple[LayerKind, ...]
    repeats: int

    @property
    def length(self) -> int:
        return len(self.pattern) * self.repeats

    def layer_index(self, position: int, repeat: int) -> int:
        """Index of the layer at `position` in copy `repeat` of the pattern."""
        return self.first + repeat * len(self.pattern) + position


def mtp_segment(cfg: ModelConfig) -> Segment:
    """The one layer of an MTP block."""
    return Segment(0, (cfg.mtp_kind,), 1)


def segments(layers: tuple[LayerKind, ...]) -> tuple[Segment, ...]:
    """Cut a schedule into segments with the fewest layer bodies.

    Deterministic and total: the segments' layers, in order, are `layers`. This is a shortest path
    over cut points; its cost is the number of bodies to compile, then the number of segments.
    """
    count = len(layers)
    best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())]
    for end in range(1, count + 1):
        choices = []
        for width in range(1, min(_LONGEST_PATTERN, end) + 1):
            pattern = layers[end - width : end]
            repeats = 1
            while True:
                start = end - width * repeats
                bodies, cuts, path = best[start]
                segment = Segment(start, pattern, repeats)
                choices.append((bodies + width, cuts + 1, (*path, segment)))
                start -= width
                if start < 0 or layers[start : start + width] != pattern:
                    break
                repeats += 1
        best.append(min(choices, key=lambda choice: choice[:2]))
    return best[count][2]
