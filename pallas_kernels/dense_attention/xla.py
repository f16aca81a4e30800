"""Attention in blocks of queries and entries, as a running softmax; time follows what is visible.

Axis letters: as in the package; Q queries of a block, Y keys of its window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.dense_attention import xla_blocks as blocks
from pallas_kernels.dense_attention.xla_backward import decode_backward, prefill_backward

__all__ = ["decode", "decode_backward", "prefill", "prefill_backward"]


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
        keys_RK = blocks.where_seen(window_BRK[row], jnp.any(mask_TR, axis=0))
        return _attend(
            q_BTHK[row],
            keys_RK,
            mask_TR,
            pool_LBSK,
            layer,
            row,
            blocks.Bounds(visible_BT[row]),
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
    first_BT: Int[Array, "B T"] | None = None,
    hidden_BT: Int[Array, "B T"] | None = None,
    *,
    window: int,
    scale: float,
) -> Float[Array, "B T H K"]:
    batch, queries = visible_BT.shape
    block, count, pad = blocks.split(queries, blocks.QUERIES)
    bounds = blocks.Bounds(visible_BT, hidden_BT, first_BT)
    padded_q, padded, padded_window = pad(q_BTHK), bounds.filled(pad), pad(window_BXK)

    def one(index: Any) -> Any:
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        first_Q = jax.tree.map(take, padded.first)
        mask_QY = blocks.band(start_B[row] - window + first, block, window, first_Q)
        return _attend(
            take(padded_q),
            blocks.where_seen(take(padded_window, block + window), jnp.any(mask_QY, axis=0)),
            mask_QY,
            pool_LBSK,
            layer,
            row,
            jax.tree.map(take, padded),
            sink_H,
            scale,
        )

    out = jax.lax.map(one, jnp.arange(batch * count, dtype=jnp.int32))
    return out.reshape(batch, count * block, *q_BTHK.shape[2:])[:, :queries]


def _attend(
    q_QHK: Float[Array, "Q H K"],
    window_YK: Float[Array, "Y K"],
    window_mask_QY: Bool[Array, "Q Y"],
    pool_LBSK: Float[Array, "L B S K"] | None,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    bounds: blocks.Bounds,
    sink_H: Float[Array, " H"],
    scale: float,
) -> Float[Array, "Q H K"]:
    """All heads of a block of queries of one row."""
    queries, heads, _ = q_QHK.shape
    q_RK = blocks.as_rows(q_QHK)
    per_head = lambda mask_QX: jnp.tile(mask_QX, (heads, 1))
    whole = softmax.part(q_RK, window_YK, per_head(window_mask_QY), scale)
    if pool_LBSK is not None:

        def add(block: Any, whole: Any) -> Any:
            keys_EK, seen_QE, _ = blocks.entries(pool_LBSK, layer, row, bounds, block)
            return softmax.merge(whole, softmax.part(q_RK, keys_EK, per_head(seen_QE), scale))

        whole = jax.lax.fori_loop(*blocks.seen(pool_LBSK, bounds), add, whole)
    out_RK = softmax.finish(whole, jnp.repeat(sink_H.astype(jnp.float32), queries))
    return blocks.as_queries(out_RK, queries).astype(q_QHK.dtype)
