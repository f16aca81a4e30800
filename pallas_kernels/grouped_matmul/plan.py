"""Which rows of which expert each step of a grouped kernel works on.

Rows are sorted by expert and cut into tiles of equal size, regardless of where experts begin; a
step is one tile for one of the experts that have rows in it. Steps visit the experts in order, so
that a kernel reads an expert's matrices once; each step writes only its expert's rows of the tile.

Example: 6 tokens with 2 of 3 experts each are 12 rows; `tile_rows` picks tiles of 8.

    expert_TA  [0 1] [0 1] [2 0] [0 1] [2 0] [1 0]    row p is choice p % 2 of token p // 2

    order_P    0  2  5  6  9 11  1  3 |  7 10  4  8   rows in order, | where the next tile begins
    expert     0  0  0  0  0  0  1  1 |  1  1  2  2   real = 12: every row has an expert

    step       0  1  2  3  (4)
    expert_S   0  1  1  2   2     expert 1 has rows in two tiles: two steps
    tile_S     0  0  1  1   1
    low_S      0  6  0  2   2     step 1 works on rows 6 and 7 of tile 0,
    high_S     6  8  2  4   4     step 2 on rows 0 and 1 of tile 1

S = 2 tiles + 3 experts = 5 bounds the number of steps; here steps = 4, and the fifth, which repeats
the fourth, does not run.

Axis letters: T tokens, A experts per token, E experts, P = T * A rows, S bound on the steps,
M tiles, R rows of a tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import sorting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows in order and the steps over them.

    Attributes:
      order_P: which of the T * A rows is at each place of the order.
      real: number of rows that have an expert; they come first.
      expert_S: each step's expert.
      tile_S: each step's tile.
      low_S: first row of the tile that is the expert's.
      high_S: row after the expert's last in the tile.
      steps: number of steps to run; at least 1, which may have no rows.
      rows: rows per tile.
    """

    order_P: Any
    real: Any
    expert_S: Any
    tile_S: Any
    low_S: Any
    high_S: Any
    steps: Any
    rows: int = dataclasses.field(metadata={"static": True})

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-self.order_P.shape[0] // self.rows)

    @property
    def scalars(self) -> tuple[Array, Array, Array, Array]:
        """Each step's numbers, which kernels read from scalar memory."""
        return self.expert_S, self.tile_S, self.low_S, self.high_S


def make(expert_TA: Int[Array, "T A"], experts: int) -> Plan:
    """Sort the rows and plan the steps; ids out of range come last and get no step."""
    P = expert_TA.size
    rows = tile_rows(P, experts)
    key_P, order_P = sorting.sort_by_expert(expert_TA.reshape(-1), experts)
    # Comparing all pairs takes a few microseconds; a binary search is a loop of gathers.
    search = functools.partial(jnp.searchsorted, method="compare_all")
    bounds = search(key_P, jnp.arange(experts + 1)).astype(jnp.int32)
    start_E, end_E = bounds[:-1], bounds[1:]  # rows
    first_tile_E = start_E // rows
    steps_E = jnp.where(end_E > start_E, (end_E - 1) // rows - first_tile_E + 1, 0)
    end_step_E = jnp.cumsum(steps_E, dtype=jnp.int32)
    steps = end_step_E[-1]
    step_S = jnp.arange(-(-P // rows) + min(experts, P), dtype=jnp.int32)
    step_S = jnp.minimum(step_S, jnp.maximum(steps - 1, 0))
    expert_S = search(end_step_E, step_S, side="right").astype(jnp.int32)
    expert_S = jnp.minimum(expert_S, experts - 1)
    tile_S = jnp.where(
        steps > 0, (first_tile_E + steps_E - end_step_E)[expert_S] + step_S, jnp.zeros_like(step_S)
    )
    in_tile = lambda row_E: jnp.clip(row_E[expert_S] - tile_S * rows, 0, rows)
    return Plan(
        order_P=order_P,
        real=bounds[-1],
        expert_S=expert_S,
        tile_S=tile_S,
        low_S=in_tile(start_E),
        high_S=in_tile(end_E),
        steps=jnp.maximum(steps, 1),
        rows=rows,
    )


def tile_rows(rows: int, experts: int) -> int:
    """Rows per tile: about as many as an expert has if tokens spread evenly."""
    each = rows // experts
    return 8 if each < 8 else 16 if each <= 16 else 128 if each < 256 else 256


def sorted_rows(plan: Plan, x_TD: Float[Array, "T D"], choices: int) -> Float[Array, "P_padded D"]:
    """Each row's token; the end of the last tile is padded with the first token."""
    token_P = jnp.pad(plan.order_P // choices, (0, plan.tiles * plan.rows - len(plan.order_P)))
    return x_TD[token_P]


def tiled(plan: Plan, weight_TA: Float[Array, "T A"]) -> Float[Array, "M 1 R"]:
    """A number per row, cut into tiles."""
    weight_P = weight_TA.reshape(-1)[plan.order_P]
    weight_P = jnp.pad(weight_P, (0, plan.tiles * plan.rows - len(weight_P)))
    return weight_P.reshape(plan.tiles, 1, plan.rows)
