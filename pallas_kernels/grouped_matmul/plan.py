"""Which rows of which expert each step of a grouped kernel works on.

Rows are sorted by expert and cut into tiles, wherever experts begin; a step is one tile for one of
the experts that have rows in it. Steps go through the experts in order, so that a kernel reads an
expert's matrices once, and each writes its own expert's rows of the tile.

Axis letters: T tokens, A experts per token, E experts, P = T * A rows, S steps there may be,
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
    """Rows in order and steps over them.

    Attributes:
      order_P: which of the T * A rows stands there.
      real: rows that have an expert; they come first.
      expert_S: each step's expert.
      tile_S: its tile.
      low_S: the first row of the tile that is the expert's.
      high_S: the row after its last.
      steps: how many steps there are; at least 1, which may be of no row.
      rows: of a tile.
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
        """Tiles of all rows."""
        return -(-self.order_P.shape[0] // self.rows)


def make(expert_TA: Int[Array, "T A"], experts: int) -> Plan:
    """Sort the rows; ids out of range come last and get no step."""
    P = expert_TA.size
    rows = tile_rows(P, experts)
    key_P, order_P = sorting.sort_by_expert(expert_TA.reshape(-1), experts)
    # Comparing all with all is a few microseconds; a search is a loop of gathers.
    search = functools.partial(jnp.searchsorted, method="compare_all")
    bound = search(key_P, jnp.arange(experts + 1)).astype(jnp.int32)
    start_E, end_E = bound[:-1], bound[1:]
    first_E = start_E // rows
    tiles_E = jnp.where(end_E > start_E, (end_E - 1) // rows - first_E + 1, 0)
    last_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    step_S = jnp.arange(-(-P // rows) + min(experts, P), dtype=jnp.int32)
    step_S = jnp.minimum(step_S, jnp.maximum(last_E[-1] - 1, 0))
    expert_S = search(last_E, step_S, side="right").astype(jnp.int32)
    expert_S = jnp.minimum(expert_S, experts - 1)
    tile_S = jnp.where(
        last_E[-1] > 0, (first_E + tiles_E - last_E)[expert_S] + step_S, jnp.zeros_like(step_S)
    )
    within = lambda edge_E: jnp.clip(edge_E[expert_S] - tile_S * rows, 0, rows)
    return Plan(
        order_P=order_P,
        real=bound[-1],
        expert_S=expert_S,
        tile_S=tile_S,
        low_S=within(start_E),
        high_S=within(end_E),
        steps=jnp.maximum(last_E[-1], 1),
        rows=rows,
    )


def tile_rows(rows: int, experts: int) -> int:
    """About as many as an expert has, if the choice is even."""
    each = rows // experts
    return 8 if each < 8 else 16 if each <= 16 else 128 if each < 256 else 256


def sorted_rows(plan: Plan, x_TD: Float[Array, "T D"], choices: int) -> Float[Array, "P_padded D"]:
    """Each row's token; the last tile's end is filled with the first."""
    token_P = jnp.pad(plan.order_P // choices, (0, plan.tiles * plan.rows - len(plan.order_P)))
    return x_TD[token_P]


def tiled(plan: Plan, weight_TA: Float[Array, "T A"]) -> Float[Array, "M 1 R"]:
    """A number per row, in tiles."""
    weight_P = weight_TA.reshape(-1)[plan.order_P]
    weight_P = jnp.pad(weight_P, (0, plan.tiles * plan.rows - len(weight_P)))
    return weight_P.reshape(plan.tiles, 1, plan.rows)
