"""Gradients of a chunk's attention on TPUs: to the window, to entries of a pool, and to a sink.

A grid step takes a block of queries with all their heads as rows (`tpu_attention_pull`). The layer
of the pool and the sum of its gradient lie in VMEM from first to last. The window's sum does for a
group of blocks; groups overlap, and are added after. There are two sums of the pool, of every other
group each, for chips whose two cores share a grid.

Axis letters: B batch, T queries, X = window + T keys of the chunk's window, H heads, K channels,
L layers, S entries; N blocks, Q queries of a block, R = Q x H its rows, query after query, Y keys
of its window, G groups, A keys of a group's window, P sums of the pool.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.implementations import Unsupported
from pallas_kernels.tpu_attention_pull import (
    ENTRIES,
    FEW,
    LOG2_E,
    Inputs,
    Outputs,
    Scratch,
    Seen,
    Sizes,
    kernel,
    lowest,
)

_ROWS = 1024
_GROUP = 256
_WINDOW = 1024
_TILE = 16
# Of VMEM: for the pool and its gradient, and the same with logits kept.
_POOL_BYTES = 24 * 2**20
_VMEM_BYTES = 56 * 2**20
_LOWEST = -1e30
_NOWHERE = 2**31 - 1


def queries_of_a_block(queries: int, heads: int, most: int) -> int:
    """A power of two up to `most`, or all queries."""
    most = max(1, min(most, _ROWS // heads))
    return min(queries, 2 ** (most.bit_length() - 1))


def blocks_of(x: Int[Array, "B T *rest"], block: int, *, fill: int) -> Int[Array, "B N Q *rest"]:
    """Cut into blocks of queries; those beyond the last hold `fill`."""
    batch, queries = x.shape[:2]
    x = _pad(x, 1, -queries % block, fill)
    return x.reshape(batch, -1, block, *x.shape[2:])


def gradients(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    chunk: Any,
    seen: Seen | None,
    *,
    block: int,
    window: int,
    scale: float,
    name: str,
) -> Gradients:
    """Of queries, window, pool (of other layers than this one 0) and sink.

    Args:
      grad_BTHK: the output's gradient.
      out_BTHK: the output.
      chunk: the inputs of dense or sparse attention's `prefill`.
      seen: which entries; None without a pool.
      block: queries of a block.
      window: tokens that a query sees.
      scale: of the logits.
      name: the kernel's.
    Raises:
      Unsupported: too many heads, a long window, or a pool that VMEM does not hold.
    """
    q_BTHK = chunk.q_BTHK
    batch, queries, heads, dim = q_BTHK.shape
    sizes = _sizes(q_BTHK, chunk.pool_LBSK, block, window)
    inputs = _inputs(sizes, grad_BTHK, out_BTHK, chunk, seen)
    settings = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    )
    (found,) = pl.pallas_call(
        functools.partial(kernel, sizes=sizes, seen=seen, scale=scale),
        grid_spec=_grid(sizes, batch, dim, q_BTHK.dtype, seen, bounded=inputs.low is not None),
        out_shape=(_out_shapes(sizes, batch, dim, q_BTHK.dtype),),
        compiler_params=settings,
        name=name,
    )(chunk.layer.astype(jnp.int32).reshape(1), chunk.start_B.astype(jnp.int32), inputs)
    window_grad = _overlapped(found.window, sizes.group * block)[:, : window + queries]
    sink_grad_R = jnp.sum(found.sink, axis=(0, 1, 2))
    return Gradients(
        found.q.reshape(batch, -1, heads, dim)[:, :queries],
        window_grad.astype(chunk.window_BXK.dtype),
        _of_stack(found.pool, chunk.pool_LBSK, chunk.layer),
        jnp.sum(sink_grad_R.reshape(block, heads), axis=0).astype(chunk.sink_H.dtype),
    )


def _pad(x: Array, axis: int, by: int, fill: int = 0) -> Array:
    """Fill up at the end."""
    widths = [(0, by if d == axis else 0) for d in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if by else x


def _sizes(q_BTHK: Any, pool_LBSK: Any, block: int, window: int) -> Sizes:
    _, queries, heads, dim = q_BTHK.shape
    if block < min(8, queries) or window > _WINDOW:
        raise Unsupported(
            f"the gradient of attention on TPUs takes {_ROWS // 8} heads and a window of {_WINDOW},"
            f" not {heads} and {window}."
        )
    entries = 0 if pool_LBSK is None else pool_LBSK.shape[2]
    each = dim * (q_BTHK.dtype.itemsize + 4)
    if (entries > ENTRIES and entries % _TILE) or entries * each > _POOL_BYTES:
        raise Unsupported(
            f"the gradient of attention on TPUs takes a multiple of {_TILE} entries, at most "
            f"{_POOL_BYTES // each} of {dim} channels, not {entries}."
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
    seen: Seen | None,
) -> Inputs:
    """Whole blocks, with the heads of a query as rows."""
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
        low=None if first_BT is None else _of_rows(first_BT, chunk.start_B, sizes),
        seen=None if seen is None else seen.array,
        pool=chunk.pool_LBSK,
    )


def _of_rows(
    first_BT: Int[Array, "B T"], start_B: Int[Array, " B"], sizes: Sizes
) -> Int[Array, "B N 1 R"]:
    """The first key of the chunk's window that each row may see; none beyond the last query."""
    low_BNQ = blocks_of(lowest(first_BT, start_B, sizes.window), sizes.block, fill=_NOWHERE)
    return jnp.repeat(low_BNQ, sizes.heads, axis=2)[:, :, None]


def _out_shapes(sizes: Sizes, batch: int, dim: int, dtype: Any) -> Outputs:
    array = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    return Outputs(
        q=array(batch, sizes.blocks * sizes.rows, dim, dtype=dtype),
        window=array(batch, sizes.groups, sizes.group_keys, dim),
        pool=array(sizes.parts, batch, sizes.entries, dim) if sizes.entries else None,
        sink=array(batch, sizes.blocks, 1, sizes.rows),
    )


def _grid(
    sizes: Sizes, batch: int, dim: int, dtype: Any, seen: Seen | None, *, bounded: bool
) -> pltpu.PrefetchScalarGridSpec:
    """Parts, rows of the batch, and a part's blocks."""
    entries, once = sizes.entries, pl.Buffered(1)
    block = lambda p, b, s, *_: (b, sizes.at(p, s), 0)
    group = lambda p, b, s, *_: (b, jax.lax.div(sizes.at(p, s), sizes.group), 0, 0)
    near = lambda p, b, s, *_: (b, pl.multiple_of(sizes.at(p, s) * sizes.block, 8), 0)
    per_block = lambda *dims: pl.BlockSpec((None, None, *dims), lambda *at: (*block(*at), 0))
    rows = pl.BlockSpec((None, sizes.rows, dim), block)
    constant = pl.BlockSpec((1, sizes.rows), lambda p, b, s, *_: (0, 0))
    pool = lambda at: pl.BlockSpec((None, None, entries, dim), at, pipeline_mode=once)
    inputs = Inputs(
        q=rows,
        grad=rows,
        out=rows,
        sink=constant,
        query=constant,
        window=pl.BlockSpec((None, pl.Element(sizes.near), pl.Element(dim)), near),
        low=per_block(1, sizes.rows) if bounded else None,
        seen=None if seen is None else per_block(*seen.array.shape[2:]),
        pool=pool(lambda p, b, s, layer_1, *_: (layer_1[0], b, 0, 0)) if entries else None,
    )
    outputs = Outputs(
        q=rows,
        window=pl.BlockSpec((None, None, sizes.group_keys, dim), group),
        pool=pool(lambda p, b, s, *_: (p, b, 0, 0)) if entries else None,
        sink=per_block(1, sizes.rows),
    )
    scratch = Scratch(
        q=pltpu.VMEM((sizes.rows, dim), jnp.float32),
        logits=_kept(sizes, dim, dtype),
        seen=() if seen is None else seen.scratch,
    )
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(sizes.parts, batch, sizes.blocks // sizes.parts),
        in_specs=(inputs,),
        out_specs=(outputs,),
        scratch_shapes=(scratch,),
    )


def _kept(sizes: Sizes, dim: int, dtype: Any) -> Any:
    """Room for the logits of all entries, if there is."""
    each = dim * (dtype.itemsize + 4) + sizes.rows * 4
    if sizes.entries <= FEW or sizes.entries * each > _POOL_BYTES:
        return None
    steps = pl.cdiv(sizes.entries, sizes.width)
    return pltpu.VMEM((steps, sizes.width, sizes.rows), jnp.float32)


def _overlapped(parts_BGAK: Float32[Array, "B G A K"], group: int) -> Float32[Array, "B _ K"]:
    """Sum of the groups' windows, each of which begins `group` keys after the last."""
    batch, groups, keys, dim = parts_BGAK.shape
    if groups == 1:
        return parts_BGAK[:, 0]
    own, more = parts_BGAK[:, :, :group], parts_BGAK[:, :, group:]
    body = own.at[:, 1:, : keys - group].add(more[:, :-1])
    return jnp.concatenate([body.reshape(batch, groups * group, dim), more[:, -1]], axis=1)


def _of_stack(parts_PBSK: Any, pool_LBSK: Any, layer: Any) -> Any:
    """Other layers of the stack get 0."""
    if pool_LBSK is None:
        return None
    grad_BSK = jnp.sum(parts_PBSK, axis=0).astype(pool_LBSK.dtype)
    return jax.lax.dynamic_update_index_in_dim(jnp.zeros_like(pool_LBSK), grad_BSK, layer, 0)
