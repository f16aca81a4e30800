"""A layer's weights within their stack, and where their gradients go.

Axis letters: L layers, E experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul import lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """Matrices read in place from their stack, with a gradient for one layer only.

    A scan over layers then copies neither: its slice only carries the gradient and is never read.

    Attributes:
      stack: [L, E, ...]; its values are constants.
      own: [1, E, ...], the same matrices of the current layer, which get the gradient.
    """

    stack: Any
    own: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return self.stack.shape


Weight = lora.Weight | LayerWeight


def read(w: Weight) -> lora.Weight:
    """The stack that kernels read."""
    return w.stack if isinstance(w, LayerWeight) else w


def learner(w: Weight) -> lora.Weight:
    """The part that gets the gradient."""
    return w.own if isinstance(w, LayerWeight) else w


def cotangent(w: Weight, layer: Int[Array, ""], grads: list[Array]) -> Any:
    """A weight's cotangent, given the gradients [E, ...] of the layer's `learned`; None if none."""
    if not grads:
        return None
    if isinstance(w, LayerWeight):
        return LayerWeight(None, lora.gradient(w.own, [grad_E[None] for grad_E in grads]))
    put = lambda part, grad_E: jnp.zeros_like(part).at[layer].set(grad_E)
    return lora.gradient(w, [put(*pair) for pair in zip(lora.learned(w), grads, strict=True)])
