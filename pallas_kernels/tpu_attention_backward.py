"""Gradients of a chunk's attention on TPUs: to the window, to entries of a pool, and to a sink.

A grid step takes a block of queries with all their heads as rows (`tpu_attention_pull`). The
pool's layer and the sum of its gradient stay in VMEM for all blocks of a batch row, the sum of the
window's gradient for a group of blocks; the groups' windows overlap and are added afterwards. The
pool has two sums, each over every other group, for chips whose two cores share a grid.

Axis letters: B batch, T queries, X = window + T keys of the chunk's window, H heads, K channels,
L layers, S entries; N blocks, Q queries per block, R = Q x H its rows, query by query, Y keys of
its window, G groups, A keys of a group's window, P sums of the pool.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import resident
from pallas_kernels.tpu_attention_pull import (
    ENTRIES,
    FEW,
    LOG2_E,
    Inputs,
    Outputs,
    Scratch,
    Sizes,
    Visibility,
    kernel,
    lowest_key,
)

_ROWS = 1024
_GROUP = 256
_WINDOW = 1024
_TILE = 16
# VMEM for the pool and its gradient (and its logits, if they fit too), and for the entire kernel.
_POOL_BYTES = 24 * 2**20
_VMEM_BYTES = 56 * 2**20
_LOWEST = -1e30
_NOWHERE = 2**31 - 1


def queries_per_block(queries: int, heads: int, most: int) -> int:
    """The block size: a power of two up to `most`, or all queries."""
    most = max(1, min(most, _ROWS // heads))
    return min(queries, 2 ** (most.bit_length() - 1))


def blocks_of(x: Int[Array, "B T *rest"], block: int, *, fill: int) -> Int[Array, "B N Q *rest"]:
    """Split into blocks of queries, padded at the end with `fill`."""
    batch, queries = x.shape[:2]
    x = _pad(x, 1, -queries % block, fill)
    return x.reshape(batch, -1, block, *x.shape[2:])


def gradients(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    chunk: Any,
    visibility: Visibility | None,
    *,
    block: int,
    window: int,
    scale: float,
    name: str,
) -> Gradients:
    """Gradients of queries, window, pool (0 in the other layers) and sink.

    `chunk` has the inputs of dense or sparse attention's `prefill`, and `visibility` says which
    entries each query sees; None without a pool. `block` is the number of queries per block.

    Raises:
      Unsupported: too many heads, too long a window, or a pool that does not fit in VMEM.
    """
    q_BTHK = chunk.q_BTHK
    batch, queries, heads, dim = q_BTHK.shape
    sizes = _sizes(q_BTHK, chunk.pool_LBSK, block, window)
    inputs = _inputs(sizes, grad_BTHK, out_BTHK, chunk, visibility)
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    )
    (outputs,) = pl.pallas_call(
        functools.partial(kernel, sizes=sizes, visibility=visibility, scale=scale),
        grid_spec=_grid(
            sizes, batch, dim, q_BTHK.dtype, visibility, bounded=inputs.low is not None
        ),
        out_shape=(_out_shapes(sizes, batch, dim, q_BTHK.dtype),),
        compiler_params=params,
        name=name,
    )(chunk.layer.astype(jnp.int32).reshape(1), chunk.start_B.astype(jnp.int32), inputs)
    window_grad = _overlapped(outputs.window, sizes.group * block)[:, : window + queries]
    sink_grad_R = jnp.sum(outputs.sink, axis=(0, 1, 2))
    return Gradients(
        outputs.q.reshape(batch, -1, heads, dim)[:, :queries],
        window_grad.astype(chunk.window_BXK.dtype),
        _of_stack(outputs.pool, chunk.pool_LBSK, chunk.layer),
        jnp.sum(sink_grad_R.reshape(block, heads), axis=0).astype(chunk.sink_H.dtype),
    )


def _pad(x: Array, axis: int, by: int, fill: int = 0) -> Array:
    """Pad one axis at the end."""
    widths = [(0, by if d == axis else 0) for d in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if by else x


def _sizes(q_BTHK: Any, pool_LBSK: Any, block: int, window: int) -> Sizes:
    _, queries, heads, dim = q_BTHK.shape
    if block < min(8, queries) or window > _WINDOW:
        raise Unsupported(
            f"The gradient of attention on TPUs takes up to {_ROWS // 8} heads and a window of up "
            f"to {_WINDOW}, not {heads} and {window}."
        )
    entries = 0 if pool_LBSK is None else pool_LBSK.shape[2]
    entry_bytes = dim * (q_BTHK.dtype.itemsize + 4)
    if (entries > ENTRIES and entries % _TILE) or entries * entry_bytes > _POOL_BYTES:
        raise Unsupported(
            f"The gradient of attention on TPUs takes a multiple of {_TILE} entries, at most "
            f"{_POOL_BYTES // entry_bytes} of {dim} channels, not {entries}."
        )
    blocks = pl.cdiv(queries, block)
    group = pl.cdiv(max(_GROUP, window + _TILE), block)
    return Sizes(
        block=block,
        heads=heads,
        blocks=blocks,
        group=min(group, blocks),
        parts=1 if blocks % (2 * group) else 2,
        window=window,
        near=pl.cdiv(block + window, _TILE) * _TILE,
        entries=entries,
    )


def _inputs(
    sizes: Sizes,
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    chunk: Any,
    visibility: Visibility | None,
) -> Inputs:
    """The kernel's arrays, padded to full blocks, with the heads of a query as rows."""
    batch, queries, heads, dim = grad_BTHK.shape
    block, first_BT = sizes.block, chunk.first_BT
    in_rows = lambda x_BTHK: _pad(x_BTHK, 1, -queries % block).reshape(batch, -1, dim)
    last = (sizes.blocks - 1) * block + sizes.near
    sink_H2 = jnp.maximum(chunk.sink_H.astype(jnp.float32) * LOG2_E, _LOWEST)
    return Inputs(
        q=in_rows(chunk.q_BTHK),
        grad=in_rows(grad_BTHK),
        out=in_rows(out_BTHK),
        sink=jnp.tile(sink_H2, block)[None],
        query=jnp.repeat(jnp.arange(block, dtype=jnp.int32), heads)[None],
        window=_pad(chunk.window_BXK, 1, last - chunk.window_BXK.shape[1]),
        low=None if first_BT is None else _low_of_rows(first_BT, chunk.start_B, sizes),
        visible=None if visibility is None else visibility.array,
        pool=chunk.pool_LBSK,
    )


def _low_of_rows(
    first_BT: Int[Array, "B T"], start_B: Int[Array, " B"], sizes: Sizes
) -> Int[Array, "B N 1 R"]:
    """The first key of the chunk's window that each row may see; padding rows see none."""
    low_BNQ = blocks_of(lowest_key(first_BT, start_B, sizes.window), sizes.block, fill=_NOWHERE)
    return jnp.repeat(low_BNQ, sizes.heads, axis=2)[:, :, None]


def _out_shapes(sizes: Sizes, batch: int, dim: int, dtype: Any) -> Outputs:
    array = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    return Outputs(
        q=array(batch, sizes.blocks * sizes.rows, dim, dtype=dtype),
        window=array(batch, sizes.groups, sizes.group_keys, dim),
        pool=array(sizes.parts, batch, sizes.entries, dim) if sizes.entries else None,
        sink=array(batch, sizes.blocks, 1, sizes.rows),
    )


@dataclasses.dataclass(frozen=True)
class _IndexMaps:
    """Which block of each array a grid step holds; steps walk over parts, batch rows, blocks."""

    sizes: Sizes

    def query_block(self, part: Any, row: Any, step: Any, *_: Any) -> Any:
        return row, self.sizes.block_at(part, step), 0

    def stacked_query_block(self, part: Any, row: Any, step: Any, *_: Any) -> Any:
        """For arrays [B, N, _, _], whose blocks are an axis of their own."""
        return row, self.sizes.block_at(part, step), 0, 0

    def window_keys(self, part: Any, row: Any, step: Any, *_: Any) -> Any:
        """Indexed by key, not by block: the windows of neighbouring blocks overlap."""
        first = pl.multiple_of(self.sizes.block_at(part, step) * self.sizes.block, 8)
        return row, first, 0

    def window_sum(self, part: Any, row: Any, step: Any, *_: Any) -> Any:
        """The same for all blocks of a group, so that their sum stays in VMEM."""
        return row, jax.lax.div(self.sizes.block_at(part, step), self.sizes.group), 0, 0

    def pool_layer(self, part: Any, row: Any, step: Any, layer_1: Any, *_: Any) -> Any:
        """The same for all blocks of a batch row, so that the layer is fetched once."""
        return layer_1[0], row, 0, 0

    def pool_sum(self, part: Any, row: Any, step: Any, *_: Any) -> Any:
        """The same for all blocks of a part and batch row, so that their sum stays in VMEM."""
        return part, row, 0, 0


def _grid(
    sizes: Sizes, batch: int, dim: int, dtype: Any, visibility: Visibility | None, *, bounded: bool
) -> pltpu.PrefetchScalarGridSpec:
    """The grid: parts, rows of the batch, blocks of a part."""
    entries, maps = sizes.entries, _IndexMaps(sizes)
    per_block = lambda *dims: pl.BlockSpec((None, None, *dims), maps.stacked_query_block)
    rows = pl.BlockSpec((None, sizes.rows, dim), maps.query_block)
    # Single-buffered: the next block is needed only when the batch row changes.
    pool = lambda index_map: pl.BlockSpec(
        (None, None, entries, dim), index_map, pipeline_mode=pl.Buffered(1)
    )
    inputs = Inputs(
        q=rows,
        grad=rows,
        out=rows,
        sink=resident(1, sizes.rows),
        query=resident(1, sizes.rows),
        window=pl.BlockSpec((None, pl.Element(sizes.near), pl.Element(dim)), maps.window_keys),
        low=per_block(1, sizes.rows) if bounded else None,
        visible=None if visibility is None else per_block(*visibility.array.shape[2:]),
        pool=pool(maps.pool_layer) if entries else None,
    )
    outputs = Outputs(
        q=rows,
        window=pl.BlockSpec((None, None, sizes.group_keys, dim), maps.window_sum),
        pool=pool(maps.pool_sum) if entries else None,
        sink=per_block(1, sizes.rows),
    )
    scratch = Scratch(
        q=pltpu.VMEM((sizes.rows, dim), jnp.float32),
        logits=_logits_scratch(sizes, dim, dtype),
        visible=() if visibility is None else visibility.scratch,
    )
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(sizes.parts, batch, sizes.blocks // sizes.parts),
        in_specs=(inputs,),
        out_specs=(outputs,),
        scratch_shapes=(scratch,),
    )


def _logits_scratch(sizes: Sizes, dim: int, dtype: Any) -> Any:
    """Scratch for the logits of all entries; None if they do not fit."""
    entry_bytes = dim * (dtype.itemsize + 4) + sizes.rows * 4
    if sizes.entries <= FEW or sizes.entries * entry_bytes > _POOL_BYTES:
        return None
    steps = pl.cdiv(sizes.entries, sizes.width)
    return pltpu.VMEM((steps, sizes.width, sizes.rows), jnp.float32)


def _overlapped(parts_BGAK: Float32[Array, "B G A K"], group: int) -> Float32[Array, "B _ K"]:
    """Sum of the groups' windows, each of which starts `group` keys after the one before."""
    batch, groups, keys, dim = parts_BGAK.shape
    if groups == 1:
        return parts_BGAK[:, 0]
    head, tail = parts_BGAK[:, :, :group], parts_BGAK[:, :, group:]
    body = head.at[:, 1:, : keys - group].add(tail[:, :-1])
    return jnp.concatenate([body.reshape(batch, groups * group, dim), tail[:, -1]], axis=1)


def _of_stack(parts_PBSK: Any, pool_LBSK: Any, layer: Any) -> Any:
    """Gradient of the stack, 0 in the other layers."""
    if pool_LBSK is None:
        return None
    grad_BSK = jnp.sum(parts_PBSK, axis=0).astype(pool_LBSK.dtype)
    return jax.lax.dynamic_update_index_in_dim(jnp.zeros_like(pool_LBSK), grad_BSK, layer, 0)
