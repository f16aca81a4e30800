"""Gradients a few queries at a time: logits are computed anew, never kept.

Axis letters: as in the package; Q queries of a block, Y keys of its window, R = Q x H rows, query
by query.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.dense_attention.xla_blocks import NOWHERE, band, where_seen
from pallas_kernels.sparse_attention import xla_blocks as blocks
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool

Gradients = tuple[Any, Any, Any, Any]


def decode_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink; None of rows of bytes."""

    def one(carry: Any, row: Any) -> Any:
        pool_grad, sink_grad_H = carry
        heads = (q_BTHK[row], grad_BTHK[row], out_BTHK[row], sink_H)
        near = (window_BRK[row], window_mask_BTR[row])
        far = (pool_LBSK, layer, row, indices_BTk[row])
        q_grad, window_grad_RK, pool_grad, add_H = _block(heads, near, far, pool_grad, scale)
        return (pool_grad, sink_grad_H + add_H), (q_grad, window_grad_RK)

    empty = _empty(pool_LBSK), jnp.zeros(sink_H.shape, jnp.float32)
    rows_B = jnp.arange(q_BTHK.shape[0], dtype=jnp.int32)
    (pool_grad, sink_grad_H), (q_grad, window_grad) = jax.lax.scan(one, empty, rows_B)
    return (
        q_grad.astype(q_BTHK.dtype),
        window_grad.astype(window_BRK.dtype),
        _of_stack(pool_grad, pool_LBSK, layer),
        sink_grad_H.astype(sink_H.dtype),
    )


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    first_BT: Int[Array, "B T"] | None = None,
    *,
    window: int,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink; None of rows of bytes."""
    batch, queries = indices_BTk.shape[:2]
    block, count, pad = blocks.split(queries)
    q, grad, out, keys = (pad(x, 0) for x in (q_BTHK, grad_BTHK, out_BTHK, window_BXK))
    indices = pad(indices_BTk, -1)
    firsts = None if first_BT is None else pad(first_BT.astype(jnp.int32), NOWHERE)

    def one(carry: Any, index: Any) -> Any:
        window_grad, pool_grad, sink_grad_H = carry
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        first_Q = jax.tree.map(take, firsts)
        mask_QY = band(start_B[row] - window + first, block, window, first_Q)
        near = (take(keys, block + window), mask_QY)
        far = (pool_LBSK, layer, row, take(indices))
        heads = (take(q), take(grad), take(out), sink_H)
        q_grad, add_YK, pool_grad, add_H = _block(heads, near, far, pool_grad, scale)
        at = (row, first, jnp.zeros_like(first))
        before_YK = jax.lax.dynamic_slice(window_grad, at, (1, *add_YK.shape))[0]
        window_grad = jax.lax.dynamic_update_slice(window_grad, (before_YK + add_YK)[None], at)
        return (window_grad, pool_grad, sink_grad_H + add_H), q_grad

    empty = (
        jnp.zeros(keys.shape, jnp.float32),
        _empty(pool_LBSK),
        jnp.zeros(sink_H.shape, jnp.float32),
    )
    steps = jnp.arange(batch * count, dtype=jnp.int32)
    (window_grad, pool_grad, sink_grad_H), q_grad = jax.lax.scan(one, empty, steps)
    q_grad = q_grad.reshape(batch, count * block, *q_BTHK.shape[2:])[:, :queries]
    return (
        q_grad.astype(q_BTHK.dtype),
        window_grad[:, : window_BXK.shape[1]].astype(window_BXK.dtype),
        _of_stack(pool_grad, pool_LBSK, layer),
        sink_grad_H.astype(sink_H.dtype),
    )


def _block(heads: Any, near: Any, far: Any, pool_grad: Any, scale: float) -> Any:
    """Gradients of a block's queries and window, of the whole pool so far, of the sinks."""
    (q_QHK, grad_QHK, out_QHK, sink_H), (window_YK, mask_QY) = heads, near
    (pool_LBSK, layer, row, indices_Qk), (queries, head_count, _) = far, q_QHK.shape
    window_YK = where_seen(window_YK, jnp.any(mask_QY, axis=0))
    chosen_QkK = blocks.listed(pool_LBSK, layer, row, indices_Qk, window_YK.dtype)
    mask_RY = jnp.repeat(mask_QY, head_count, axis=0)
    mask_QHk = jnp.broadcast_to(
        (indices_Qk >= 0)[:, None], (queries, head_count, indices_Qk.shape[1])
    )
    sink_QH = jnp.broadcast_to(sink_H.astype(jnp.float32)[None], (queries, head_count))
    delta_QH = jnp.sum(grad_QHK.astype(jnp.float32) * out_QHK.astype(jnp.float32), axis=-1)

    as_rows = lambda x: x.reshape(queries * head_count, *x.shape[2:])
    q_RK, grad_RK = as_rows(q_QHK), as_rows(grad_QHK)
    parts = functools.partial(softmax.part, scale=scale)
    whole = softmax.merge(
        parts(q_RK, window_YK, mask_RY),
        jax.tree.map(as_rows, jax.vmap(parts)(q_QHK, chosen_QkK, mask_QHk)),
    )
    log_total_QH = softmax.log_total(whole, as_rows(sink_QH)).reshape(sink_QH.shape)

    near_grad_RK, window_grad_YK = softmax.pull(
        q_RK, window_YK, mask_RY, scale, as_rows(log_total_QH), grad_RK, as_rows(delta_QH)
    )
    pull = lambda q, keys, mask, total, grad, delta: softmax.pull(
        q, keys, mask, scale, total, grad, delta
    )
    far_grad_QHK, chosen_grad = jax.vmap(pull)(
        q_QHK, chosen_QkK, mask_QHk, log_total_QH, grad_QHK, delta_QH
    )
    if pool_grad is not None:
        pool_grad = pool_grad.at[row, jnp.maximum(indices_Qk, 0)].add(chosen_grad)
    sink_grad_H = -jnp.sum(jnp.exp(sink_QH - log_total_QH) * delta_QH, axis=0)
    q_grad_QHK = near_grad_RK.reshape(q_QHK.shape) + far_grad_QHK
    return q_grad_QHK.astype(q_QHK.dtype), window_grad_YK, pool_grad, sink_grad_H


def _empty(pool: Pool) -> Any:
    """What one layer's gradient starts from."""
    return None if isinstance(pool, Fp8Rows) else jnp.zeros(pool.shape[1:], jnp.float32)


def _of_stack(pool_grad: Any, pool: Any, layer: Int[Array, ""]) -> Any:
    """The other layers were not read."""
    if pool_grad is None:
        return None
    zeros = jnp.zeros(pool.shape, pool.dtype)
    return jax.lax.dynamic_update_index_in_dim(zeros, pool_grad.astype(pool.dtype), layer, 0)
