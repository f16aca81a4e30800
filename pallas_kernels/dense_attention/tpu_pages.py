"""A pool's pages brought to VMEM, a block of entries at a time, the next while one is computed.

A block is one piece of a page or several: pieces are whole pages, unless pages do not divide a
block. They are copied one by one, as far as some query sees. Entries that are rows of bytes are
decoded when their block has arrived.

Axis letters: as in `tpu`; P pieces of a pool, N entries per piece, M pieces of a row, E entries per
block, W channels or bytes of an entry.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_byte_rows
from pallas_kernels.byte_rows import FP8
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import in_hbm
from pallas_kernels.paged import Paged

# Copies per unrolled group.
_GROUP = 8


class Arrays(NamedTuple):
    """A pool's arrays, or refs to them."""

    pieces_LPNW: Any  # in HBM
    table_B11M: Any  # in SMEM, row by row; whole blocks

    def specs(self) -> "Arrays":
        """Their specs, for a grid of blocks of queries, rows of the batch, and one step."""
        row = pl.BlockSpec(
            (1, *self.table_B11M.shape[1:]),
            lambda query_block, row, *_: (row, 0, 0, 0),
            memory_space=pltpu.SMEM,
        )
        return Arrays(pl.BlockSpec(memory_space=pl.ANY), row)


def arrays_of(pool: Paged, block: int) -> Arrays:
    """A pool's arrays, for blocks of `block` entries.

    Raises:
      Unsupported: pages whose parts XLA or the kernel would have to rearrange.
    """
    if pool.codec not in (None, FP8):
        raise Unsupported(f"dense_attention on TPUs takes pages in {FP8}, not in {pool.codec}.")
    layers, pages, size, channels = pool.pages.shape
    dtype, piece = pool.pages.dtype, math.gcd(size, block)
    word, tile = 4 // dtype.itemsize, 32 // dtype.itemsize
    if piece % (word if piece == size else tile):
        raise Unsupported(
            f"dense_attention on TPUs takes pages of {dtype} with a multiple of {word} entries that"
            f" divides {block}, or with a multiple of {tile}, not with {size}."
        )
    parts = size // piece
    page_BM1 = jnp.clip(pool.table.astype(jnp.int32), 0, pages - 1)[..., None]
    part = jnp.arange(parts, dtype=jnp.int32)[None, None]
    table_BM = (page_BM1 * parts + part).reshape(pool.table.shape[0], -1)
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % (block // piece))))
    pieces = pool.pages.reshape(layers, pages * parts, piece, channels)
    return Arrays(in_hbm(pieces), table_BM[:, None, None])


class Buffers(NamedTuple):
    """Scratch memory: two blocks [2, E, W], a DMA semaphore for each, and a block of numbers.

    The last, [E, K], is None if entries are numbers already.
    """

    blocks: Any
    sems: Any
    decoded: Any

    @classmethod
    def shapes(cls, entries: int, pieces_LPNW: Any) -> "Buffers":
        """Shapes of the scratch."""
        blocks = pltpu.VMEM((2, entries, pieces_LPNW.shape[3]), pieces_LPNW.dtype)
        coded = pieces_LPNW.dtype == jnp.uint8
        decoded = pltpu.VMEM((entries, FP8.channels), jnp.bfloat16) if coded else None
        return cls(blocks, pltpu.SemaphoreType.DMA((2,)), decoded)


class Pages(NamedTuple):
    """The entries that a block of queries sees.

    Attributes:
      pieces_ref: HBM [P, N, W].
      table_ref: SMEM [1, 1, 1, M].
      buffers: scratch.
      first: the first entry that some query sees.
      end: 1 + the last entry that some query sees.
    """

    pieces_ref: Any
    table_ref: Any
    buffers: Buffers
    first: Any
    end: Any

    @property
    def _width(self) -> int:
        return self.buffers.blocks.shape[1]

    @property
    def _blocks(self) -> tuple[Any, Any]:
        """The range of blocks that some query sees."""
        end = jax.lax.div(self.end + self._width - 1, self._width)
        # Nothing else checks that copies are inside the table.
        most = self.table_ref.shape[3] * self.pieces_ref.shape[1] // self._width
        return jax.lax.div(self.first, self._width), jnp.minimum(end, most)

    def start(self) -> None:
        """Start to copy the first block."""
        begin, end = self._blocks
        pl.when(begin < end)(lambda: self._copy(begin, "start"))

    def each_block(self, run: Callable[[Any, Any], None]) -> None:
        """Call `run` with the number of each block's first entry and a ref to the block [E, K]."""
        begin, end = self._blocks

        def step(block: Any, _: Any) -> None:
            pl.when(block + 1 < end)(lambda: self._copy(block + 1, "start"))
            self._copy(block, "wait")
            run(block * self._width, self._entries(self.buffers.blocks.at[block % 2]))

        jax.lax.fori_loop(begin, end, step, None)

    def _entries(self, block_ref: Any) -> Any:
        """A ref to a block's entries [E, K]."""
        if self.buffers.decoded is None:
            return block_ref
        tpu_byte_rows.decode(block_ref, self.buffers.decoded, FP8)
        return self.buffers.decoded

    def _copy(self, block: Any, do: str) -> None:
        """Start the copies of a block's pieces, or wait for them."""
        piece, pieces = self.pieces_ref.shape[1], self._width // self.pieces_ref.shape[1]
        group = math.gcd(_GROUP, pieces)
        sem, rows = self.buffers.sems.at[block % 2], group * piece
        seen = jnp.minimum(self.end - block * self._width, self._width)

        def copy_group(g: Any, _: Any) -> None:
            to_ref = self.buffers.blocks.at[block % 2, pl.ds(pl.multiple_of(g * rows, rows), rows)]
            if do == "wait":
                # Waits for as many bytes as the group's copies have together.
                pltpu.make_async_copy(to_ref, to_ref, sem).wait()
                return
            for i in range(group):
                number = self.table_ref[0, 0, 0, block * pieces + g * group + i]
                to = to_ref.at[pl.ds(i * piece, piece)]
                pltpu.make_async_copy(self.pieces_ref.at[number], to, sem).start()

        jax.lax.fori_loop(0, jax.lax.div(seen + rows - 1, rows), copy_group, None)
