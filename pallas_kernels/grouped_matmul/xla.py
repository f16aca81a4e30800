"""The routed experts in plain XLA: a loop over rows, or over tiles of rows sorted by expert.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden,
P = T * A rows (one per token and choice), R rows of a tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dtypes import accumulator
from pallas_kernels.grouped_matmul import sorting, xla_tiles
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.grouped_matmul.xla_backward import expert_mlp_backward

__all__ = ["expert_mlp", "expert_mlp_backward"]

# One expert's MLP on rows that share it: (rows, their weights, expert) -> weighted outputs.
_Expert = Callable[[Array, Array, Array], Array]


def expert_mlp(inputs: Inputs, *, limit: float, weight_first: bool) -> Float[Array, "T D"]:
    """Read each chosen expert's matrices once or a few times, and no others."""
    x_TD, expert_TA = inputs.x_TD, inputs.expert_TA
    rows, experts = expert_TA.size, inputs.w1_LEFD.shape[1]

    def run_expert(x_RD: Array, weight_R: Array, expert: Array) -> Array:
        its_weights = [sorting.take(w, inputs.layer, expert) for w in inputs.weights]
        return xla_tiles.run_expert(its_weights, x_RD, weight_R, limit, weight_first=weight_first)

    weight_TA = inputs.weight_TA.astype(accumulator(x_TD.dtype))
    if rows <= 2 * experts:
        return one_by_one(run_expert, x_TD, expert_TA, weight_TA, experts)
    few = rows <= 16 * experts
    sizes = (16,) if few else xla_tiles.fitting((32, 64, 128, 192, 256), rows, experts)
    return by_tiles(run_expert, x_TD, expert_TA, weight_TA, experts, sizes)


def one_by_one(
    run_expert: _Expert,
    x_TD: Float[Array, "T D"],
    expert_TA: Int[Array, "T A"],
    weight_TA: Float[Array, "T A"],
    experts: int,
) -> Float[Array, "T D"]:
    """A loop over tokens and choices, for few rows, which rarely share an expert."""
    A = expert_TA.shape[1]

    def add_choice(p: Array, total_TD: Array) -> Array:
        t, expert = p // A, expert_TA[p // A, p % A]
        row = lambda x_TD: jax.lax.dynamic_slice_in_dim(x_TD, t, 1)

        def add() -> Array:
            out_1D = run_expert(row(x_TD), weight_TA[t, p % A][None], expert)
            return row(total_TD) + out_1D

        real = (expert >= 0) & (expert < experts)
        new_1D = jax.lax.cond(real, add, lambda: row(total_TD))
        return jax.lax.dynamic_update_slice_in_dim(total_TD, new_1D, t, 0)

    return jax.lax.fori_loop(0, expert_TA.size, add_choice, jnp.zeros(x_TD.shape, weight_TA.dtype))


def by_tiles(
    run_expert: _Expert,
    x_TD: Float[Array, "T D"],
    expert_TA: Int[Array, "T A"],
    weight_TA: Float[Array, "T A"],
    experts: int,
    sizes: tuple[int, ...],
) -> Float[Array, "T D"]:
    """A loop over tiles of one expert's rows, each of the size that fits the rows left."""
    (T, A), largest = expert_TA.shape, sizes[-1]
    rows = xla_tiles.sort(expert_TA, experts)
    pad = lambda x_P: jnp.pad(x_P, (0, largest))
    token_P, weight_P = pad(rows.order_P // A), pad(weight_TA.reshape(-1)[rows.order_P])

    def run_tile(R: int, tile: xla_tiles.Tile) -> Array:
        token_R, weight_R = (
            jax.lax.dynamic_slice(x, (tile.row,), (R,)) for x in (token_P, weight_P)
        )
        out_RD = run_expert(x_TD[token_R], weight_R, tile.expert)
        return jnp.pad(out_RD, ((0, largest - R), (0, 0)))

    # Rows beyond the expert's own are overwritten by later experts.
    put = lambda out_PD, out_RD, tile: jax.lax.dynamic_update_slice_in_dim(
        out_PD, out_RD, tile.row, 0
    )
    out_PD = jnp.zeros((T * A + largest, x_TD.shape[1]), weight_TA.dtype)
    out_PD = xla_tiles.loop(rows, sizes, run_tile, put, out_PD)
    return sorting.sum_choices(out_PD, rows.order_P, rows.end_E[-1], A)
