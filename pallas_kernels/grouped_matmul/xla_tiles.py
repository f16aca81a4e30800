"""A loop over tiles of rows that share an expert, each of the size that fits the rows left.

Axis letters: T tokens, D hidden, A experts per token, E experts, F expert hidden, P = T * A rows,
R rows of a tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dtypes import accumulator
from pallas_kernels.grouped_matmul import lora, reference, sorting


class Sorted(NamedTuple):
    """Rows sorted by expert; those without an expert come last.

    Attributes:
      key_P: each row's expert.
      order_P: which of the T * A rows is at each place of the order.
      end_E: row after each expert's last.
    """

    key_P: Array
    order_P: Array
    end_E: Array


class Tile(NamedTuple):
    """Rows of one expert: `left` of them from `row` on, possibly more than the tile holds."""

    row: Array
    expert: Array
    left: Array


def sort(expert_TA: Int[Array, "T A"], experts: int) -> Sorted:
    """Sort the rows by expert."""
    key_P, order_P = sorting.sort_by_expert(expert_TA.reshape(-1), experts)
    end_E = jnp.searchsorted(key_P, jnp.arange(experts), side="right").astype(jnp.int32)
    return Sorted(key_P, order_P, end_E)


def fitting(sizes: tuple[int, ...], rows: int, experts: int) -> tuple[int, ...]:
    """The sizes up to one that holds twice an even share of the rows: each costs a compilation."""
    most = min(rows, 2 * rows / experts)
    return tuple(size for size, below in zip(sizes, (0, *sizes), strict=False) if below < most)


def loop(
    rows: Sorted,
    sizes: tuple[int, ...],
    run_tile: Callable[[int, Tile], Any],
    put: Callable[[Any, Any, Tile], Any],
    carry: Any,
) -> Any:
    """Carry = put(carry, run_tile(R, tile), tile) for every tile, in order.

    `run_tile` must return the same shapes for every size. An expert's rows are cut into tiles of
    the largest size; its last tile is of the smallest size that holds the rest. A tile's rows
    beyond the expert's own belong to later tiles.
    """
    branches = [functools.partial(run_tile, R) for R in sizes]
    # A loop without a choice would make XLA convert the experts of all layers before it.
    nothing = lambda tile: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(branches[0], tile)
    )

    def step(state: tuple[Array, Any]) -> tuple[Array, Any]:
        row, carry = state
        expert = rows.key_P[row]
        tile = Tile(row, expert, rows.end_E[expert] - row)
        size = jnp.sum(tile.left > jnp.asarray((0, *sizes[:-1]), jnp.int32), dtype=jnp.int32)
        result = jax.lax.switch(size, [nothing, *branches], tile)
        return row + jnp.minimum(tile.left, sizes[-1]), put(carry, result, tile)

    rows_left = lambda state: state[0] < rows.end_E[-1]
    return jax.lax.while_loop(rows_left, step, (jnp.int32(0), carry))[1]


def run_expert(
    weights: Sequence[lora.Weight],
    x_RD: Float[Array, "R D"],
    weight_R: Float[Array, " R"],
    limit: float,
    *,
    weight_first: bool,
) -> Float[Array, "R D"]:
    """One expert's weighted outputs, given its gate, up and down matrices."""
    w1_FD, w3_FD, w2_DF = weights
    linear = lambda x, w: lora.linear(x, w, impl="xla").astype(accumulator(x.dtype))
    hidden_RF = reference.activate(linear(x_RD, w1_FD), linear(x_RD, w3_FD), limit)
    if weight_first:
        hidden_RF = hidden_RF * weight_R[:, None]
    out_RD = linear(hidden_RF.astype(x_RD.dtype), w2_DF)
    return out_RD if weight_first else out_RD * weight_R[:, None]
