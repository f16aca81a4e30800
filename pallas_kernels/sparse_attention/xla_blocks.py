"""Blocks of queries and their entries, as the forward and the backward form in XLA read them.

Axis letters: as in the package; Q queries of a block, S entries of the pool.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention.xla_blocks import where_seen
from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool

_QUERIES = 16
# Rows of a block (queries times heads) against the whole pool: products are large, and logits
# stay in the cache.
_ROWS = 1024
# One product with so many entries for each that is listed takes less time than gathering those.
_SHARE = 8


def against_all(pool: Pool, listed: int) -> bool:
    """Whether a prompt's queries meet all entries, under a mask, instead of their own list."""
    return pool.shape[2] <= _SHARE * listed


def split(
    queries: int, heads: int, *, all_entries: bool
) -> tuple[int, int, Callable[[Any, int], Any]]:
    """Queries of a block, blocks, and what fills arrays [B, T, ...] up to whole blocks."""
    block = min(queries, max(_QUERIES, _ROWS // heads) if all_entries else _QUERIES)
    count = -(-queries // block)
    spare = count * block - queries
    pad = lambda x, fill: jnp.pad(
        x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)), constant_values=fill
    )
    return block, count, pad


def listed(
    pool: Pool,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    indices_Qk: Int[Array, "Q k"],
    dtype: Any,
) -> Float[Array, "Q k K"]:
    """The entries of each query's list, zero for -1."""
    chosen = _read(pool, (layer, row, jnp.maximum(indices_Qk, 0)), dtype)
    return jnp.where((indices_Qk >= 0)[..., None], chosen, jnp.zeros((), chosen.dtype))


def whole(
    pool: Pool,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    indices_Qk: Int[Array, "Q k"],
    dtype: Any,
) -> tuple[Float[Array, "S K"], Bool[Array, "Q S"]]:
    """All entries of a row, zero where no query sees them, and which of them each query sees."""
    entries_SK = _read(pool, (layer, row), dtype)
    (queries, _), size = indices_Qk.shape, entries_SK.shape[0]
    column_Qk = jnp.where(indices_Qk >= 0, indices_Qk, size)
    seen_QS = jnp.zeros((queries, size), bool)
    seen_QS = seen_QS.at[jnp.arange(queries)[:, None], column_Qk].set(True, mode="drop")
    return where_seen(entries_SK, jnp.any(seen_QS, axis=0)), seen_QS


def _read(pool: Pool, at: tuple[Any, ...], dtype: Any) -> Float[Array, "*rows K"]:
    """Entries of a pool; those in eight bits are decoded to `dtype`."""
    return rows.decode(pool.data[at], dtype) if isinstance(pool, Fp8Rows) else pool[at]
