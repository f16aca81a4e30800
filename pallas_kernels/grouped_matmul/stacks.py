"""Weights of a layer within its stack, and where their gradients go.

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
    """Matrices that are read where they lie in their stack, while a gradient is the layer's alone.

    So a scan over layers copies neither: what it slices stands for the gradient, and is not read.

    Attributes:
      stack: [L, E, ...], whose values are constants.
      own: [1, E, ...], the same matrices of the layer at hand, which get the gradient.
    """

    stack: Any
    own: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The stack's."""
        return self.stack.shape


Weight = lora.Weight | LayerWeight


def read(w: Weight) -> lora.Weight:
    """The stack that kernels read."""
    return w.stack if isinstance(w, LayerWeight) else w


def learner(w: Weight) -> lora.Weight:
    """What gets the gradient."""
    return w.own if isinstance(w, LayerWeight) else w


def cotangent(w: Weight, layer: Int[Array, ""], grads: list[Array]) -> Any:
    """Of a weight, given the gradients [E, ...] of what the layer learns; None for nothing."""
    if not grads:
        return None
    if isinstance(w, LayerWeight):
        return LayerWeight(None, lora.gradient(w.own, [grad_E[None] for grad_E in grads]))
    put = lambda part, grad_E: jnp.zeros_like(part).at[layer].set(grad_E)
    return lora.gradient(w, [put(*pair) for pair in zip(lora.learned(w), grads, strict=True)])
