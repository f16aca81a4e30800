"""Gradients of the routed experts by plain XLA: tile by tile of sorted rows, computed anew.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden,
P sorted rows (whole tiles), R rows of a tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dtypes import accumulator
from pallas_kernels.grouped_matmul import lora, plan, reference, sorting


def expert_mlp_backward(
    grad_TD: Float[Array, "T D"],
    x_TD: Float[Array, "T D"],
    expert_TA: Int[Array, "T A"],
    weight_TA: Float[Array, "T A"],
    w1_LEFD: lora.Weight,
    w3_LEFD: lora.Weight,
    w2_LEDF: lora.Weight,
    layer: Int[Array, ""],
    *,
    limit: float,
    weight_first: bool,
    learn: tuple[bool, bool, bool],
) -> tuple[Array, Array, Any, Any, Any]:
    """The gradients of x_TD, weight_TA and of the weights that `learn` tells, otherwise None."""
    wide, dtype = accumulator(x_TD.dtype), x_TD.dtype
    weights = (w1_LEFD, w3_LEFD, w2_LEDF)
    steps = plan.make(expert_TA, w1_LEFD.shape[1])
    R, P, A = steps.rows, steps.tiles * steps.rows, expert_TA.shape[1]
    token_P = jnp.pad(steps.order_P // A, (0, P - len(steps.order_P)))
    weight_P = plan.tiled(steps, weight_TA.astype(wide)).reshape(-1)
    parts = [lora.learned(w) if wanted else [] for w, wanted in zip(weights, learn, strict=True)]

    def run_expert(x_RD: Array, weight_R: Array, values: Any, ours: Any) -> Array:
        ours = [lora.replaced(w, v) if v else w for w, v in zip(ours, values, strict=True)]
        w1_FD, w3_FD, w2_DF = ours
        linear = lambda x, w: lora.linear(x, w, impl="xla").astype(wide)
        hidden_RF = reference.activate(linear(x_RD, w1_FD), linear(x_RD, w3_FD), limit)
        hidden_RF = hidden_RF * weight_R[:, None] if weight_first else hidden_RF
        out_RD = linear(hidden_RF.astype(dtype), w2_DF)
        return out_RD if weight_first else out_RD * weight_R[:, None]

    def step(s: Array, carry: Any) -> Any:
        dx_PD, dweight_P, sums = carry
        expert, start = steps.expert_S[s], steps.tile_S[s] * R
        row_R = jnp.arange(R)
        real_R = (row_R >= steps.low_S[s]) & (row_R < steps.high_S[s])
        token_R = jax.lax.dynamic_slice(token_P, (start,), (R,))
        weight_R = jnp.where(real_R, jax.lax.dynamic_slice(weight_P, (start,), (R,)), 0)
        only = lambda x_RD: jnp.where(real_R[:, None], x_RD, jnp.zeros_like(x_RD))
        ours = [sorting.take(w, layer, expert) for w in weights]
        values = [sorting.take(p, layer, expert) for p in parts]
        _, pull = jax.vjp(
            lambda x, r, v: run_expert(x, r, v, ours), only(x_TD[token_R]), weight_R, values
        )
        dx_RD, dweight_R, dvalues = pull(only(grad_TD[token_R]).astype(wide))
        dx_PD = _write(dx_PD, dx_RD, start, real_R[:, None])
        dweight_P = _write(dweight_P, dweight_R, start, real_R)
        add = lambda sum_E, d: sum_E.at[expert].add(d.astype(sum_E.dtype))
        return dx_PD, dweight_P, jax.tree.map(add, sums, dvalues)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape[1:], accumulator(p.dtype)), parts)
    start = (jnp.zeros((P, x_TD.shape[1]), dtype), jnp.zeros(P, wide), zeros)
    dx_PD, dweight_P, sums = jax.lax.fori_loop(0, steps.steps, step, start)
    dx_TD = sorting.sum_choices(dx_PD, steps.order_P, steps.real, A).astype(dtype)
    dweight_TA = plan.unsorted(steps, dweight_P, A).astype(weight_TA.dtype)
    put = lambda p, sum_E: jnp.zeros_like(p).at[layer].set(sum_E.astype(p.dtype))
    grads = jax.tree.map(put, parts, sums)
    gate, up, down = (lora.gradient(w, g) for w, g in zip(weights, grads, strict=True))
    return dx_TD, dweight_TA, gate, up, down


def _write(x_P: Array, new_R: Array, start: Array, where: Array) -> Array:
    """Those rows of a tile that are marked."""
    at = (start, *[jnp.zeros_like(start)] * (x_P.ndim - 1))
    old_R = jax.lax.dynamic_slice(x_P, at, new_R.shape)
    return jax.lax.dynamic_update_slice(x_P, jnp.where(where, new_R, old_R), at)
