"""Decode on TPUs, one row of the batch per grid step.

The next query's entries are copied while the current query is computed.

Axis letters: as in the package; N the window's ring padded to a multiple of 128.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_tpu import in_hbm, resident
from pallas_kernels.sparse_attention import tpu_gather as gather
from pallas_kernels.sparse_attention.inputs import DecodeInputs
from pallas_kernels.sparse_attention.tpu_softmax import attend

_VMEM = 40 * 2**20


def call(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    """Run the kernel; S must be a multiple of the rows of a tile of the pool."""
    q_BTHK, window_BRK, pool = inputs.q_BTHK, inputs.window_BRK, inputs.pool_LBSK
    stored = gather.stored(pool)
    indices_BTk = gather.in_lanes(inputs.indices_BTk, -1)
    window_mask_BTN = gather.in_lanes(inputs.window_mask_BTR, 0)
    batch, queries, heads, dim = q_BTHK.shape
    k, ring = indices_BTk.shape[2], window_BRK.shape[1]
    return pl.pallas_call(
        functools.partial(_kernel, page=stored.page, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[
                _per_row(1, 1, queries * k, memory_space=pltpu.SMEM),
                _per_row(queries, k),
                _per_row(queries, heads, dim),
                _per_row(ring, dim),
                _per_row(*window_mask_BTN.shape[1:]),
                resident(heads, 1),
                stored.offsets_spec(),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=_per_row(queries, heads, dim),
            scratch_shapes=[gather.Lists.scratch(k, stored.array), pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=_VMEM,
            disable_bounds_checks=True,  # half the cost of a copy; word_rows are in bounds
        ),
        name="sparse_attention_decode",
    )(
        inputs.layer.astype(jnp.int32)[None],
        gather.word_rows(indices_BTk, pool, queries),
        indices_BTk,
        q_BTHK,
        window_BRK,
        window_mask_BTN,
        inputs.sink_H.astype(jnp.float32)[:, None],
        stored.offsets_B11M,
        in_hbm(stored.array),
    )


def _per_row(*dims: int, **space: Any) -> pl.BlockSpec:
    """Spec of an array [B, *dims], read one row of the batch at a time."""

    def batch_row(row: Any, layer_ref: Any) -> Any:
        return row, *[0] * len(dims)

    return pl.BlockSpec((1, *dims), batch_row, **space)


def _kernel(
    layer_ref: Any,  # SMEM [1]
    words_ref: Any,  # SMEM [1, 1, 1, T x k]
    indices_ref: Any,  # [1, T, k]
    q_ref: Any,  # [1, T, H, K]
    window_ref: Any,  # [1, R, K]
    mask_ref: Any,  # [1, T, N]
    sink_ref: Any,  # [H, 1]
    offsets_ref: Any,  # SMEM [1, 1, 1, M], or None
    pool_ref: Any,  # HBM, `Stored.array`
    out_ref: Any,  # [1, T, H, K]
    listed_ref: Any,  # scratch for two lists
    sems: Any,
    *,
    page: int,
    scale: float,
) -> None:
    source = gather.Source.of_row(pool_ref, layer_ref[0], pl.program_id(0), offsets_ref, page)
    ring, queries = window_ref.shape[1], q_ref.shape[1]

    lists = gather.Lists(listed_ref, sems)
    lists.start(words_ref, jnp.int32(0), source)
    seen_1N = jnp.max(mask_ref[0], axis=0, keepdims=True)
    window_RK = gather.zero_unseen(window_ref[0], seen_1N)

    def query(t: Any, _: Any) -> None:
        pl.when(t + 1 < queries)(lambda: lists.start(words_ref, t + 1, source))
        indices_1k = indices_ref[0, pl.ds(t, 1)]
        mask_1R = mask_ref[0, pl.ds(t, 1)][:, :ring] > 0
        keys_kK = lists.wait(t, indices_1k, pool_ref.dtype, q_ref.dtype)
        parts = [(window_RK, mask_1R), (keys_kK, indices_1k >= 0)]
        out_HK = attend(q_ref[0, t], parts, sink_ref[...], scale)
        out_ref[0, t] = out_HK.astype(out_ref.dtype)

    jax.lax.fori_loop(0, queries, query, None)
