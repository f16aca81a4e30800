"""Attention on TPUs: a running softmax over the window's keys, then over blocks of the pool.

A grid step holds a block of queries with all their heads as rows (there is one key head) and one
block of entries; the window is added in the first step. Window and pool are read in place, and only
as far as the block's queries see. The softmax starts from the sink, a key without a value.

With a pool in pages a grid step holds all entries that the queries see, a block after another.

Axis letters: as in the package; N blocks of queries, Q queries per block, R = Q x H rows,
Y keys of a block's window, S entries of a block (in the kernel), W = 128 lanes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention import tpu_pages, xla
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.dense_attention.tpu_backward import prefill_backward
from pallas_kernels.dense_attention.tpu_softmax import add, begin, logits
from pallas_kernels.dense_attention.tpu_window import band_keys, in_blocks, per_row, ring_keys
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import LANES, in_hbm, resident
from pallas_kernels.paged import Paged
from pallas_kernels.tpu_attention_backward import queries_per_block
from pallas_kernels.tpu_attention_pull import any_row_sees, lowest_key, where_seen

__all__ = ["decode", "decode_backward", "prefill", "prefill_backward"]

# Logits of rows x entries, 2 to 4 MB of float32, leave room in VMEM to double-buffer the rest.
_ROWS = 1024
_ENTRIES, _DECODE_ENTRIES = 512, 1024
_VMEM_BYTES = 48 * 2**20
# Key blocks are full tiles of the narrowest supported dtype.
_TILE = 16
# Two or four scalars per block of queries must fit in half of the scalar memory.
_SCALARS = 2**17

decode_backward = xla.decode_backward


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    """All queries of a row form one block; the pool is read once."""
    batch, queries, heads, dim = inputs.q_BTHK.shape
    ring = inputs.window_BRK.shape[1]
    if queries * heads > 2 * _ROWS or ring > 2 * _ROWS:
        raise Unsupported(
            f"dense_attention.decode on TPUs takes up to {2 * _ROWS} rows of queries x heads and "
            f"up to {2 * _ROWS} keys of a window, not {queries} x {heads} and {ring}."
        )
    per_batch_row = lambda *dims: pl.BlockSpec((None, *dims), _batch_row)
    window = _Window(
        (inputs.window_BRK, inputs.window_mask_BTR.astype(jnp.int32)),
        (per_batch_row(ring, dim), per_batch_row(queries, ring)),
        functools.partial(ring_keys, heads=heads),
    )
    return _attend(
        inputs,
        window,
        jnp.zeros(batch, jnp.int32),
        None,
        block=queries,
        entries=_DECODE_ENTRIES,
        scale=scale,
        name="dense_attention_decode",
    )


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    """A block of queries sees keys of two adjacent, aligned blocks of the window."""
    _, queries, heads, dim = inputs.q_BTHK.shape
    block = queries_per_block(queries, heads, LANES)
    near = keys_per_block(queries, block, window)
    if heads * block > 2 * _ROWS or near > _ROWS:
        raise Unsupported(
            f"dense_attention.prefill on TPUs takes up to {2 * _ROWS} heads and a window of up to "
            f"{_ROWS}, not {heads} and {window}."
        )
    keys, first_BT, start_B = inputs.window_BXK.shape[1], inputs.first_BT, inputs.start_B
    last = pl.cdiv(keys, near) - 1

    def window_block(part: int, query_block: Any, row: Any, step: Any, *_: Any) -> Any:
        # Clamped: the last queries' second block may be beyond the window, and is masked then.
        return row, jnp.minimum(jax.lax.div(query_block * block, near) + part, last), 0

    parts = range(1 if near == keys else 2)
    index_maps = [functools.partial(window_block, part) for part in parts]
    low_BN1Q = None if first_BT is None else in_blocks(lowest_key(first_BT, start_B, window), block)
    windows = _Window(
        ((inputs.window_BXK,) * len(parts), low_BN1Q),
        (
            tuple(pl.BlockSpec((None, near, dim), index_map) for index_map in index_maps),
            None if low_BN1Q is None else _per_query(block),
        ),
        functools.partial(band_keys, heads=heads, block=block, window=window, keys=keys),
    )
    return _attend(
        inputs,
        windows,
        start_B,
        inputs.hidden_BT,
        block=block,
        entries=_ENTRIES,
        scale=scale,
        name="dense_attention_prefill",
    )


def keys_per_block(queries: int, block: int, window: int) -> int:
    """Keys per window block: two adjacent blocks cover the window of a block of queries.

    Window blocks are multiples of query blocks, which are a power of two or all queries.
    """
    unit = _TILE if block >= queries else max(_TILE, block)
    return min(pl.cdiv(max(window, block), unit) * unit, window + queries)


class _Window(NamedTuple):
    """A window's arrays, their specs, and a function of their refs that returns keys and mask."""

    arrays: tuple[Any, Any]
    specs: tuple[Any, Any]
    read: Callable[..., Any]


def _attend(
    inputs: DecodeInputs | PrefillInputs,
    window: _Window,
    start_B: Int[Array, " B"],
    hidden_BT: Int[Array, "B T"] | None,
    *,
    block: int,
    entries: int,
    scale: float,
    name: str,
) -> Float[Array, "B T H K"]:
    """Run the kernel; its grid is blocks of queries, rows of the batch, blocks of entries."""
    pool_LBSK, (batch, queries, heads, dim) = inputs.pool_LBSK, inputs.q_BTHK.shape
    blocks = pl.cdiv(queries, block)
    visible_BN1Q = in_blocks(inputs.visible_BT, block)
    hidden_BN1Q = None if hidden_BT is None else in_blocks(hidden_BT, block)
    most = _SCALARS // (2 if hidden_BN1Q is None else 4)
    if batch * blocks > most:
        raise Unsupported(f"dense_attention on TPUs takes up to {most} blocks of {block} queries.")
    capacity, steps = 0 if pool_LBSK is None else pool_LBSK.shape[2], 1
    if paged := isinstance(pool_LBSK, Paged):
        width = min(entries, pl.cdiv(capacity, LANES) * LANES)
        pool = tpu_pages.arrays_of(pool_LBSK, width)
    else:
        width, pool = min(entries, capacity), in_hbm(pool_LBSK)
        steps = pl.cdiv(capacity, width) if width else 1
    out = pl.pallas_call(
        functools.partial(
            _kernel, read_window=window.read, blocks=blocks, heads=heads, scale=scale
        ),
        grid_spec=_grid(
            (blocks, batch, steps),
            block,
            (heads, dim),
            window.specs,
            pool,
            width,
            has_hidden=hidden_BN1Q is not None,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, queries * heads, dim), inputs.q_BTHK.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
            disable_bounds_checks=paged,  # most of the cost of a copy; `tpu_pages` stays in bounds
        ),
        name=name,
    )(
        inputs.layer.astype(jnp.int32).reshape(1),
        start_B.astype(jnp.int32),
        jnp.max(visible_BN1Q, axis=(2, 3)).reshape(-1),
        jnp.min(visible_BN1Q, axis=(2, 3)).reshape(-1),
        None if hidden_BN1Q is None else _hidden_of_blocks(visible_BN1Q, hidden_BN1Q),
        inputs.q_BTHK.reshape(batch, queries * heads, dim),
        jnp.broadcast_to(inputs.sink_H.astype(jnp.float32)[:, None], (heads, LANES)),
        (visible_BN1Q, hidden_BN1Q),
        window.arrays,
        pool,
    )
    return out.reshape(inputs.q_BTHK.shape)


def _grid(
    grid: tuple[int, int, int],
    block: int,
    head: tuple[int, int],
    window_specs: tuple[Any, Any],
    pool: Any,
    width: int,
    *,
    has_hidden: bool,
) -> pltpu.PrefetchScalarGridSpec:
    """The blocks of each step, with `width` entries of the pool; 0 without a pool."""
    (heads, dim), blocks = head, grid[0]
    rows = block * heads

    def entry_block(query_block: Any, row: Any, step: Any, *scalars: Any) -> Any:
        # Clamped to the blocks that some query sees: a repeated index fetches nothing.
        layer_ref, _, most_ref, _, hidden_refs = scalars
        of_block = lambda ref: ref[row * blocks + query_block]
        last = jnp.maximum(jax.lax.div(of_block(most_ref) + width - 1, width) - 1, 0)
        if hidden_refs is not None:
            step = jnp.maximum(step, jax.lax.div(of_block(hidden_refs[0]), width))
        return layer_ref[0], row, jnp.minimum(step, last), 0

    pool_spec, buffers = None, None
    if isinstance(pool, tpu_pages.Arrays):
        pool_spec, buffers = pool.specs(), tpu_pages.Buffers.shapes(width, pool.pieces_LPNW)
    elif pool is not None:
        pool_spec = pl.BlockSpec((None, None, width, dim), entry_block)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, rows, dim), _query_block),
            resident(heads, LANES),
            (_per_query(block), _per_query(block) if has_hidden else None),
            window_specs,
            pool_spec,
        ],
        # The same for all steps of a block of queries, so that it stays in VMEM until the last.
        out_specs=pl.BlockSpec((None, rows, dim), _query_block),
        scratch_shapes=[
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, dim), jnp.float32),
            buffers,
        ],
    )


def _query_block(query_block: Any, row: Any, step: Any, *_: Any) -> Any:
    return row, query_block, 0


def _batch_row(query_block: Any, row: Any, step: Any, *_: Any) -> Any:
    return row, 0, 0


def _stacked_query_block(query_block: Any, row: Any, step: Any, *_: Any) -> Any:
    return row, query_block, 0, 0


def _per_query(block: int) -> pl.BlockSpec:
    """Spec of an array [B, N, 1, Q]."""
    return pl.BlockSpec((None, None, 1, block), _stacked_query_block)


def _hidden_of_blocks(
    visible_BN1Q: Int[Array, "B N 1 Q"], hidden_BN1Q: Int[Array, "B N 1 Q"]
) -> tuple[Int[Array, " M"], Int[Array, " M"]]:
    """Per block: the first entry that some query sees, and the largest `hidden` of its queries."""
    seen_BN1Q = jnp.where(hidden_BN1Q < visible_BN1Q, hidden_BN1Q, jnp.max(visible_BN1Q))
    flat = lambda x_BN: x_BN.reshape(-1)
    return flat(jnp.min(seen_BN1Q, axis=(2, 3))), flat(jnp.max(hidden_BN1Q, axis=(2, 3)))


def _kernel(
    layer_ref: Any,  # [1] in scalar memory, like the next four
    start_ref: Any,  # [B]
    most_ref: Any,  # [B x N], a block's largest `visible`
    least_ref: Any,  # [B x N], its smallest
    hidden_refs: Any,  # `_hidden_of_blocks`, or None
    q_ref: Any,  # [R, K]
    sink_ref: Any,  # [H, W]
    bounds_refs: Any,  # [1, Q] of visible and of hidden, or None
    window_refs: Any,
    pool_refs: Any,  # [S, K], or `tpu_pages.Arrays`, or None
    out_ref: Any,  # [R, K]
    largest_ref: Any,  # [R, W], the same in all lanes
    total_ref: Any,  # [R, W], to be summed over lanes
    value_ref: Any,  # [R, K]
    buffers: Any,  # `tpu_pages.Buffers`, or None
    *,
    read_window: Callable[..., Any],
    blocks: int,
    heads: int,
    scale: float,
) -> None:
    i, b, s = (pl.program_id(axis) for axis in range(3))
    state = largest_ref, total_ref, value_ref
    of_block = lambda refs: jax.tree.map(lambda ref: ref[b * blocks + i], refs)
    seen = _Seen(of_block(most_ref), of_block(least_ref), of_block(hidden_refs), bounds_refs)
    rows = _Rows(q_ref, seen, state, heads, scale)
    pages = None
    if buffers is not None:
        pieces_ref = pool_refs.pieces_LPNW.at[layer_ref[0]]
        table_ref = pool_refs.table_B11M
        first = 0 if seen.hidden is None else seen.hidden[0]
        pages = tpu_pages.Pages(pieces_ref, table_ref, buffers, first, seen.most)
        pages.start()

    @pl.when(s == 0)
    def _window() -> None:
        begin(sink_ref, *state)
        keys_YK, mask_RY = read_window(window_refs, i, start_ref[b])
        add(jnp.where(mask_RY, logits(q_ref[...], keys_YK, scale), -jnp.inf), keys_YK, *state)

    if pages is not None:
        pages.each_block(rows.add_block)
    elif pool_refs is not None:
        rows.add_block(s * pool_refs.shape[0], pool_refs)

    @pl.when(s == pl.num_programs(2) - 1)
    def _finish() -> None:
        total_R1 = jnp.sum(total_ref[...], axis=1, keepdims=True)
        out_ref[...] = (value_ref[...] / total_R1).astype(out_ref.dtype)


class _Seen(NamedTuple):
    """What a block of queries sees.

    Attributes:
      most, least: the largest `visible` of its queries, and the smallest.
      hidden: the block's `_hidden_of_blocks`, or None.
      bounds_refs: each query's `visible` and `hidden`, [1, Q]; the latter may be None.
    """

    most: Any
    least: Any
    hidden: Any
    bounds_refs: Any


class _Rows(NamedTuple):
    """The rows of a block of queries, and the state of their softmax."""

    q_ref: Any
    seen: _Seen
    state: tuple[Any, Any, Any]
    heads: int
    scale: float

    def add_block(self, first: Any, keys_ref: Any) -> None:
        """Add the entries [S, K] from number `first` on, if some query sees one of them."""
        q_ref, (most, least, hidden, bounds_refs), state, heads, scale = self
        width = keys_ref.shape[0]
        all_seen = first + width <= least
        if hidden is not None:
            all_seen &= first >= hidden[1]

        @pl.when(all_seen)
        def _unmasked_block() -> None:
            add(logits(q_ref[...], keys_ref[...], scale), keys_ref[...], *state)

        some_seen = (first < most) & (first + width > least)
        if hidden is not None:
            some_seen = (first < most) & (first + width > hidden[0]) & jnp.logical_not(all_seen)

        @pl.when(some_seen)
        def _masked_block() -> None:
            index_S1 = first + jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0)
            keys_SK = where_seen(keys_ref[...], _any_query_sees(index_S1, bounds_refs, most))
            bounds_R1 = [ref if ref is None else per_row(ref[...], heads) for ref in bounds_refs]
            index_1S = first + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
            logits_RS = logits(q_ref[...], keys_SK, scale)
            add(jnp.where(_between(index_1S, *bounds_R1), logits_RS, -jnp.inf), keys_SK, *state)


def _any_query_sees(index_S1: Int[Array, "S 1"], refs: Any, most: Any) -> Bool[Array, "S 1"]:
    visible_ref, hidden_ref = refs
    if hidden_ref is None:
        return index_S1 < most
    return any_row_sees(_between(index_S1, visible_ref[...], hidden_ref[...]))


def _between(index: Any, visible: Any, hidden: Any) -> Any:
    below = index < visible
    return below if hidden is None else below & (index >= hidden)
