"""Blocks of queries and their entries, as the forward and the backward form in XLA read them.

Axis letters: as in the package; Q queries of a block, S entries of the pool.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


@dataclasses.dataclass(frozen=True)
class Entries:
    """What the queries of a block see of a pool.

    Attributes:
      pool: entries of all layers of a stack.
      layer, row: which of them are read.
      indices_Qk: each query's list, -1 for none.
      dtype: of entries that are decoded.
    """

    pool: Pool
    layer: Any
    row: Any
    indices_Qk: Any
    dtype: Any

    def listed(self) -> Float[Array, "Q k K"]:
        """The entries of each query's list, zero for -1."""
        chosen = self._read(self.layer, self.row, jnp.maximum(self.indices_Qk, 0))
        return jnp.where((self.indices_Qk >= 0)[..., None], chosen, jnp.zeros((), chosen.dtype))

    def whole(self) -> tuple[Float[Array, "S K"], Bool[Array, "Q S"]]:
        """All entries of a row, zero where no query sees them, and which of them each sees."""
        entries_SK = self._read(self.layer, self.row)
        (queries, _), size = self.indices_Qk.shape, entries_SK.shape[0]
        column_Qk = jnp.where(self.indices_Qk >= 0, self.indices_Qk, size)
        seen_QS = jnp.zeros((queries, size), bool)
        seen_QS = seen_QS.at[jnp.arange(queries)[:, None], column_Qk].set(True, mode="drop")
        return where_seen(entries_SK, jnp.any(seen_QS, axis=0)), seen_QS

    def _read(self, *at: Any) -> Float[Array, "*rows K"]:
        if isinstance(self.pool, Fp8Rows):
            return rows.decode(self.pool.data[at], self.dtype)
        return self.pool[at]
