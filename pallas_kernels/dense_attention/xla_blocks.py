"""Blocks of queries and entries, as the forward and the backward form in XLA read them.

Axis letters: as in the package; Q queries of a block, Y keys of its window, E entries of a block,
R = H x Q rows, head after head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# With 8 heads, products of 128 queries are large, and logits stay in the cache. More entries are no
# faster there, and slow a few queries down.
QUERIES = 128
_ENTRIES = 256


def split(queries: int, most: int) -> tuple[int, int, Callable[[Any], Any]]:
    """Queries of a block, blocks, and what pads arrays [B, T, ...] to whole blocks."""
    block = min(queries, most)
    blocks = -(-queries // block)
    spare = blocks * block - queries
    return block, blocks, lambda x: jnp.pad(x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)))


def band(position: Int[Array, ""], queries: int, window: int) -> Bool[Array, "Q Y"]:
    """Which keys a query sees of a block's window, whose first key is at the position."""
    e_Y, j_Q1 = jnp.arange(queries + window), jnp.arange(queries)[:, None]
    near_QY = (e_Y[None] > j_Q1) & (e_Y[None] <= j_Q1 + window)
    return near_QY & (position + e_Y >= 0)[None]


def where_seen(keys_XK: Float[Array, "X K"], seen_X: Bool[Array, " X"]) -> Float[Array, "X K"]:
    """Garbage must not reach a product: 0 * NaN is NaN."""
    return jnp.where(seen_X[:, None], keys_XK, jnp.zeros((), keys_XK.dtype))


def as_rows(x_QHK: Float[Array, "Q H K"]) -> Float[Array, "R K"]:
    return x_QHK.swapaxes(0, 1).reshape(-1, x_QHK.shape[2])


def as_queries(x_RK: Float[Array, "R K"], queries: int) -> Float[Array, "Q H K"]:
    return x_RK.reshape(-1, queries, x_RK.shape[1]).swapaxes(0, 1)


def width(pool_LBSK: Float[Array, "L B S K"]) -> int:
    return min(_ENTRIES, pool_LBSK.shape[2])


def seen(pool_LBSK: Float[Array, "L B S K"], visible_Q: Int[Array, " Q"]) -> Int[Array, ""]:
    """Blocks of entries that some query sees."""
    return (jnp.max(visible_Q) + width(pool_LBSK) - 1) // width(pool_LBSK)


def entries(
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    row: Int[Array, ""],
    visible_Q: Int[Array, " Q"],
    block: Int[Array, ""],
) -> tuple[Float[Array, "E K"], Bool[Array, "Q E"], Int[Array, ""]]:
    """Entries of a block, which of them each query sees, and the first's index."""
    size = width(pool_LBSK)
    # The last block reaches back to stay inside; what it repeats is masked.
    start = jnp.minimum(block * size, pool_LBSK.shape[2] - size)
    at = (layer, row, start, jnp.zeros_like(start))
    keys_EK = jax.lax.dynamic_slice(pool_LBSK, at, (1, 1, size, pool_LBSK.shape[3]))[0, 0]
    index_E = start + jnp.arange(size, dtype=jnp.int32)
    seen_QE = (index_E[None] < visible_Q[:, None]) & (index_E >= block * size)[None]
    return where_seen(keys_EK, index_E < jnp.max(visible_Q)), seen_QE, start
