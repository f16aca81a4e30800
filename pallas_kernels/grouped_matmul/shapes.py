"""Sizes of the models' routed experts. Axis letters: as in the package."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts E, experts per token A, hidden D and expert hidden F."""

    experts: int
    choices: int
    hidden: int
    expert_hidden: int

    def divided(self, by: int) -> "Shape":
        """The same proportions, small enough to test: same A, D and F in multiples of 32."""
        scaled = lambda size: max(1, size // by // 32) * 32
        experts = max(self.choices, self.experts // by)
        return Shape(experts, self.choices, scaled(self.hidden), scaled(self.expert_hidden))


SHAPES = {
    "bench": Shape(experts=32, choices=4, hidden=512, expert_hidden=256),
    "flash": Shape(experts=256, choices=6, hidden=4096, expert_hidden=2048),
    "pro": Shape(experts=384, choices=6, hidden=7168, expert_hidden=3072),
}
