"""Blocks of queries and their entries, shared by the forward and the backward pass in XLA.

Axis letters: as in the package; Q queries per block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dense_attention import xla_blocks as dense
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool

_QUERIES = 16
# Rows per block (queries x heads) against the entire pool: products are large, and logits stay in
# the cache.
_ROWS = 1024
# One product with up to this many entries per listed entry is faster than gathering those listed.
_SHARE = 8


def against_all(pool: Pool, listed: int) -> bool:
    """Whether a prompt's queries attend to all entries, under a mask, instead of gathered ones."""
    return pool.shape[2] <= _SHARE * listed


def split(queries: int, heads: int, *, all_entries: bool) -> tuple[int, int, Callable[..., Any]]:
    """Like `dense_attention.xla_blocks.split`."""
    return dense.split(queries, max(_QUERIES, _ROWS // heads) if all_entries else _QUERIES)


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a pool that the queries of a block see.

    Attributes:
      pool: entries of all layers of a stack.
      layer, row: the layer and the batch row to read.
      indices_Qk: each query's list, -1 for none.
      dtype: dtype of decoded entries.
    """

    pool: Pool
    layer: Any
    row: Any
    indices_Qk: Any
    dtype: Any

    def listed(self) -> Float[Array, "Q k K"]:
        """The entries of each query's list, zero for -1."""
        chosen = self._read(jnp.maximum(self.indices_Qk, 0))
        return jnp.where((self.indices_Qk >= 0)[..., None], chosen, jnp.zeros((), chosen.dtype))

    def all(self) -> tuple[Float[Array, "S K"], Bool[Array, "Q S"]]:
        """All entries of the row, zero where no query sees them, and which each query sees."""
        if isinstance(self.pool, Paged):
            entries_SK = self.pool.of_row(self.layer, self.row)
        else:
            entries_SK = self._read()
        (queries, _), size = self.indices_Qk.shape, entries_SK.shape[0]
        column_Qk = jnp.where(self.indices_Qk >= 0, self.indices_Qk, size)
        seen_QS = jnp.zeros((queries, size), bool)
        seen_QS = seen_QS.at[jnp.arange(queries)[:, None], column_Qk].set(True, mode="drop")
        return dense.where_seen(entries_SK, jnp.any(seen_QS, axis=0)), seen_QS

    def _read(self, *entries: Any) -> Float[Array, "*rows K"]:
        """The row's entries with these numbers, or all."""
        at = self.layer, self.row, *entries
        match self.pool:
            case Fp8Rows():
                return rows.decode(self.pool.data[at], self.dtype)
            case Paged():
                return self.pool.gathered(*at)
            case _:
                return self.pool[at]
