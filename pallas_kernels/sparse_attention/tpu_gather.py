"""Listed entries brought to VMEM, with one small copy each from the pool in HBM.

XLA tiles the rows of a pool by eight or more, and packs two bfloat16 rows, or four rows of bytes,
into one row of 32-bit words. A row of words can be copied alone, so an entry arrives with those
that share its words, and is picked out here.

Example: a bfloat16 pool with a single lane, and one query's list of k = 3.

    pool row            0     1     2     3     4     5
    value             1.0  -1.0   1.5  -2.0   0.5   3.0
    its bits         3F80  BF80  3FC0  C000  3F00  4040
    row of words    0: BF803F80 1: C0003FC0 2: 40403F00    the even row is the low half

    list                      3        -1         4        -1: no entry
    `word_rows`               1         0         2        entry // 2, clamped into the pool
    copied             C0003FC0  BF803F80  40403F00        `Lists.start`
    shift                    16         0         0        entry % 2 * 16, in `_pick`
    shifted right      0000C000  BF803F80  40403F00
    shifted left 16    C0000000  3F800000  3F000000        bfloat16 is the upper half of float32
    result                 -2.0       0.0       0.5        `Lists.wait`; zero for -1

There is room for two lists: while query t is computed, the list of query t + 1 is copied.

Axis letters: B batch, S capacity of the pool in entries, P pages, N entries per page, M pages of a
row's table, k entries listed, W lanes of a row of words, K channels, X keys, N keys padded to a
multiple of 128, C = 128 lanes; in `word_rows`, N blocks of M rows of words.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32, Shaped

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool
from pallas_kernels.tpu_attention_pull import where_seen

# Copies per unrolled group: their addresses differ from the group's by a constant.
_GROUP = 16


def in_lanes(x: Shaped[Array, "B T X"], fill: int) -> Int32[Array, "B T N"]:
    """Pad the last axis to a multiple of 128 lanes."""
    missing = -x.shape[2] % LANES
    return jnp.pad(x.astype(jnp.int32), ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def packing(dtype: Any) -> int:
    """Rows of the pool per row of words."""
    return 4 // jnp.dtype(dtype).itemsize


def word_rows(indices: Int[Array, "B T k"], pool: Pool, block: int) -> Int32[Array, "B N 1 M"]:
    """The rows of words to copy, for `block` queries (a divisor of T) at a time.

    They are inside the pool for -1 too. A block is one long row, so that the scalar core finds a
    number with a single addition.
    """
    batch, queries, k = indices.shape
    words = jnp.clip(indices, 0, pool.shape[2] - 1) // packing(array_of(pool).dtype)
    return words.reshape(batch, queries // block, 1, block * k)


def as_words(entries_ref: Any) -> Any:
    """A ref to rows of a pool as rows of words."""
    return entries_ref.bitcast(jnp.int32)


def copy_words(source: Any, to: Any, sem: Any) -> Any:
    """A copy between refs to words; a function of its own, so that tests can replace it."""
    return pltpu.make_async_copy(source, to, sem)


def array_of(pool: Pool) -> Array:
    """The array that holds the entries: [L, B, S, W], or [L, P, N, W] in pages."""
    match pool:
        case Fp8Rows():
            return pool.data
        case Paged():
            return pool.pages
        case _:
            return pool


class Stored(NamedTuple):
    """A pool as kernels read it.

    Attributes:
      array: [L, B, S, W]; or all pages one after another, [L, 1, P x N, W].
      offsets_B11M: rows of words from where page m would be in an array to where it is; None
        without pages.
      page: rows of words per page, a power of two; 0 without pages.
    """

    array: Array
    offsets_B11M: Int32[Array, "B 1 1 M"] | None
    page: int

    def offsets_spec(self) -> pl.BlockSpec | None:
        """Spec of the offsets, for grids whose first dim is rows of the batch."""
        if self.offsets_B11M is None:
            return None
        block = (1, *self.offsets_B11M.shape[1:])
        return pl.BlockSpec(block, lambda row, *_: (row, 0, 0, 0), memory_space=pltpu.SMEM)


def stored(pool: Pool) -> Stored:
    """A pool as kernels read it; numbers of the table that are no pages become some page's."""
    array = array_of(pool)
    if not isinstance(pool, Paged):
        return Stored(array, None, 0)
    layers, pages, size, width = array.shape
    page, places = size // packing(array.dtype), pool.table.shape[1]
    place_1M = jnp.arange(places, dtype=jnp.int32)[None]
    offsets_BM = jnp.clip(pool.table.astype(jnp.int32), 0, pages - 1) - place_1M
    return Stored(array.reshape(layers, 1, -1, width), (offsets_BM * page)[:, None, None], page)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the entries of a row of the batch are.

    Attributes:
      ref: HBM [S, W], the row's entries; or all pages, [P x N, W].
      offsets_ref: SMEM [1, 1, 1, M], the row's offsets; None without pages.
      page: as in `Stored`.
    """

    ref: Any
    offsets_ref: Any
    page: int

    @classmethod
    def of_row(cls, pool_ref: Any, layer: Any, row: Any, offsets_ref: Any, page: int) -> "Source":
        """The source of a row; `pool_ref` is a ref to `Stored.array`."""
        return cls(pool_ref.at[layer, 0 if page else row], offsets_ref, page)

    def at(self, word: Any) -> Any:
        """Where in `ref`, in rows of words, the row of words `word` of the row's entries is."""
        if not self.page:
            return word
        return word + self.offsets_ref[0, 0, 0, word >> (self.page.bit_length() - 1)]


class Lists:
    """Double buffer for the listed entries of alternate queries.

    Attributes:
      ref: the buffer, int32 [2 x k / 16, 16, W].
      sems: two or more DMA semaphores.
      groups: groups of 16 copies per list.
    """

    def __init__(self, ref: Any, sems: Any) -> None:
        self.ref, self.sems, self.groups = ref, sems, ref.shape[0] // 2

    @staticmethod
    def scratch(k: int, pool: Any) -> Any:
        """Shape of the scratch `ref`."""
        return pltpu.VMEM((2 * k // _GROUP, _GROUP, pool.shape[3]), jnp.int32)

    def start(self, words_ref: Any, query: Any, source: Source) -> None:
        """Start the copies of one query's list.

        Args:
          words_ref: [1, 1, 1, M] in SMEM, a block of `word_rows`.
          query: number of the query in the block.
          source: where to copy from.
        """
        words, first = as_words(source.ref), query % 2 * self.groups
        sem, listed = self.sems.at[query % 2], query * self.groups * _GROUP

        def group(g: Any, _: Any) -> None:
            for i in range(_GROUP):
                word = words_ref[0, 0, 0, listed + g * _GROUP + i]
                to = self.ref.at[first + g, pl.ds(i, 1)]
                copy_words(words.at[pl.ds(source.at(word), 1)], to, sem).start()

        jax.lax.fori_loop(0, self.groups, group, None)

    def wait(self, query: Any, indices_1k: Int32[Array, "1 k"], packed: Any, dtype: Any) -> Any:
        """Wait for one list's entries: [k, K] in `dtype`, zero for -1.

        `query` is as for `start`, and `packed` the pool's dtype.
        """
        ref = self.ref.at[pl.ds(query % 2 * self.groups, self.groups)]
        # Waits for as many bytes as all the copies have together.
        copy_words(ref, ref, self.sems.at[query % 2]).wait()
        words_kW = ref[...].reshape(indices_1k.shape[1], ref.shape[-1])
        return _pick(words_kW, column(indices_1k), packed).astype(dtype)


def column(row_1X: Any) -> Any:
    """Transpose one row of X lanes, a multiple of 128, to X rows of one lane."""
    return jnp.broadcast_to(row_1X, (8, row_1X.shape[1])).T[:, :1]


def zero_unseen(keys_XK: Float[Array, "X K"], seen_1N: Any) -> Float[Array, "X K"]:
    """Keep garbage out of products: 0 * NaN is NaN."""
    return where_seen(keys_XK, column(seen_1N)[: keys_XK.shape[0]] > 0)


def _pick(words_kW: Int32[Array, "k W"], index_k1: Any, packed: Any) -> Float[Array, "k K"]:
    """Pick each entry out of the words that it shares."""
    rows_per_word = packing(packed)
    shift_k1 = jnp.maximum(index_k1, 0) % rows_per_word * (32 // rows_per_word)
    shifted_kW = jax.lax.shift_right_logical(words_kW, jnp.broadcast_to(shift_k1, words_kW.shape))
    if packed == jnp.uint8:
        value_kK = _from_bytes(shifted_kW & 255)
    else:
        # A bfloat16 is the upper half of a float32.
        upper_kK = shifted_kW << 16 if packed == jnp.bfloat16 else words_kW
        value_kK = jax.lax.bitcast_convert_type(upper_kK, jnp.float32)
    return jnp.where(index_k1 >= 0, value_kK, 0.0)


def _from_bytes(byte_kW: Int32[Array, "k W"]) -> Float[Array, "k K"]:
    """`rows.decode`, without moving the codes to other lanes."""
    code_kK = byte_kW[:, : rows.CHANNELS]
    tail_kC = byte_kW[:, rows.CHANNELS :]  # high bytes of the rotated channels, then scales
    lane_k1 = jax.lax.broadcasted_iota(jnp.int32, code_kK.shape, 1)
    unrotated_kK = _e4m3(code_kK) * _scales(tail_kC)
    high_kC = pltpu.roll(tail_kC, LANES - rows.ROTATED, 1)
    word_kC = code_kK[:, -LANES:] | high_kC << 8
    rotated_kC = jax.lax.bitcast_convert_type(word_kC << 16, jnp.float32)
    rotated_kK = jnp.concatenate([rotated_kC] * (rows.CHANNELS // LANES), axis=1)
    return jnp.where(lane_k1 < rows.CODES, unrotated_kK, rotated_kK)


def _e4m3(code: Int32[Array, "k K"]) -> Float[Array, "k K"]:
    """E4M3 codes as float32, by changing the bias; subnormals, which TPUs flush, by subtraction."""
    magnitude = code & 127
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    value = jnp.where(magnitude < 8, 2.0 * (normal - 2.0**-7), normal)
    return jnp.where(code >= 128, -value, value)


def _scales(tail_kC: Int32[Array, "k C"]) -> Float[Array, "k K"]:
    """Each block's scale in all its channels, spread by a one-hot matmul, exact below 256."""
    shape = (LANES, rows.CHANNELS)
    from_CK = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - rows.ROTATED
    to_CK = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // rows.BLOCK
    one_hot_CK = (from_CK == to_CK).astype(jnp.float32).astype(jnp.bfloat16)
    exponent_kC = tail_kC.astype(jnp.float32).astype(jnp.bfloat16)
    exponent_kK = jnp.dot(exponent_kC, one_hot_CK, preferred_element_type=jnp.float32)
    return jax.lax.bitcast_convert_type(exponent_kK.astype(jnp.int32) << 23, jnp.float32)
