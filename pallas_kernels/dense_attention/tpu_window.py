"""The window's keys that a block of queries sees, inside a kernel.

Axis letters: as in the package; N blocks of queries, Q queries per block, R = Q x H rows, query
by query, Y keys of a block's window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tpu_attention_pull import any_row_sees, where_seen


def in_blocks(x_BT: Int[Array, "B T"], block: int) -> Int[Array, "B N 1 Q"]:
    """Per-query bounds in blocks of queries; padding repeats the last query's."""
    batch, queries = x_BT.shape
    blocks = pl.cdiv(queries, block)
    spare = blocks * block - queries
    x_BT = jnp.pad(x_BT.astype(jnp.int32), ((0, 0), (0, spare)), mode="edge")
    return x_BT.reshape(batch, blocks, 1, block)


def per_row(x_1Q: Int[Array, "1 Q"], heads: int) -> Int[Array, "R 1"]:
    """Each query's number, 0 or more, repeated for each of its heads."""
    shape = (x_1Q.shape[1] * heads, x_1Q.shape[1])
    row_RQ = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    first_RQ = jax.lax.broadcasted_iota(jnp.int32, shape, 1) * heads
    same_RQ = (row_RQ >= first_RQ) & (row_RQ < first_RQ + heads)
    return jnp.max(jnp.where(same_RQ, x_1Q, 0), axis=1, keepdims=True)


def seen_by_any(
    e_Y1: Int[Array, "Y 1"], first: Any, low_1Q: Int[Array, "1 Q"], window: int
) -> Bool[Array, "Y 1"]:
    """Which keys e of a chunk's window some query sees of the block that starts at `first`."""
    query_1Q = first + jax.lax.broadcasted_iota(jnp.int32, low_1Q.shape, 1)
    return any_row_sees((e_Y1 > query_1Q) & (e_Y1 <= query_1Q + window) & (e_Y1 >= low_1Q))


def ring_keys(
    refs: tuple[Any, Any], i: Any, start: Any, *, heads: int
) -> tuple[Float[Array, "Y K"], Bool[Array, "R Y"]]:
    """Keys of a ring, and which of them each row sees, from its query's mask."""
    keys_ref, mask_ref = refs
    queries, length = mask_ref.shape
    any_1Y = jnp.max(mask_ref[...], axis=0, keepdims=True)
    square = (length, length)
    diagonal_YY = jax.lax.broadcasted_iota(jnp.int32, square, 0) == jax.lax.broadcasted_iota(
        jnp.int32, square, 1
    )
    any_Y1 = jnp.max(jnp.where(diagonal_YY, any_1Y, 0), axis=1, keepdims=True)
    row_RY = jax.lax.broadcasted_iota(jnp.int32, (queries * heads, length), 0)
    mask_RY = jnp.broadcast_to(mask_ref[:1], row_RY.shape)
    for t in range(1, queries):
        mask_RY = jnp.where(row_RY >= t * heads, mask_ref[t : t + 1], mask_RY)
    return where_seen(keys_ref[...], any_Y1 > 0), mask_RY > 0


def band_keys(
    refs: tuple[tuple[Any, ...], Any],
    i: Any,
    start: Any,
    *,
    heads: int,
    block: int,
    window: int,
    keys: int,
) -> tuple[Float[Array, "Y K"], Bool[Array, "R Y"]]:
    """Keys of a block's window, and which of them each row sees.

    Key e is at position start - window + e. Query j sees the keys j < e <= j + window; where there
    is a ref [1, Q] to its `lowest_key`, only those from there on.
    """
    keys_refs, low_ref = refs
    near = keys_refs[0].shape[0]
    width = len(keys_refs) * near
    first = i * block
    origin = jax.lax.div(first, near) * near
    exists = lambda e: (e >= window - start) & (e < keys)
    e_Y1 = origin + jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0)
    seen_Y1 = exists(e_Y1) & (e_Y1 > first) & (e_Y1 < first + block + window)
    if low_ref is not None:
        seen_Y1 &= seen_by_any(e_Y1, first, low_ref[...], window)
    keys_YK = where_seen(jnp.concatenate([ref[...] for ref in keys_refs]), seen_Y1)
    # Query j of the block has the rows j x heads .. (j + 1) x heads - 1.
    e_RY = origin + jax.lax.broadcasted_iota(jnp.int32, (block * heads, width), 1)
    row_RY = jax.lax.broadcasted_iota(jnp.int32, (block * heads, width), 0)
    after_RY = row_RY < (e_RY - first) * heads
    within_RY = row_RY >= (e_RY - first - window) * heads
    mask_RY = after_RY & within_RY & exists(e_RY)
    if low_ref is not None:
        mask_RY &= e_RY >= per_row(low_ref[...], heads)
    return keys_YK, mask_RY
