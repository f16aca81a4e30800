"""Blocks of queries and entries, as the forward and the backward form in XLA read them.

Axis letters: as in the package; Q queries of a block, Y keys of its window, E entries of a block,
R = H x Q rows, head after head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# With 8 heads, products of 128 queries are large, and logits stay in the cache. More entries are no
# faster there, and slow a few queries down.
QUERIES = 128
_ENTRIES = 256
# A position that no key has.
NOWHERE = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """What queries see.

    Attributes:
      visible: entries below this.
      hidden: and not below this; None: 0.
      first: keys of the window from this position on; None: 0.
    """

    visible: Any
    hidden: Any = None
    first: Any = None

    def filled(self, pad: Callable[..., Any]) -> "Bounds":
        """Those of whole blocks; queries beyond the last see nothing that no other sees."""
        more = lambda x, fill: None if x is None else pad(x.astype(jnp.int32), fill)
        return Bounds(pad(self.visible), more(self.hidden, 0), more(self.first, NOWHERE))


def split(queries: int, most: int) -> tuple[int, int, Callable[..., Any]]:
    """Queries of a block, blocks, and what fills arrays [B, T, ...] up to whole blocks."""
    block = min(queries, most)
    blocks = -(-queries // block)
    spare = blocks * block - queries
    pad = lambda x, fill=0: jnp.pad(
        x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)), constant_values=fill
    )
    return block, blocks, pad


def band(
    position: Int[Array, ""],
    queries: int,
    window: int,
    first_Q: Int[Array, " Q"] | None = None,
) -> Bool[Array, "Q Y"]:
    """Which keys a query sees of a block's window, whose first key is at the position."""
    e_Y, j_Q1 = jnp.arange(queries + window), jnp.arange(queries)[:, None]
    near_QY = (e_Y[None] > j_Q1) & (e_Y[None] <= j_Q1 + window)
    mask_QY = near_QY & (position + e_Y >= 0)[None]
    return mask_QY if first_Q is None else mask_QY & ((position + e_Y)[None] >= first_Q[:, None])


def where_seen(keys_XK: Float[Array, "X K"], seen_X: Bool[Array, " X"]) -> Float[Array, "X K"]:
    """Garbage must not reach a product: 0 * NaN is NaN."""
    return jnp.where(seen_X[:, None], keys_XK, jnp.zeros((), keys_XK.dtype))


def as_rows(x_QHK: Float[Array, "Q H K"]) -> Float[Array, "R K"]:
    return x_QHK.swapaxes(0, 1).reshape(-1, x_QHK.shape[2])


def as_queries(x_RK: Float[Array, "R K"], queries: int) -> Float[Array, "Q H K"]:
    return x_RK.reshape(-1, queries, x_RK.shape[1]).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class Entries:
    """What the queries of a block see of a pool.

    Attributes:
      pool_LBSK: entries of all layers of a stack; None: there are none.
      layer, row: which of them are read.
      bounds: of the queries [Q].
    """

    pool_LBSK: Any
    layer: Any
    row: Any
    bounds: Bounds

    @property
    def width(self) -> int:
        """Entries of a block."""
        return min(_ENTRIES, self.pool_LBSK.shape[2])

    def blocks(self) -> tuple[Any, Int[Array, ""]]:
        """The first block that some query sees, and the end of those blocks."""
        visible_Q, hidden_Q, size = self.bounds.visible, self.bounds.hidden, self.width
        end = (jnp.max(visible_Q) + size - 1) // size
        if hidden_Q is None:
            return 0, end
        room = self.pool_LBSK.shape[2]
        return jnp.min(jnp.where(hidden_Q < visible_Q, hidden_Q, room)) // size, end

    def of_block(
        self, block: Int[Array, ""]
    ) -> tuple[Float[Array, "E K"], Bool[Array, "Q E"], Int[Array, ""]]:
        """A block's entries, which of them each query sees, and the first's index."""
        size, visible_Q, hidden_Q = self.width, self.bounds.visible, self.bounds.hidden
        # The last block reaches back to stay inside; what it repeats is masked.
        start = jnp.minimum(block * size, self.pool_LBSK.shape[2] - size)
        at = (self.layer, self.row, start, jnp.zeros_like(start))
        shape = (1, 1, size, self.pool_LBSK.shape[3])
        keys_EK = jax.lax.dynamic_slice(self.pool_LBSK, at, shape)[0, 0]
        index_E = start + jnp.arange(size, dtype=jnp.int32)
        seen_QE = (index_E[None] < visible_Q[:, None]) & (index_E >= block * size)[None]
        if hidden_Q is None:
            return where_seen(keys_EK, index_E < jnp.max(visible_Q)), seen_QE, start
        seen_QE &= index_E[None] >= hidden_Q[:, None]
        return where_seen(keys_EK, jnp.any(seen_QE, axis=0)), seen_QE, start
