"""Gradients of the routed experts in plain XLA, recomputed tile by tile of sorted rows.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden,
P = T * A rows, R rows of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dtypes import accumulator
from pallas_kernels.grouped_matmul import lora, sorting, xla_tiles
from pallas_kernels.grouped_matmul.inputs import Inputs


def expert_mlp_backward(
    grad_TD: Float[Array, "T D"],
    inputs: Inputs,
    *,
    limit: float,
    learn: tuple[bool, bool, bool],
    sizes: tuple[int, ...] = (32, 64, 96, 128, 160, 192, 256),
) -> tuple[Array, Array, list[Array], list[Array], list[Array]]:
    """Gradients of x_TD, of weight_TA, and [E, ...] of the layer's gate, up and down weights.

    A weight's gradients are those of its `lora.learned` arrays; none where `learn` is False.
    `sizes` are the sizes that a tile may have.
    """
    x_TD, weight_TA, weights, layer = inputs.x_TD, inputs.weight_TA, inputs.weights, inputs.layer
    wide, dtype = accumulator(x_TD.dtype), x_TD.dtype
    (T, A), experts = inputs.expert_TA.shape, inputs.w1_LEFD.shape[1]
    sizes = xla_tiles.fitting(sizes, T * A, experts)
    largest = sizes[-1]
    rows = xla_tiles.sort(inputs.expert_TA, experts)
    pad = lambda x_P: jnp.pad(x_P, (0, largest))
    token_P = pad(rows.order_P // A)
    weight_P = pad(weight_TA.reshape(-1)[rows.order_P].astype(wide))
    parts = [lora.learned(w) if learns else [] for w, learns in zip(weights, learn, strict=True)]

    def run_tile(R: int, tile: xla_tiles.Tile) -> Any:
        real_R = jnp.arange(R) < tile.left
        token_R, weight_R = (
            jax.lax.dynamic_slice(x, (tile.row,), (R,)) for x in (token_P, weight_P)
        )
        masked = lambda x_RD: jnp.where(real_R[:, None], x_RD, jnp.zeros_like(x_RD))
        its_weights = [sorting.take(w, layer, tile.expert) for w in weights]
        its_parts = [sorting.take(p, layer, tile.expert) for p in parts]
        primals = its_parts, masked(x_TD[token_R]), jnp.where(real_R, weight_R, 0)
        grad_RD = masked(grad_TD[token_R]).astype(wide)
        dparts, dx_RD, dweight_R = _expert_backward(grad_RD, its_weights, *primals, limit)
        dx_RD = jnp.pad(dx_RD.astype(wide), ((0, largest - R), (0, 0)))
        return dx_RD, jnp.pad(dweight_R, (0, largest - R)), dparts

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape[1:], accumulator(p.dtype)), parts)
    # Never bfloat16: to write a tile into such an array, XLA on CPU converts all of it.
    start = (
        jnp.zeros((T * A + largest, x_TD.shape[1]), wide),
        jnp.zeros(T * A + largest, wide),
        zeros,
    )
    dx_PD, dweight_P, sums = xla_tiles.loop(rows, sizes, run_tile, _put, start)
    real = rows.end_E[-1]
    dx_TD = sorting.sum_choices(dx_PD, rows.order_P, real, A).astype(dtype)
    dweight_TA = sorting.unsorted(dweight_P, rows.order_P, real, A).astype(weight_TA.dtype)
    gate, up, down = jax.tree.map(lambda part, sum_E: sum_E.astype(part.dtype), parts, sums)
    return dx_TD, dweight_TA, gate, up, down


def _expert_backward(
    grad_RD: Float[Array, "R D"],
    weights: list[Any],
    learned: list[list[Array]],
    x_RD: Float[Array, "R D"],
    weight_R: Float[Array, " R"],
    limit: float,
) -> tuple[list[list[Array]], Array, Array]:
    """One expert's gradients: of its `learned` arrays, of its rows and of their routing weights."""

    def run(learned: list[list[Array]], x_RD: Array, weight_R: Array) -> Array:
        new = [lora.replaced(w, v) if v else w for w, v in zip(weights, learned, strict=True)]
        # With the weight applied first, its gradient does not need the expert's output.
        return xla_tiles.run_expert(new, x_RD, weight_R, limit, weight_first=True)

    return jax.vjp(run, learned, x_RD, weight_R)[1](grad_RD)


def _put(carry: Any, grads: Any, tile: xla_tiles.Tile) -> Any:
    """Write a tile's gradients of rows in place; add those of weights to the expert's sums."""
    (dx_PD, dweight_P, sums), (dx_RD, dweight_R, dparts) = carry, grads
    # Rows beyond the expert's own are overwritten by later experts.
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=tile.row, axis=0)
    add = lambda sum_E, d: jax.lax.dynamic_update_index_in_dim(
        sum_E, sum_E[tile.expert] + d.astype(sum_E.dtype), tile.expert, 0
    )
    return write(dx_PD, dx_RD), write(dweight_P, dweight_R), jax.tree.map(add, sums, dparts)
