"""Pools whose entries lie in pages that all rows of a batch share.

Axis letters: L layers of a stack, P pages, N entries per page, K channels, W bytes of an entry,
B batch, M pages of a row's table, S = M x N entries of a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.byte_rows import Codec
from pallas_kernels.implementations import check_arrays, check_dtype, check_shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """Pages of entries; entry s of row b is entry s % N of page table[b, s // N].

    What no query sees may be garbage: pages, entries, and numbers of the table.

    Attributes:
      pages: float [L, P, N, K], or uint8 [L, P, N, W] with a codec.
      table: int32 [B, M].
      codec: of entries that are rows of bytes, which are read as bfloat16.
    """

    pages: Any
    table: Any
    codec: Codec | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the entries as an array of rows: [L, B, S, K]."""
        layers, _, size, channels = self.pages.shape
        batch, places = self.table.shape
        channels = channels if self.codec is None else self.codec.channels
        return layers, batch, places * size, channels

    def gathered(
        self, layer: Int[Array, ""], row: Int[Array, "..."], entry: Int[Array, "*rows"]
    ) -> Float[Array, "*rows K"]:
        """Any entries of any batch rows."""
        place, within = jnp.divmod(entry, self.pages.shape[2])
        page = self.table.at[row, place].get(mode="clip")
        return self._decoded(self.pages.at[layer, page, within].get(mode="clip"))

    def block(
        self, layer: Int[Array, ""], row: Int[Array, ""], start: Int[Array, ""], size: int
    ) -> Float[Array, "E K"]:
        """Entries start .. start + size - 1 of a row, where `start` is a multiple of `size`.

        They are read in one piece if they are within a page, or as whole pages. What is beyond the
        row's entries is garbage.
        """
        entries = self.pages.shape[2]
        place, within = jnp.divmod(start, entries)
        if entries % size == 0:
            page = self.table.at[row, place].get(mode="clip")
            at = layer, page, within, jnp.zeros_like(within)
            piece = jax.lax.dynamic_slice(self.pages, at, (1, 1, size, self.pages.shape[3]))
            return self._decoded(piece[0, 0])
        if size % entries == 0:
            places = place + jnp.arange(size // entries, dtype=jnp.int32)
            pages = self.pages.at[layer, self.table.at[row, places].get(mode="clip")]
            return self._decoded(pages.get(mode="clip").reshape(size, -1))
        return self.gathered(layer, row, start + jnp.arange(size, dtype=jnp.int32))

    def of_row(self, layer: Int[Array, ""], row: Int[Array, ""]) -> Float[Array, "S K"]:
        """All entries of a row."""
        return self.block(layer, row, jnp.zeros((), jnp.int32), self.shape[2])

    def of_layer(self, layer: Int[Array, ""]) -> Float[Array, "B S K"]:
        """All entries of a layer."""
        stored = self.pages.at[layer, self.table].get(mode="clip")
        return self._decoded(stored.reshape(*self.shape[1:3], -1))

    def _decoded(self, stored: Shaped[Array, "*rows _"]) -> Float[Array, "*rows K"]:
        return stored if self.codec is None else self.codec.decode(stored)


def check(op: str, name: str, pool: Paged, sizes: Mapping[str, int], channels: str) -> None:
    """Reject pools that do not match the other arrays.

    Args:
      op: the operation, for error messages.
      name: the argument's name.
      pool: the pool.
      sizes: sizes of the letters known so far.
      channels: the letter of the channels.

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong shape.
    """
    table = f"{name}.table_BM"
    if (codec := pool.codec) is None:
        arrays = {f"{name}.pages_LPN{channels}": pool.pages, table: pool.table}
        check_arrays(op, arrays, integers=(table,), sizes=sizes)
        return
    known = check_arrays(op, {table: pool.table}, integers=(table,), sizes=sizes)
    check_dtype(op, f"{name}.pages", pool.pages, jnp.uint8)
    check_shape(op, f"{name}.pages_LPNW", pool.pages, known | {"W": codec.width})
    if codec.channels != sizes[channels]:
        raise ValueError(
            f"{op}: {name} has entries of {codec.channels} channels, not {sizes[channels]}."
        )
