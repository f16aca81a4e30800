"""Blocks of queries and entries, shared by the forward and the backward pass in XLA.

Axis letters: as in the package; Q queries per block, Y keys of its window, E entries per block,
R = H x Q rows, head by head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged import Paged

# With 8 heads, products of 128 queries are large and logits stay in the cache. More entries are not
# faster then, and are slower for a few queries.
QUERIES = 128
_ENTRIES = 256
# A position that no key has.
NOWHERE = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """What each query sees.

    Attributes:
      visible: entries below this are seen,
      hidden: but not those below this; None: 0.
      first: keys of the window from this position on are seen; None: 0.
    """

    visible: Any
    hidden: Any = None
    first: Any = None

    def filled(self, pad: Callable[..., Any]) -> "Bounds":
        """Padded to full blocks; padding queries see nothing that no other query sees."""
        pad_optional = lambda x, fill: None if x is None else pad(x.astype(jnp.int32), fill)
        return Bounds(
            pad(self.visible), pad_optional(self.hidden, 0), pad_optional(self.first, NOWHERE)
        )


def split(queries: int, most: int) -> tuple[int, int, Callable[..., Any]]:
    """Queries per block, number of blocks, and a function that pads [B, T, ...] to full blocks."""
    block = min(queries, most)
    blocks = -(-queries // block)
    spare = blocks * block - queries
    pad = lambda x, fill=0: jnp.pad(
        x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)), constant_values=fill
    )
    return block, blocks, pad


def band(
    position: Int[Array, ""], queries: int, window: int, first_Q: Int[Array, " Q"] | None = None
) -> Bool[Array, "Q Y"]:
    """Which keys of a block's window each query sees; its first key is at `position`."""
    e_Y, j_Q1 = jnp.arange(queries + window), jnp.arange(queries)[:, None]
    near_QY = (e_Y[None] > j_Q1) & (e_Y[None] <= j_Q1 + window)
    mask_QY = near_QY & (position + e_Y >= 0)[None]
    return mask_QY if first_Q is None else mask_QY & ((position + e_Y)[None] >= first_Q[:, None])


def where_seen(keys_XK: Float[Array, "X K"], seen_X: Bool[Array, " X"]) -> Float[Array, "X K"]:
    """Keep garbage out of products: 0 * NaN is NaN."""
    return jnp.where(seen_X[:, None], keys_XK, jnp.zeros((), keys_XK.dtype))


def as_rows(x_QHK: Float[Array, "Q H K"]) -> Float[Array, "R K"]:
    return x_QHK.swapaxes(0, 1).reshape(-1, x_QHK.shape[2])


def as_queries(x_RK: Float[Array, "R K"], queries: int) -> Float[Array, "Q H K"]:
    return x_RK.reshape(-1, queries, x_RK.shape[1]).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a pool that the queries of a block see.

    Attributes:
      pool_LBSK: entries of all layers of a stack; None without a pool.
      layer, row: the layer and the batch row to read.
      bounds: bounds of the queries, [Q].
    """

    pool_LBSK: Any
    layer: Any
    row: Any
    bounds: Bounds

    @property
    def width(self) -> int:
        """Entries per block."""
        return min(_ENTRIES, self.pool_LBSK.shape[2])

    def blocks(self) -> tuple[Any, Int[Array, ""]]:
        """The range of blocks that some query sees: the first, and one past the last."""
        visible_Q, hidden_Q, size = self.bounds.visible, self.bounds.hidden, self.width
        end = (jnp.max(visible_Q) + size - 1) // size
        if hidden_Q is None:
            return 0, end
        capacity = self.pool_LBSK.shape[2]
        return jnp.min(jnp.where(hidden_Q < visible_Q, hidden_Q, capacity)) // size, end

    def of_block(
        self, block: Int[Array, ""]
    ) -> tuple[Float[Array, "E K"], Bool[Array, "Q E"], Int[Array, ""]]:
        """A block's entries, which of them each query sees, and the index of the first."""
        size, visible_Q, hidden_Q = self.width, self.bounds.visible, self.bounds.hidden
        start = block * size
        if not isinstance(self.pool_LBSK, Paged):
            # The last block reaches back to stay inside the pool; what it repeats is masked.
            start = jnp.minimum(start, self.pool_LBSK.shape[2] - size)
        index_E = start + jnp.arange(size, dtype=jnp.int32)
        keys_EK = self._read(start, size)
        seen_QE = (index_E[None] < visible_Q[:, None]) & (index_E >= block * size)[None]
        if hidden_Q is None:
            return where_seen(keys_EK, index_E < jnp.max(visible_Q)), seen_QE, start
        seen_QE &= index_E[None] >= hidden_Q[:, None]
        return where_seen(keys_EK, jnp.any(seen_QE, axis=0)), seen_QE, start

    def _read(self, start: Int[Array, ""], size: int) -> Float[Array, "E K"]:
        """The entries from `start` on."""
        if isinstance(self.pool_LBSK, Paged):
            return self.pool_LBSK.block(self.layer, self.row, start, size)
        at = (self.layer, self.row, start, jnp.zeros_like(start))
        shape = (1, 1, size, self.pool_LBSK.shape[3])
        return jax.lax.dynamic_slice(self.pool_LBSK, at, shape)[0, 0]
