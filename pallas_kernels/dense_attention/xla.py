"""Attention in blocks of queries and entries, as a running softmax.

Its time is proportional to what is visible.

Axis letters: as in the package; Q queries per block, Y keys of its window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import softmax
from pallas_kernels.dense_attention import xla_blocks as blocks
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.dense_attention.xla_backward import decode_backward, prefill_backward

__all__ = ["decode", "decode_backward", "prefill", "prefill_backward"]


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    def attend_row(row: Any) -> Any:
        mask_TR = inputs.window_mask_BTR[row]
        keys_RK = blocks.where_seen(inputs.window_BRK[row], jnp.any(mask_TR, axis=0))
        bounds = blocks.Bounds(inputs.visible_BT[row])
        entries = blocks.Entries(inputs.pool_LBSK, inputs.layer, row, bounds)
        return _attend(inputs.q_BTHK[row], keys_RK, mask_TR, entries, inputs.sink_H, scale)

    return jax.lax.map(attend_row, jnp.arange(inputs.q_BTHK.shape[0], dtype=jnp.int32))


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    batch, queries, *rest = inputs.q_BTHK.shape
    block, count, pad = blocks.split(queries, blocks.QUERIES)
    bounds = blocks.Bounds(inputs.visible_BT, inputs.hidden_BT, inputs.first_BT).filled(pad)
    q, keys = pad(inputs.q_BTHK), pad(inputs.window_BXK)

    def attend_block(index: Any) -> Any:
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        block_bounds = jax.tree.map(take, bounds)
        position = inputs.start_B[row] - window + first
        mask_QY = blocks.band(position, block, window, block_bounds.first)
        keys_YK = blocks.where_seen(take(keys, block + window), jnp.any(mask_QY, axis=0))
        entries = blocks.Entries(inputs.pool_LBSK, inputs.layer, row, block_bounds)
        return _attend(take(q), keys_YK, mask_QY, entries, inputs.sink_H, scale)

    out = jax.lax.map(attend_block, jnp.arange(batch * count, dtype=jnp.int32))
    return out.reshape(batch, count * block, *rest)[:, :queries]


def _attend(
    q_QHK: Float[Array, "Q H K"],
    window_YK: Float[Array, "Y K"],
    window_mask_QY: Bool[Array, "Q Y"],
    entries: blocks.Entries,
    sink_H: Float[Array, " H"],
    scale: float,
) -> Float[Array, "Q H K"]:
    """All heads of a block of queries of one row."""
    queries, heads, _ = q_QHK.shape
    q_RK = blocks.as_rows(q_QHK)
    per_head = lambda mask_QX: jnp.tile(mask_QX, (heads, 1))
    total = softmax.part(q_RK, window_YK, per_head(window_mask_QY), scale)
    if entries.pool_LBSK is not None:

        def add(block: Any, total: Any) -> Any:
            keys_EK, seen_QE, _ = entries.of_block(block)
            return softmax.merge(total, softmax.part(q_RK, keys_EK, per_head(seen_QE), scale))

        total = jax.lax.fori_loop(*entries.blocks(), add, total)
    out_RK = softmax.finish(total, jnp.repeat(sink_H.astype(jnp.float32), queries))
    return blocks.as_queries(out_RK, queries).astype(q_QHK.dtype)
