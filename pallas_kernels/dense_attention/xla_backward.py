"""Gradients in blocks of queries and entries: logits are recomputed, never stored.

With weights p of a query (the sink's included), output gradient g and output o,
d logit = p * (g . key - g . o). A key is also a value, so its gradient is
p * g + d logit * q * scale.

Axis letters: as in the package; Q queries per block, Y keys of its window, E entries per block,
R = H x Q rows, head by head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.dense_attention import xla_blocks as blocks
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.products import contract

_LOWEST = -1e30
# With 64 heads of 128 queries (8192 rows) the TPU compiler takes 75 s, with 1024 rows 7 s.
_ROWS = 1024


def decode_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: DecodeInputs,
    *,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink."""

    def row_gradients(carry: Any, row: Any) -> Any:
        pool_grad, sink_grad_H = carry
        mask_TR = inputs.window_mask_BTR[row]
        rows = _rows(inputs.q_BTHK[row], grad_BTHK[row], out_BTHK[row], inputs.sink_H, scale)
        near = blocks.where_seen(inputs.window_BRK[row], jnp.any(mask_TR, axis=0)), mask_TR
        bounds = blocks.Bounds(inputs.visible_BT[row])
        far = blocks.Entries(inputs.pool_LBSK, inputs.layer, row, bounds)
        q_grad, window_grad_RK, pool_grad, add_H = _block(rows, near, far, pool_grad)
        return (pool_grad, sink_grad_H + add_H), (q_grad, window_grad_RK)

    empty = _empty(inputs.pool_LBSK), jnp.zeros(inputs.sink_H.shape, jnp.float32)
    rows_B = jnp.arange(inputs.q_BTHK.shape[0], dtype=jnp.int32)
    (pool_grad, sink_grad_H), (q_grad, window_grad) = jax.lax.scan(row_gradients, empty, rows_B)
    return Gradients(
        q_grad.astype(inputs.q_BTHK.dtype),
        window_grad.astype(inputs.window_BRK.dtype),
        _of_stack(pool_grad, inputs.pool_LBSK, inputs.layer),
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
    """Gradients of queries, window, pool and sink."""
    batch, queries, heads, dim = inputs.q_BTHK.shape
    most = max(1, min(blocks.QUERIES, _ROWS // heads))
    block, count, pad = blocks.split(queries, most)
    q, grad, out = map(pad, (inputs.q_BTHK, grad_BTHK, out_BTHK))
    bounds = blocks.Bounds(inputs.visible_BT, inputs.hidden_BT, inputs.first_BT).filled(pad)
    keys = pad(inputs.window_BXK)

    def block_gradients(carry: Any, index: Any) -> Any:
        window_grad, pool_grad, sink_grad_H = carry
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        block_bounds = jax.tree.map(take, bounds)
        position = inputs.start_B[row] - window + first
        mask_QY = blocks.band(position, block, window, block_bounds.first)
        near = blocks.where_seen(take(keys, block + window), jnp.any(mask_QY, axis=0)), mask_QY
        rows = _rows(take(q), take(grad), take(out), inputs.sink_H, scale)
        far = blocks.Entries(inputs.pool_LBSK, inputs.layer, row, block_bounds)
        q_grad, add_YK, pool_grad, add_H = _block(rows, near, far, pool_grad)
        window_grad = _add_at(window_grad, add_YK, row, first)
        return (window_grad, pool_grad, sink_grad_H + add_H), q_grad

    empty = (
        jnp.zeros(keys.shape, jnp.float32),
        _empty(inputs.pool_LBSK),
        jnp.zeros(inputs.sink_H.shape, jnp.float32),
    )
    indices = jnp.arange(batch * count, dtype=jnp.int32)
    (window_grad, pool_grad, sink_grad_H), q_grad = jax.lax.scan(block_gradients, empty, indices)
    q_grad = q_grad.reshape(batch, count * block, heads, dim)[:, :queries]
    return Gradients(
        q_grad.astype(inputs.q_BTHK.dtype),
        window_grad[:, : window + queries].astype(inputs.window_BXK.dtype),
        _of_stack(pool_grad, inputs.pool_LBSK, inputs.layer),
        sink_grad_H.astype(inputs.sink_H.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a block, as every set of keys needs them."""

    q_RK: Any
    grad_RK: Any
    delta_R: Any  # grad . output
    sink_R: Any
    scale: float


def _rows(q_QHK: Any, grad_QHK: Any, out_QHK: Any, sink_H: Any, scale: float) -> _Rows:
    delta_QH = jnp.sum(grad_QHK.astype(jnp.float32) * out_QHK.astype(jnp.float32), axis=-1)
    return _Rows(
        blocks.as_rows(q_QHK),
        blocks.as_rows(grad_QHK),
        delta_QH.T.reshape(-1),
        jnp.maximum(jnp.repeat(sink_H.astype(jnp.float32), q_QHK.shape[0]), _LOWEST),
        scale,
    )


def _block(rows: _Rows, near: Any, far: blocks.Entries, pool_grad: Any) -> Any:
    """Gradients of a block's queries [Q, H, K] and window, of the pool so far, and of sinks."""
    heads_of = lambda mask_QX: jnp.tile(mask_QX, (rows.q_RK.shape[0] // mask_QX.shape[0], 1))
    window_YK, mask_RY = near[0], heads_of(near[1])
    state = _add_to_sum(rows, window_YK, mask_RY, (rows.sink_R, jnp.ones_like(rows.sink_R)))
    visible_blocks = (0, 0) if far.pool_LBSK is None else far.blocks()

    def measure(i: Any, state: Any) -> Any:
        keys_EK, seen_QE, _ = far.of_block(i)
        return _add_to_sum(rows, keys_EK, heads_of(seen_QE), state)

    def pull(i: Any, carry: Any) -> Any:
        q_grad_RK, pool_grad = carry
        keys_EK, seen_QE, start = far.of_block(i)
        add_RK, keys_grad_EK = _pull(rows, keys_EK, heads_of(seen_QE), log_total_R)
        return q_grad_RK + add_RK, _add_at(pool_grad, keys_grad_EK, far.row, start)

    if far.pool_LBSK is not None:
        state = jax.lax.fori_loop(*visible_blocks, measure, state)
    log_total_R = state[0] + jnp.log(state[1])
    q_grad_RK, window_grad_YK = _pull(rows, window_YK, mask_RY, log_total_R)
    if far.pool_LBSK is not None:
        q_grad_RK, pool_grad = jax.lax.fori_loop(*visible_blocks, pull, (q_grad_RK, pool_grad))
    queries = far.bounds.visible.shape[0]
    sink_grad_R = -jnp.exp(rows.sink_R - log_total_R) * rows.delta_R
    return (
        blocks.as_queries(q_grad_RK, queries).astype(rows.q_RK.dtype),
        window_grad_YK,
        pool_grad,
        jnp.sum(sink_grad_R.reshape(-1, queries), axis=1),
    )


def _logits(
    rows: _Rows, keys_XK: Float[Array, "X K"], mask_RX: Bool[Array, "R X"]
) -> Float32[Array, "R X"]:
    return jnp.where(mask_RX, contract(rows.q_RK, keys_XK, 1, 1) * rows.scale, -jnp.inf)


def _add_to_sum(rows: _Rows, keys_XK: Any, mask_RX: Any, state: Any) -> Any:
    """Running maximum and sum of weights, updated with more keys."""
    before_R, total_R = state
    logits_RX = _logits(rows, keys_XK, mask_RX)
    largest_R = jnp.maximum(before_R, jnp.max(logits_RX, axis=1))
    weights_R = jnp.sum(jnp.exp(logits_RX - largest_R[:, None]), axis=1)
    return largest_R, total_R * jnp.exp(before_R - largest_R) + weights_R


def _pull(rows: _Rows, keys_XK: Any, mask_RX: Any, log_total_R: Any) -> Any:
    """These keys' part of the queries' gradient, and the gradient of the keys."""
    weights_RX = jnp.exp(_logits(rows, keys_XK, mask_RX) - log_total_R[:, None])
    towards_RX = contract(rows.grad_RK, keys_XK, 1, 1) - rows.delta_R[:, None]
    logits_grad_RX = (weights_RX * towards_RX * rows.scale).astype(keys_XK.dtype)
    keys_grad_XK = contract(weights_RX.astype(keys_XK.dtype), rows.grad_RK, 0, 0)
    keys_grad_XK += contract(logits_grad_RX, rows.q_RK, 0, 0)
    return contract(logits_grad_RX, keys_XK, 1, 0), keys_grad_XK


def _add_at(total: Any, part_XK: Float32[Array, "X K"], row: Any, start: Any) -> Any:
    """Add to X entries, from `start` on, of one batch row of [B, _, K]."""
    at = (row, start, jnp.zeros_like(start))
    old = jax.lax.dynamic_slice(total, at, (1, *part_XK.shape))
    return jax.lax.dynamic_update_slice(total, old + part_XK[None], at)


def _empty(pool_LBSK: Any) -> Any:
    return None if pool_LBSK is None else jnp.zeros(pool_LBSK.shape[1:], jnp.float32)


def _of_stack(grad_BSK: Any, pool_LBSK: Any, layer: Any) -> Any:
    """Gradient of the stack, 0 in the other layers."""
    if pool_LBSK is None:
        return None
    return jnp.zeros_like(pool_LBSK).at[layer].set(grad_BSK.astype(pool_LBSK.dtype))
