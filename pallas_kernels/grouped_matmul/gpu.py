"""The routed experts as Pallas kernels for Hopper GPUs (Mosaic).

Rows are sorted by expert; a step is the part of a tile of rows that belongs to one expert. Tiles
begin at multiples of eight rows, as their copies must: an expert's first tile may begin with rows
of others. Two kernels: gate, up and activation in one, down in another, each with a grid of the
most steps possible.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden,
P = T * A rows, S steps, R rows of a tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import gpu_matmul, gpu_weights, sorting, xla_backward
from pallas_kernels.grouped_matmul.gpu_matmul import TILING
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.implementations import Unsupported

__all__ = ["expert_mlp", "expert_mlp_backward", "make_steps"]

# A single tile size: to choose among several, the host would wait for the GPU.
expert_mlp_backward = functools.partial(xla_backward.expert_mlp_backward, sizes=(128,))


def expert_mlp(inputs: Inputs, *, limit: float, weight_first: bool) -> Float[Array, "T D"]:
    """Sort the rows by expert, two grouped matmuls, sum per token.

    Raises:
      Unsupported: no rows, a dtype other than bfloat16, a low-rank update, gate and up in different
        formats, D or F that are not whole blocks.
    """
    _check(inputs)
    expert_TA, layer = inputs.expert_TA, inputs.layer
    A, experts = expert_TA.shape[1], inputs.w1_LEFD.shape[1]
    steps = make_steps(expert_TA, experts, gpu_matmul.tile_rows(expert_TA.size, experts))
    # A tile may reach beyond the last row, and copies take rows in eights.
    padding = (0, -expert_TA.size % 8 + steps.rows)
    token_P = jnp.pad(steps.order_P // A, padding)
    weight_TA = inputs.weight_TA.astype(jnp.float32)
    weight_P = jnp.pad(weight_TA.reshape(-1)[steps.order_P], padding)
    hidden_PF = gpu_matmul.hidden(
        steps,
        inputs.x_TD[token_P],
        inputs.w1_LEFD,
        inputs.w3_LEFD,
        layer,
        weight_P if weight_first else None,
        limit=limit,
    )
    out_PD = gpu_matmul.out(steps, hidden_PF, inputs.w2_LEDF, layer)
    return sorting.sum_choices(
        out_PD, steps.order_P, steps.real, A, None if weight_first else weight_TA
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Rows in order and what each step works on.

    Attributes:
      order_P: which of the T * A rows is at each place of the order.
      real: number of rows that have an expert; they come first.
      expert_S: each step's expert.
      row_S: each step's first row, one of the first eight of its tile.
      count_S: number of rows of each step; 0 for steps that are not needed.
      rows: rows per tile; a tile begins at a multiple of eight.
    """

    order_P: Any
    real: Any
    expert_S: Any
    row_S: Any
    count_S: Any
    rows: int = dataclasses.field(metadata={"static": True})


def make_steps(expert_TA: Int[Array, "T A"], experts: int, rows: int) -> Steps:
    """Sort the rows and plan the steps; ids out of range come last and get no step."""
    P = expert_TA.size
    key_P, order_P = sorting.sort_by_expert(expert_TA.reshape(-1), experts)
    # Comparing all pairs takes a few microseconds; a binary search is a loop of gathers.
    search = functools.partial(jnp.searchsorted, method="compare_all")
    bounds = search(key_P, jnp.arange(experts + 1)).astype(jnp.int32)
    start_E, end_E = bounds[:-1], bounds[1:]
    first_tile_E = start_E & -TILING  # tiles are named by their first row
    steps_E = jnp.where(end_E > start_E, -(-(end_E - first_tile_E) // rows), 0)
    end_step_E = jnp.cumsum(steps_E, dtype=jnp.int32)
    # The worst case: n rows that begin at the eighth of a tile take (n + 7 + rows - 1) // rows.
    most = (P + min(experts, P) * (rows + TILING - 2)) // rows
    step_S = jnp.arange(most, dtype=jnp.int32)
    expert_S = search(end_step_E, step_S, side="right").astype(jnp.int32)
    expert_S = jnp.minimum(expert_S, experts - 1)
    tile_S = (first_tile_E - (end_step_E - steps_E) * rows)[expert_S] + step_S * rows
    row_S = jnp.maximum(tile_S, start_E[expert_S])
    count_S = jnp.maximum(jnp.minimum(tile_S + rows, end_E[expert_S]) - row_S, 0)
    row_S = jnp.where(count_S > 0, row_S, 0)
    return Steps(order_P, bounds[-1], expert_S, row_S, count_S, rows)


def _check(inputs: Inputs) -> None:
    if inputs.x_TD.dtype != jnp.bfloat16:
        raise Unsupported(f"The GPU form takes bfloat16, not {inputs.x_TD.dtype}.")
    if inputs.expert_TA.size == 0:
        raise Unsupported("The GPU form takes at least one token and expert.")
    for w in inputs.weights:
        gpu_weights.check(w)
    gate, up, _ = inputs.weights
    if type(gate) is not type(up):
        raise Unsupported("The GPU form takes gate and up matrices in the same format.")
    _, _, F, D = gate.shape
    if D % gpu_matmul.OUT_COLUMNS or F % gpu_matmul.COLUMNS:
        raise Unsupported(
            f"The GPU form takes D in multiples of {gpu_matmul.OUT_COLUMNS} and F in multiples of "
            f"{gpu_matmul.COLUMNS}, not {D} and {F}."
        )
