"""A block of queries at a time: the window, then entries, either gathered or under a mask.

Axis letters: as in the package; Q queries per block, Y keys of its window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import softmax
from pallas_kernels.dense_attention.xla_blocks import NOWHERE, band, where_seen
from pallas_kernels.sparse_attention import xla_blocks as blocks
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.xla_backward import decode_backward, prefill_backward

__all__ = ["decode", "decode_backward", "prefill", "prefill_backward"]


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    pool, layer, dtype = inputs.pool_LBSK, inputs.layer, inputs.window_BRK.dtype

    def attend_row(row: Any) -> Any:
        entries = blocks.Entries(pool, layer, row, inputs.indices_BTk[row], dtype)
        near = inputs.window_BRK[row], inputs.window_mask_BTR[row]
        return _attend(inputs.q_BTHK[row], *near, entries, inputs.sink_H, scale)

    return jax.lax.map(attend_row, jnp.arange(inputs.q_BTHK.shape[0], dtype=jnp.int32))


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    batch, queries, heads, dim = inputs.q_BTHK.shape
    pool, layer, dtype = inputs.pool_LBSK, inputs.layer, inputs.window_BXK.dtype
    all_entries = blocks.against_all(pool, inputs.indices_BTk.shape[2])
    block, count, pad = blocks.split(queries, heads, all_entries=all_entries)
    q, keys, indices = pad(inputs.q_BTHK, 0), pad(inputs.window_BXK, 0), pad(inputs.indices_BTk, -1)
    firsts = inputs.first_BT
    firsts = None if firsts is None else pad(firsts.astype(jnp.int32), NOWHERE)

    def attend_block(index: Any) -> Any:
        row, first = index // count, index % count * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        first_Q = jax.tree.map(take, firsts)
        mask_QY = band(inputs.start_B[row] - window + first, block, window, first_Q)
        entries = blocks.Entries(pool, layer, row, take(indices), dtype)
        near = take(keys, block + window), mask_QY
        return _attend(take(q), *near, entries, inputs.sink_H, scale, all_entries=all_entries)

    out = jax.lax.map(attend_block, jnp.arange(batch * count, dtype=jnp.int32))
    return out.reshape(batch, count * block, heads, dim)[:, :queries]


def _attend(
    q_QHK: Float[Array, "Q H K"],
    window_YK: Float[Array, "Y K"],
    mask_QY: Bool[Array, "Q Y"],
    entries: blocks.Entries,
    sink_H: Float[Array, " H"],
    scale: float,
    *,
    all_entries: bool = False,
) -> Float[Array, "Q H K"]:
    """All heads of a block of queries of one row: the window, then entries."""
    queries, heads, dim = q_QHK.shape
    window_YK = where_seen(window_YK, jnp.any(mask_QY, axis=0))
    # Rows are query by query here, so that a query's heads are adjacent.
    q_RK = q_QHK.reshape(queries * heads, dim)
    near = softmax.part(q_RK, window_YK, jnp.repeat(mask_QY, heads, axis=0), scale)
    if all_entries:
        entries_SK, seen_QS = entries.all()
        far = softmax.part(q_RK, entries_SK, jnp.repeat(seen_QS, heads, axis=0), scale)
    else:
        far = _by_query(q_QHK, entries.listed(), entries.indices_Qk >= 0, scale)
    out_RK = softmax.finish(softmax.merge(near, far), jnp.tile(sink_H.astype(jnp.float32), queries))
    return out_RK.reshape(queries, heads, dim).astype(q_QHK.dtype)


def _by_query(
    q_QHK: Float[Array, "Q H K"],
    chosen_QkK: Float[Array, "Q k K"],
    listed_Qk: Bool[Array, "Q k"],
    scale: float,
) -> softmax.Part:
    """The part of each query's own entries; rows are query by query."""
    queries, heads, _ = q_QHK.shape

    def attend(q_HK: Any, chosen_kK: Any, listed_k: Any) -> softmax.Part:
        mask_Hk = jnp.broadcast_to(listed_k[None], (heads, listed_k.shape[0]))
        return softmax.part(q_HK, chosen_kK, mask_Hk, scale)

    if queries == 1:
        return attend(q_QHK[0], chosen_QkK[0], listed_Qk[0])
    far = jax.vmap(attend)(q_QHK, chosen_QkK, listed_Qk)
    return jax.tree.map(lambda x: x.reshape(queries * heads, *x.shape[2:]), far)
