"""A few queries at a time: each one's entries, gathered or under a mask, beside its own window.

Axis letters: as in the package; Q queries of a block, Y keys of its window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.dense_attention.xla_blocks import NOWHERE, band, where_seen
from pallas_kernels.sparse_attention import xla_blocks as blocks
from pallas_kernels.sparse_attention.rows import Pool
from pallas_kernels.sparse_attention.xla_backward import decode_backward, prefill_backward

__all__ = ["decode", "decode_backward", "prefill", "prefill_backward"]


def decode(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    def one(row: Any) -> Any:
        return _attend(
            q_BTHK[row],
            window_BRK[row],
            window_mask_BTR[row],
            pool_LBSK,
            layer,
            row,
            indices_BTk[row],
            sink_H,
            scale,
        )

    return jax.lax.map(one, jnp.arange(q_BTHK.shape[0], dtype=jnp.int32))


def prefill(
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
) -> Float[Array, "B T H K"]:
    batch, queries, listed = indices_BTk.shape
    all_entries = blocks.against_all(pool_LBSK, listed)
    block, count, pad = blocks.split(queries, q_BTHK.shape[2], all_entries=all_entries)
    padded_q, padded_window = pad(q_BTHK, 0), pad(window_BXK, 0)
    padded_indices = pad(indices_BTk, -1)
    padded_first = None if first_BT is None else pad(first_BT.astype(jnp.int32), NOWHERE)

    def one(index: Any) -> Any:
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        return _attend(
            take(padded_q),
            take(padded_window, block + window),
            band(start_B[row] - window + first, block, window, jax.tree.map(take, padded_first)),
            pool_LBSK,
            layer,
            row,
            take(padded_indices),
            sink_H,
            scale,
            all_entries=all_entries,
        )

    out = jax.lax.map(one, jnp.arange(batch * count, dtype=jnp.int32))
    return out.reshape(batch, count * block, *q_BTHK.shape[2:])[:, :queries]


def _attend(
    q_QHK: Float[Array, "Q H K"],
    window_YK: Float[Array, "Y K"],
    mask_QY: Bool[Array, "Q Y"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    indices_Qk: Int[Array, "Q k"],
    sink_H: Float[Array, " H"],
    scale: float,
    *,
    all_entries: bool = False,
) -> Float[Array, "Q H K"]:
    """All heads of a block of queries of one row: the window, then entries."""
    queries, heads, dim = q_QHK.shape
    window_YK = where_seen(window_YK, jnp.any(mask_QY, axis=0))
    # Rows are query by query here, so that a query's heads lie together.
    q_RK = q_QHK.reshape(queries * heads, dim)
    near = softmax.part(q_RK, window_YK, jnp.repeat(mask_QY, heads, axis=0), scale)
    far = pool_LBSK, layer, row, indices_Qk, window_YK.dtype
    if all_entries:
        entries_SK, seen_QS = blocks.whole(*far)
        far = softmax.part(q_RK, entries_SK, jnp.repeat(seen_QS, heads, axis=0), scale)
    else:
        far = _by_query(q_QHK, blocks.listed(*far), indices_Qk >= 0, scale)
    out_RK = softmax.finish(softmax.merge(near, far), jnp.tile(sink_H.astype(jnp.float32), queries))
    return out_RK.reshape(queries, heads, dim).astype(q_QHK.dtype)


def _by_query(
    q_QHK: Float[Array, "Q H K"],
    chosen_QkK: Float[Array, "Q k K"],
    listed_Qk: Bool[Array, "Q k"],
    scale: float,
) -> softmax.Part:
    """Each query's own entries; rows query after query."""
    queries, heads, _ = q_QHK.shape

    def entries(q_HK: Any, chosen_kK: Any, listed_k: Any) -> softmax.Part:
        mask_Hk = jnp.broadcast_to(listed_k[None], (heads, listed_k.shape[0]))
        return softmax.part(q_HK, chosen_kK, mask_Hk, scale)

    if queries == 1:
        return entries(q_QHK[0], chosen_QkK[0], listed_Qk[0])
    far = jax.vmap(entries)(q_QHK, chosen_QkK, listed_Qk)
    return jax.tree.map(lambda x: x.reshape(queries * heads, *x.shape[2:]), far)
