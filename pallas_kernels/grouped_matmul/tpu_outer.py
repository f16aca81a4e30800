"""Sums of outer products over each expert's rows on TPUs: the gradients of its matrices.

Axis letters: P sorted rows (whole tiles), E experts, N, K the matrix, R rows of a tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.plan import Plan
from pallas_kernels.grouped_matmul.tpu_weights import divisor
from pallas_kernels.products import contract

_VMEM_BYTES = 48 * 2**20


def outer(
    plan: Plan,
    experts: int,
    left_PN: Float[Array, "P N"],
    right_PK: Float[Array, "P K"],
    *,
    dtype: Any,
    name: str,
) -> Float[Array, "E N K"]:
    """Per expert, the transpose of its left rows times its right rows."""
    (_, N), (_, K), R = left_PN.shape, right_PK.shape, plan.rows
    bn, bk = divisor(N, 512), divisor(K, 1024)

    # The steps are innermost: an expert's block of the result stays in VMEM for all of its steps.
    def left_rows(n: Any, k: Any, step: Any, expert_ref: Any, tile_ref: Any, *_: Any) -> Any:
        return tile_ref[step], n

    def right_rows(n: Any, k: Any, step: Any, expert_ref: Any, tile_ref: Any, *_: Any) -> Any:
        return tile_ref[step], k

    def expert_block(n: Any, k: Any, step: Any, expert_ref: Any, *_: Any) -> Any:
        return expert_ref[step], n, k

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(N // bn, K // bk, plan.steps),
        in_specs=[pl.BlockSpec((R, bn), left_rows), pl.BlockSpec((R, bk), right_rows)],
        out_specs=pl.BlockSpec((None, bn, bk), expert_block),
        scratch_shapes=[pltpu.VMEM((bn, bk), jnp.float32)],
    )
    sum_ENK = pl.pallas_call(
        _step,
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((experts, N, K), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name=name,
    )(*plan.scalars, left_PN, right_PK)
    # Blocks that no step has written hold garbage.
    has_rows_E = jnp.zeros(experts, bool).at[plan.expert_S].max(plan.high_S > plan.low_S)
    return jnp.where(has_rows_E[:, None, None], sum_ENK, jnp.zeros_like(sum_ENK))


def _step(
    expert_ref: Any,  # [S]
    tile_ref: Any,  # [S]
    low_ref: Any,  # [S]
    high_ref: Any,  # [S]
    left_ref: Any,  # [R, bn]
    right_ref: Any,  # [R, bk]
    out_ref: Any,  # [bn, bk]
    sum_ref: Any,  # [bn, bk] float32
) -> None:
    s, steps = pl.program_id(2), pl.num_programs(2)
    expert = expert_ref[s]
    first = (s == 0) | (expert != expert_ref[jnp.maximum(s - 1, 0)])
    last = (s == steps - 1) | (expert != expert_ref[jnp.minimum(s + 1, steps - 1)])

    def expert_rows(ref: Any) -> Array:
        row = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
        wide = ref[...].astype(jnp.float32)
        return jnp.where((row >= low_ref[s]) & (row < high_ref[s]), wide, 0.0).astype(ref.dtype)

    products = contract(expert_rows(left_ref), expert_rows(right_ref), 0, 0)

    @pl.when(first)
    def _():
        sum_ref[...] = products

    @pl.when(jnp.logical_not(first))
    def _():
        sum_ref[...] += products

    @pl.when(last)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
