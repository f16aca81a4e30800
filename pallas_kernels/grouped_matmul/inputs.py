"""The operation's arrays, which forms read by name; the package documents them.

Axis letters: as in the package.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int


class Inputs(NamedTuple):
    """Arrays of `expert_mlp`; weights are arrays, quantised, or either with a low-rank update."""

    x_TD: Float[Array, "T D"]
    expert_TA: Int[Array, "T A"]
    weight_TA: Float[Array, "T A"]
    w1_LEFD: Any
    w3_LEFD: Any
    w2_LEDF: Any
    layer: Int[Array, ""]

    @property
    def weights(self) -> tuple[Any, Any, Any]:
        """Gate, up and down."""
        return self.w1_LEFD, self.w3_LEFD, self.w2_LEDF

    def with_weights(self, gate: Any, up: Any, down: Any) -> "Inputs":
        """The same inputs with other weights."""
        return self._replace(w1_LEFD=gate, w3_LEFD=up, w2_LEDF=down)
