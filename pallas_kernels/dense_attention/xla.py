"""Attention in blocks of queries and entries, as a running softmax; time follows what is visible.

Axis letters: as in the package; Q queries of a block, Y keys of its window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax

# With 8 heads, products of 128 queries are large, and logits stay in the cache. More entries are no
# faster there, and slow a few queries down.
_QUERIES = 128
_ENTRIES = 256


def decode(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Float[Array, "L B S K"] | None,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    def one(row: Any) -> Any:
        mask_TR = window_mask_BTR[row]
        keys_RK = _where_seen(window_BRK[row], jnp.any(mask_TR, axis=0))
        return _attend(
            q_BTHK[row],
            keys_RK,
            mask_TR,
            pool_LBSK,
            layer,
            row,
            visible_BT[row],
            sink_H,
            scale,
        )

    return jax.lax.map(one, jnp.arange(q_BTHK.shape[0], dtype=jnp.int32))


def prefill(
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Float[Array, "L B S K"] | None,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    sink_H: Float[Array, " H"],
    *,
    window: int,
    scale: float,
) -> Float[Array, "B T H K"]:
    batch, queries = visible_BT.shape
    block = min(queries, _QUERIES)
    blocks = -(-queries // block)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * block - queries), *((0, 0),) * (x.ndim - 2)))
    padded_q, padded_visible, padded_window = pad(q_BTHK), pad(visible_BT), pad(window_BXK)

    def one(index: Any) -> Any:
        row, first = index // blocks, index % blocks * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        mask_QY = _band(start_B[row] - window + first, block, window)
        return _attend(
            take(padded_q),
            _where_seen(take(padded_window, block + window), jnp.any(mask_QY, axis=0)),
            mask_QY,
            pool_LBSK,
            layer,
            row,
            take(padded_visible),
            sink_H,
            scale,
        )

    out = jax.lax.map(one, jnp.arange(batch * blocks, dtype=jnp.int32))
    return out.reshape(batch, blocks * block, *q_BTHK.shape[2:])[:, :queries]


def _band(position: Int[Array, ""], queries: int, window: int) -> Bool[Array, "Q Y"]:
    """Which keys a query sees of a block's window, whose first key is at the position."""
    e_Y, j_Q1 = jnp.arange(queries + window), jnp.arange(queries)[:, None]
    near_QY = (e_Y[None] > j_Q1) & (e_Y[None] <= j_Q1 + window)
    return near_QY & (position + e_Y >= 0)[None]


def _where_seen(keys_XK: Float[Array, "X K"], seen_X: Bool[Array, " X"]) -> Float[Array, "X K"]:
    """Garbage must not reach a product: 0 * NaN is NaN."""
    return jnp.where(seen_X[:, None], keys_XK, jnp.zeros((), keys_XK.dtype))


def _attend(
    q_QHK: Float[Array, "Q H K"],
    window_YK: Float[Array, "Y K"],
    window_mask_QY: Bool[Array, "Q Y"],
    pool_LBSK: Float[Array, "L B S K"] | None,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    visible_Q: Int[Array, " Q"],
    sink_H: Float[Array, " H"],
    scale: float,
) -> Float[Array, "Q H K"]:
    """All heads of a block of queries of one row."""
    queries, heads, dim = q_QHK.shape
    q_RK = q_QHK.swapaxes(0, 1).reshape(heads * queries, dim)
    per_head = lambda mask_QX: jnp.tile(mask_QX, (heads, 1))
    whole = softmax.part(q_RK, window_YK, per_head(window_mask_QY), scale)
    if pool_LBSK is not None:
        most = jnp.max(visible_Q)
        entries = pool_LBSK.shape[2]
        width = min(_ENTRIES, entries)

        def add(block: Any, whole: Any) -> Any:
            # The last block reaches back to stay inside; what it repeats is masked.
            start = jnp.minimum(block * width, entries - width)
            zero = jnp.zeros_like(start)
            at = (layer, row, start, zero)
            keys_SK = jax.lax.dynamic_slice(pool_LBSK, at, (1, 1, width, dim))[0, 0]
            index_S = start + jnp.arange(width, dtype=jnp.int32)
            seen_QS = (index_S[None] < visible_Q[:, None]) & (index_S >= block * width)[None]
            keys_SK = _where_seen(keys_SK, index_S < most)
            return softmax.merge(whole, softmax.part(q_RK, keys_SK, per_head(seen_QS), scale))

        whole = jax.lax.fori_loop(0, (most + width - 1) // width, add, whole)
    out_RK = softmax.finish(whole, jnp.repeat(sink_H.astype(jnp.float32), queries))
    return out_RK.reshape(heads, queries, dim).swapaxes(0, 1).astype(q_QHK.dtype)
