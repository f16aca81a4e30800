"""Listed entries brought to VMEM by a small copy each, out of the pool as it lies in HBM.

XLA tiles rows of a pool by eight and more, and packs two bfloat16 rows, or four of bytes, into one
row of 32-bit words. A row of words can be copied alone, so an entry comes with those that share its
words, and is picked out here.

Axis letters: k entries listed, W lanes of a row of words, K channels, X keys, R rows of a mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32, Shaped

from pallas_kernels.sparse_attention import rows

LANES = 128
# Copies in straight line: their addresses differ from the group's by a constant each.
_GROUP = 16


def in_lanes(x: Shaped[Array, "B T X"], fill: int) -> Int32[Array, "B T N"]:
    """Filled up to whole lanes."""
    missing = -x.shape[2] % LANES
    return jnp.pad(x.astype(jnp.int32), ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def packing(dtype: Any) -> int:
    """Rows to a row of words."""
    return 4 // jnp.dtype(dtype).itemsize


def word_rows(indices: Int[Array, "B T k"], pool: Any, block: int) -> Int32[Array, "B N 1 M"]:
    """The rows of words to copy, those of `block` queries, which divides T, one after another.

    They are inside the pool also for -1. In one long row the scalar core finds a number by one
    addition.
    """
    batch, queries, k = indices.shape
    words = jnp.clip(indices, 0, pool.shape[2] - 1) // packing(pool.dtype)
    return words.reshape(batch, queries // block, 1, block * k)


def as_words(entries_ref: Any) -> Any:
    """Rows of a pool as rows of words."""
    return entries_ref.bitcast(jnp.int32)


def copy_words(source: Any, to: Any, sem: Any) -> Any:
    """A copy between references to words: a name of its own, for interpreters without words."""
    return pltpu.make_async_copy(source, to, sem)


class Lists:
    """Room for the entries of two lists, of alternate queries, and who listed them.

    Attributes:
      ref: [2 x k / 16, 16, W], int32.
      sems: at least two DMA semaphores.
    """

    def __init__(self, ref: Any, sems: Any) -> None:
        self.ref, self.sems, self.groups = ref, sems, ref.shape[0] // 2

    @staticmethod
    def room(k: int, pool: Any) -> Any:
        """The scratch of `ref`."""
        return pltpu.VMEM((2 * k // _GROUP, _GROUP, pool.shape[3]), jnp.int32)

    def start(self, words_ref: Any, query: Any, entries_ref: Any) -> None:
        """Start the copies of one query's list.

        Args:
          words_ref: [1, 1, 1, M] in SMEM, a block of `word_rows`.
          query: whose list.
          entries_ref: rows of the pool in HBM.
        """
        source, first = as_words(entries_ref), query % 2 * self.groups
        sem, listed = self.sems.at[query % 2], query * self.groups * _GROUP

        def group(g: Any, _: Any) -> None:
            for i in range(_GROUP):
                word = words_ref[0, 0, 0, listed + g * _GROUP + i]
                to = self.ref.at[first + g, pl.ds(i, 1)]
                copy_words(source.at[pl.ds(word, 1)], to, sem).start()

        jax.lax.fori_loop(0, self.groups, group, None)

    def wait(self, query: Any, indices_1k: Int32[Array, "1 k"], packed: Any, dtype: Any) -> Any:
        """Wait for one list's entries: [k, K] in `dtype`, zero for -1.

        Args:
          query: as at the start.
          indices_1k: its list.
          packed: dtype of the pool.
          dtype: of the result.
        """
        ref = self.ref.at[pl.ds(query % 2 * self.groups, self.groups)]
        # For as many bytes as all copies have.
        copy_words(ref, ref, self.sems.at[query % 2]).wait()
        words_kW = ref[...].reshape(indices_1k.shape[1], ref.shape[-1])
        return _pick(words_kW, column(indices_1k), packed).astype(dtype)


def column(row_1X: Any) -> Any:
    """One row of X lanes, a multiple of 128, as X rows of one lane."""
    return jnp.broadcast_to(row_1X, (8, row_1X.shape[1])).T[:, :1]


def zero_unseen(keys_XK: Float[Array, "X K"], seen_1N: Any) -> Float[Array, "X K"]:
    """Garbage must not reach a product: 0 * NaN is NaN. N is X filled up to whole lanes."""
    seen_X1 = column(seen_1N)[: keys_XK.shape[0]] > 0
    return jnp.where(seen_X1, keys_XK, jnp.zeros((), keys_XK.dtype))


def _pick(words_kW: Int32[Array, "k W"], index_k1: Any, packed: Any) -> Float[Array, "k K"]:
    """Each entry out of the words that it shares."""
    rows_each = packing(packed)
    shift_k1 = jnp.maximum(index_k1, 0) % rows_each * (32 // rows_each)
    mine_kW = jax.lax.shift_right_logical(words_kW, jnp.broadcast_to(shift_k1, words_kW.shape))
    if packed == jnp.uint8:
        value_kK = _from_bytes(mine_kW & 255)
    else:
        # A bfloat16 is the upper half of a float32.
        upper_kK = mine_kW << 16 if packed == jnp.bfloat16 else words_kW
        value_kK = jax.lax.bitcast_convert_type(upper_kK, jnp.float32)
    return jnp.where(index_k1 >= 0, value_kK, 0.0)


def _from_bytes(byte_kW: Int32[Array, "k W"]) -> Float[Array, "k K"]:
    """`rows.decode`, with lanes where they are."""
    code_kK = byte_kW[:, : rows.CHANNELS]
    tail_kC = byte_kW[:, rows.CHANNELS :]  # high bytes of the rotated channels, then scales
    lane_k1 = jax.lax.broadcasted_iota(jnp.int32, code_kK.shape, 1)
    straight_kK = _e4m3(code_kK) * _scales(tail_kC)
    high_kC = pltpu.roll(tail_kC, LANES - rows.ROTATED, 1)
    word_kC = code_kK[:, -LANES:] | high_kC << 8
    rotated_kC = jax.lax.bitcast_convert_type(word_kC << 16, jnp.float32)
    rotated_kK = jnp.concatenate([rotated_kC] * (rows.CHANNELS // LANES), axis=1)
    return jnp.where(lane_k1 < rows.CODES, straight_kK, rotated_kK)


def _e4m3(code: Int32[Array, "k K"]) -> Float[Array, "k K"]:
    """E4M3 is float32 with another bias; subnormals, which TPUs flush, by a subtraction."""
    magnitude = code & 127
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    value = jnp.where(magnitude < 8, 2.0 * (normal - 2.0**-7), normal)
    return jnp.where(code >= 128, -value, value)


def _scales(tail_kC: Int32[Array, "k C"]) -> Float[Array, "k K"]:
    """Each block's scale in all its channels: spread by a matmul with ones, exact below 256."""
    shape = (LANES, rows.CHANNELS)
    from_CK = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - rows.ROTATED
    to_CK = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // rows.BLOCK
    ones_CK = (from_CK == to_CK).astype(jnp.float32).astype(jnp.bfloat16)
    exponent_kC = tail_kC.astype(jnp.float32).astype(jnp.bfloat16)
    exponent_kK = jnp.dot(exponent_kC, ones_CK, preferred_element_type=jnp.float32)
    return jax.lax.bitcast_convert_type(exponent_kK.astype(jnp.int32) << 23, jnp.float32)
