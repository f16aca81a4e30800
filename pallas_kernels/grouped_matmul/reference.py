"""The routed experts in plain maths: every expert sees every token.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dtypes import accumulator
from pallas_kernels.grouped_matmul import lora
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.quantize.leaves import of_layer


def expert_mlp(inputs: Inputs, *, limit: float, weight_first: bool) -> Float[Array, "T D"]:
    """Sum over experts of (the token's weight for it) * (its output)."""
    x_TD, wide = inputs.x_TD, accumulator(inputs.x_TD.dtype)
    weights = of_layer(inputs.weights, inputs.layer)
    experts = jax.tree.leaves(weights)[0].shape[0]

    def add_expert(total_TD: Array, expert: Any) -> tuple[Array, None]:
        e, w1_FD, w3_FD, w2_DF = expert
        its_weight_TA = jnp.where(inputs.expert_TA == e, inputs.weight_TA, 0)
        weight_T1 = jnp.sum(its_weight_TA, axis=1, keepdims=True)
        weight_T1 = weight_T1.astype(wide)
        linear = lambda x, w: lora.linear(x, w, impl="reference").astype(wide)
        hidden_TF = activate(linear(x_TD, w1_FD), linear(x_TD, w3_FD), limit)
        if weight_first:
            hidden_TF = hidden_TF * weight_T1
        out_TD = linear(hidden_TF.astype(x_TD.dtype), w2_DF)
        return total_TD + (out_TD if weight_first else out_TD * weight_T1), None

    zero_TD = jnp.zeros(x_TD.shape, wide)
    return jax.lax.scan(add_expert, zero_TD, (jnp.arange(experts), *weights))[0]


def activate(
    gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], limit: float
) -> Float[Array, "*rows F"]:
    """Clamped SwiGLU."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
