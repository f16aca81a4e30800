"""Prefill on TPUs, one block of queries per grid step, in one of two ways.

If a block lists only entries below `FEW`, all entries up to the last one listed are read once for
all its queries, under a mask built from their lists: matmuls of a thousand rows cost less than
copies of single entries. Otherwise each query's entries are gathered, the next query's while the
current one is computed.

Axis letters: as in the package; Q queries per block, Y = window + Q keys of its window.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.dense_attention.tpu_window import in_blocks, seen_by_any
from pallas_kernels.mosaic_tpu import LANES, in_hbm, resident
from pallas_kernels.sparse_attention import tpu_gather as gather
from pallas_kernels.sparse_attention import tpu_masked as masked
from pallas_kernels.sparse_attention.inputs import PrefillInputs
from pallas_kernels.sparse_attention.tpu_softmax import attend
from pallas_kernels.tpu_attention_pull import lowest_key, where_seen

# Rows per block, queries x heads: more do not fill the MXU any better.
_ROWS = 1024
_QUERIES = 16
# Where both ways cost about the same per query; larger on v6e and tpu7x, smaller on v5p.
FEW = 8192
_VMEM = 48 * 2**20


def call(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    """Run the kernel; S must be a multiple of the rows of a tile of the pool."""
    q_BTHK, pool, first_BT = inputs.q_BTHK, inputs.pool_LBSK, inputs.first_BT
    stored = gather.stored(pool)
    start_B = inputs.start_B.astype(jnp.int32)
    batch, queries, heads, _ = q_BTHK.shape
    block = min(queries, _QUERIES, max(8, _ROWS // heads))
    blocks = pl.cdiv(queries, block)
    pad = lambda x, fill: jnp.pad(
        x, ((0, 0), (0, blocks * block - queries), (0, 0)), constant_values=fill
    )
    indices_BTk = pad(gather.in_lanes(inputs.indices_BTk, -1), -1)
    low_BN1Q = None if first_BT is None else in_blocks(lowest_key(first_BT, start_B, window), block)
    return pl.pallas_call(
        functools.partial(_kernel, page=stored.page, window=window, scale=scale),
        grid_spec=_grid(
            (batch, blocks),
            block,
            (indices_BTk, q_BTHK, stored),
            window,
            pool.shape[2],
            bounded=first_BT is not None,
        ),
        out_shape=jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=_VMEM,
            disable_bounds_checks=True,  # half the cost of a copy; word_rows are in bounds
        ),
        name="sparse_attention_prefill",
    )(
        inputs.layer.astype(jnp.int32)[None],
        start_B,
        gather.word_rows(indices_BTk, pool, block),
        indices_BTk,
        q_BTHK,
        inputs.sink_H.astype(jnp.float32)[:, None],
        low_BN1Q,
        pad(inputs.window_BXK, 0),
        stored.offsets_B11M,
        in_hbm(stored.array),
    )


def _grid(
    grid: tuple[int, int],
    block: int,
    arrays: tuple[Any, Any, gather.Stored],
    window: int,
    capacity: int,
    *,
    bounded: bool,
) -> pltpu.PrefetchScalarGridSpec:
    """The blocks of each step: queries and their lists; and scratch for both ways."""
    indices_BTk, q_BTHK, stored = arrays
    k, (heads, dim) = indices_BTk.shape[2], q_BTHK.shape[2:]
    few = min(FEW, pl.cdiv(capacity, masked.STEP) * masked.STEP)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=grid,
        in_specs=[
            pl.BlockSpec((1, 1, 1, block * k), _stacked_query_block, memory_space=pltpu.SMEM),
            _per_block(block, k),
            _per_block(block, heads, dim),
            resident(heads, 1),
            pl.BlockSpec((None, None, 1, block), _stacked_query_block) if bounded else None,
            pl.BlockSpec(memory_space=pl.ANY),
            stored.offsets_spec(),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=_per_block(block, heads, dim),
        scratch_shapes=[
            pltpu.VMEM((window + block, dim), q_BTHK.dtype),
            gather.Lists.scratch(k, stored.array),
            pltpu.SemaphoreType.DMA((3,)),
            masked.scratch((block, heads, dim), few, stored.array, q_BTHK.dtype),
        ],
    )


def _per_block(block: int, *dims: int) -> pl.BlockSpec:
    """Spec of an array [B, T, *dims], read one block of queries at a time."""

    def query_block(row: Any, query_block: Any, *_: Any) -> Any:
        return row, query_block, *[0] * len(dims)

    return pl.BlockSpec((1, block, *dims), query_block)


def _stacked_query_block(row: Any, query_block: Any, *_: Any) -> Any:
    """For arrays [B, N, 1, _], whose blocks of queries are an axis of their own."""
    return row, query_block, 0, 0


def _kernel(
    layer_ref: Any,  # SMEM [1]
    start_ref: Any,  # SMEM [B]
    words_ref: Any,  # SMEM [1, 1, 1, Q x k]
    indices_ref: Any,  # [1, Q, k]
    q_ref: Any,  # [1, Q, H, K]
    sink_ref: Any,  # [H, 1]
    low_ref: Any,  # [1, Q], the first key of the chunk's window that each query may see, or None
    window_ref: Any,  # HBM [B, X, K]
    offsets_ref: Any,  # SMEM [1, 1, 1, M], or None
    pool_ref: Any,  # HBM, `Stored.array`
    out_ref: Any,  # [1, Q, H, K]
    near_ref: Any,  # [Y, K]
    listed_ref: Any,  # scratch for two lists
    sems: Any,
    scratch: masked.Scratch,
    *,
    page: int,
    window: int,
    scale: float,
) -> None:
    queries = q_ref.shape[1]
    row, first = pl.program_id(0), pl.program_id(1) * queries
    source = gather.Source.of_row(pool_ref, layer_ref[0], row, offsets_ref, page)
    near = pltpu.make_async_copy(
        window_ref.at[row, pl.ds(first, near_ref.shape[0])], near_ref, sems.at[2]
    )
    near.start()
    last = jnp.max(indices_ref[0])
    few = scratch.listed.shape[1] * LANES
    low_1Q = None if low_ref is None else jnp.maximum(low_ref[...] - first, 0)
    mask = _WindowMask(near_ref.shape[0], window, window - start_ref[row] - first, low_1Q)

    @pl.when(last < few)
    def _() -> None:
        masked.mark_listed(indices_ref, scratch)
        near.wait()
        near_QY = mask.of_queries(0, queries)
        near_YK = mask.zero_unseen(near_ref)
        q_RK = q_ref[0].reshape(-1, q_ref.shape[3])
        entries = masked.Entries(source, last, scratch, sems)
        out_RK = masked.attend(q_RK, sink_ref[...], (near_YK, near_QY), entries, scale)
        out_ref[0] = out_RK.reshape(q_ref.shape[1:]).astype(out_ref.dtype)

    @pl.when(last >= few)
    def _() -> None:
        lists = gather.Lists(listed_ref, sems)
        lists.start(words_ref, jnp.int32(0), source)
        near.wait()
        near_YK = mask.zero_unseen(near_ref)

        def query(t: Any, _: Any) -> None:
            pl.when(t + 1 < queries)(lambda: lists.start(words_ref, t + 1, source))
            indices_1k = indices_ref[0, pl.ds(t, 1)]
            keys_kK = lists.wait(t, indices_1k, pool_ref.dtype, q_ref.dtype)
            parts = [(near_YK, mask.of_queries(t, 1)), (keys_kK, indices_1k >= 0)]
            out_HK = attend(q_ref[0, t], parts, sink_ref[...], scale)
            out_ref[0, t] = out_HK.astype(out_ref.dtype)

        jax.lax.fori_loop(0, queries, query, None)


@dataclasses.dataclass(frozen=True)
class _WindowMask:
    """Which keys of its block's window each query sees.

    Attributes:
      keys: keys of the block's window, Y.
      window: keys that a query sees.
      missing: leading keys whose position is negative.
      low_1Q: the first key that each query may see; None: 0.
    """

    keys: int
    window: int
    missing: Any
    low_1Q: Any

    def of_queries(self, first: Any, queries: int) -> Bool[Array, "Q Y"]:
        """Masks of `queries` queries of the block, from query `first` on."""
        shape = (queries, self.keys)
        query_QY = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        key_QY = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        near_QY = (key_QY > query_QY) & (key_QY <= query_QY + self.window)
        near_QY &= key_QY >= self.missing
        return near_QY if self.low_1Q is None else near_QY & (key_QY >= self._low(first, queries))

    def zero_unseen(self, near_ref: Any) -> Float[Array, "Y K"]:
        """The block's window, zero where no query sees the key; none sees the first."""
        row_Y1 = jax.lax.broadcasted_iota(jnp.int32, (self.keys, 1), 0)
        seen_Y1 = row_Y1 >= jnp.maximum(self.missing, 1)
        if self.low_1Q is not None:
            seen_Y1 &= seen_by_any(row_Y1, 0, self.low_1Q, self.window)
        return where_seen(near_ref[...], seen_Y1)

    def _low(self, first: Any, queries: int) -> Int32[Array, "Q 1"]:
        shape = (queries, self.low_1Q.shape[1])
        query = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        same = query == jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return jnp.max(jnp.where(same, self.low_1Q, 0), axis=1, keepdims=True)
