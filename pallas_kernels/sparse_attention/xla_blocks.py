"""Blocks of queries and their entries, as the forward and the backward form in XLA read them.

Axis letters: as in the package; Q queries of a block.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool

_QUERIES = 16


def split(queries: int) -> tuple[int, int, Callable[[Any, int], Any]]:
    """Queries of a block, blocks, and what fills arrays [B, T, ...] up to whole blocks."""
    block = min(queries, _QUERIES)
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
    data = pool.data if isinstance(pool, Fp8Rows) else pool
    chosen = data[layer, row, jnp.maximum(indices_Qk, 0)]
    if isinstance(pool, Fp8Rows):
        chosen = rows.decode(chosen, dtype)
    return jnp.where((indices_Qk >= 0)[..., None], chosen, jnp.zeros((), chosen.dtype))
