"""Gradients, a block of queries at a time: logits are recomputed, never stored.

Axis letters: as in the package; Q queries per block, Y keys of its window, R = Q x H rows, query
by query.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.dense_attention.xla_blocks import NOWHERE, band, where_seen
from pallas_kernels.sparse_attention import xla_blocks as blocks
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool


def decode_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: DecodeInputs,
    *,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool (None for Fp8Rows) and sink."""
    pool, layer, dtype = inputs.pool_LBSK, inputs.layer, inputs.window_BRK.dtype

    def row_gradients(carry: Any, row: Any) -> Any:
        pool_grad, sink_grad_H = carry
        heads = (inputs.q_BTHK[row], grad_BTHK[row], out_BTHK[row], inputs.sink_H)
        near = (inputs.window_BRK[row], inputs.window_mask_BTR[row])
        far = blocks.Entries(pool, layer, row, inputs.indices_BTk[row], dtype)
        q_grad, window_grad_RK, pool_grad, add_H = _block(heads, near, far, pool_grad, scale)
        return (pool_grad, sink_grad_H + add_H), (q_grad, window_grad_RK)

    empty = _empty(pool), jnp.zeros(inputs.sink_H.shape, jnp.float32)
    rows_B = jnp.arange(inputs.q_BTHK.shape[0], dtype=jnp.int32)
    (pool_grad, sink_grad_H), (q_grad, window_grad) = jax.lax.scan(row_gradients, empty, rows_B)
    return Gradients(
        q_grad.astype(inputs.q_BTHK.dtype),
        window_grad.astype(dtype),
        _of_stack(pool_grad, pool, layer),
        sink_grad_H.astype(inputs.sink_H.dtype),
    )


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: PrefillInputs,
    *,
    window: int,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool (None for Fp8Rows) and sink."""
    batch, queries, head_count, dim = inputs.q_BTHK.shape
    pool, layer, dtype = inputs.pool_LBSK, inputs.layer, inputs.window_BXK.dtype
    all_entries = blocks.against_all(pool, inputs.indices_BTk.shape[2])
    block, count, pad = blocks.split(queries, head_count, all_entries=all_entries)
    arrays = (inputs.q_BTHK, grad_BTHK, out_BTHK, inputs.window_BXK)
    q, grad, out, keys = (pad(x, 0) for x in arrays)
    indices, firsts = pad(inputs.indices_BTk, -1), inputs.first_BT
    firsts = None if firsts is None else pad(firsts.astype(jnp.int32), NOWHERE)

    def block_gradients(carry: Any, index: Any) -> Any:
        window_grad, pool_grad, sink_grad_H = carry
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        first_Q = jax.tree.map(take, firsts)
        mask_QY = band(inputs.start_B[row] - window + first, block, window, first_Q)
        near = (take(keys, block + window), mask_QY)
        far = blocks.Entries(pool, layer, row, take(indices), dtype)
        heads = (take(q), take(grad), take(out), inputs.sink_H)
        q_grad, add_YK, pool_grad, add_H = _block(
            heads, near, far, pool_grad, scale, all_entries=all_entries
        )
        at = (row, first, jnp.zeros_like(first))
        before_YK = jax.lax.dynamic_slice(window_grad, at, (1, *add_YK.shape))[0]
        window_grad = jax.lax.dynamic_update_slice(window_grad, (before_YK + add_YK)[None], at)
        return (window_grad, pool_grad, sink_grad_H + add_H), q_grad

    empty = (
        jnp.zeros(keys.shape, jnp.float32),
        _empty(pool),
        jnp.zeros(inputs.sink_H.shape, jnp.float32),
    )
    steps = jnp.arange(batch * count, dtype=jnp.int32)
    (window_grad, pool_grad, sink_grad_H), q_grad = jax.lax.scan(block_gradients, empty, steps)
    q_grad = q_grad.reshape(batch, count * block, head_count, dim)[:, :queries]
    return Gradients(
        q_grad.astype(inputs.q_BTHK.dtype),
        window_grad[:, : window + queries].astype(dtype),
        _of_stack(pool_grad, pool, layer),
        sink_grad_H.astype(inputs.sink_H.dtype),
    )


def _block(
    heads: Any,
    near: Any,
    far: blocks.Entries,
    pool_grad: Any,
    scale: float,
    *,
    all_entries: bool = False,
) -> Any:
    """Gradients of a block's queries and window, of the pool so far, and of the sinks."""
    (q_QHK, grad_QHK, out_QHK, sink_H), (window_YK, mask_QY) = heads, near
    queries, head_count, _ = q_QHK.shape
    window_YK = where_seen(window_YK, jnp.any(mask_QY, axis=0))
    mask_RY = jnp.repeat(mask_QY, head_count, axis=0)
    sink_QH = jnp.broadcast_to(sink_H.astype(jnp.float32)[None], (queries, head_count))
    delta_QH = jnp.sum(grad_QHK.astype(jnp.float32) * out_QHK.astype(jnp.float32), axis=-1)

    q_RK, grad_RK = _as_rows(q_QHK), _as_rows(grad_QHK)
    entries = (_All if all_entries else _Listed)(far, q_QHK, scale)
    total = softmax.merge(softmax.part(q_RK, window_YK, mask_RY, scale), entries.part())
    log_total_R = softmax.log_total(total, _as_rows(sink_QH))

    terms = softmax.RowTerms(log_total_R, grad_RK, _as_rows(delta_QH))
    near_grad_RK, window_grad_YK = softmax.pull(q_RK, window_YK, mask_RY, scale, terms)
    far_grad_RK, pool_grad = entries.pull(terms, pool_grad)
    sink_grad_QH = jnp.exp(sink_QH - log_total_R.reshape(sink_QH.shape)) * delta_QH
    q_grad_QHK = (near_grad_RK + far_grad_RK).reshape(q_QHK.shape).astype(q_QHK.dtype)
    return q_grad_QHK, window_grad_YK, pool_grad, -jnp.sum(sink_grad_QH, axis=0)


class _All:
    """All entries of a batch row, under a mask."""

    def __init__(self, far: blocks.Entries, q_QHK: Array, scale: float) -> None:
        self.row = far.row
        entries_SK, seen_QS = far.all()
        mask_RS = jnp.repeat(seen_QS, q_QHK.shape[1], axis=0)
        self.args = _as_rows(q_QHK), entries_SK, mask_RS, scale

    def part(self) -> softmax.Part:
        return softmax.part(*self.args)

    def pull(self, terms: softmax.RowTerms, pool_grad: Any) -> Any:
        q_grad_RK, entries_grad_SK = softmax.pull(*self.args, terms)
        if pool_grad is not None:
            pool_grad = pool_grad.at[self.row].add(entries_grad_SK)
        return q_grad_RK, pool_grad


class _Listed:
    """Each query's own entries, gathered."""

    def __init__(self, far: blocks.Entries, q_QHK: Array, scale: float) -> None:
        self.row, self.indices_Qk = far.row, far.indices_Qk
        queries, heads, _ = q_QHK.shape
        self.q_QHK, self.scale = q_QHK, scale
        self.chosen_QkK = far.listed()
        self.mask_QHk = jnp.broadcast_to(
            (self.indices_Qk >= 0)[:, None], (queries, heads, self.indices_Qk.shape[1])
        )

    def part(self) -> softmax.Part:
        parts = functools.partial(softmax.part, scale=self.scale)
        return jax.tree.map(_as_rows, jax.vmap(parts)(self.q_QHK, self.chosen_QkK, self.mask_QHk))

    def pull(self, terms: softmax.RowTerms, pool_grad: Any) -> Any:
        as_queries = lambda x_R: x_R.reshape(*self.q_QHK.shape[:2], *x_R.shape[1:])
        pull = lambda q, keys, mask, terms: softmax.pull(q, keys, mask, self.scale, terms)
        terms = jax.tree.map(as_queries, terms)
        q_grad_QHK, chosen_grad = jax.vmap(pull)(self.q_QHK, self.chosen_QkK, self.mask_QHk, terms)
        if pool_grad is not None:
            pool_grad = pool_grad.at[self.row, jnp.maximum(self.indices_Qk, 0)].add(chosen_grad)
        return _as_rows(q_grad_QHK), pool_grad


def _as_rows(x_QH: Array) -> Array:
    """Heads as rows, query by query."""
    return x_QH.reshape(-1, *x_QH.shape[2:])


def _empty(pool: Pool) -> Any:
    """Zero gradient of one layer."""
    return None if isinstance(pool, Fp8Rows) else jnp.zeros(pool.shape[1:], jnp.float32)


def _of_stack(pool_grad: Any, pool: Any, layer: Int[Array, ""]) -> Any:
    """Gradient of the stack, 0 in the other layers."""
    if pool_grad is None:
        return None
    zeros = jnp.zeros(pool.shape, pool.dtype)
    return jax.lax.dynamic_update_index_in_dim(zeros, pool_grad.astype(pool.dtype), layer, 0)
