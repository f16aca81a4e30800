"""The k best of 8192 keys in one multiprocessor's shared memory, without sort or scatter.

Keys are integers that sort like the scores. (1) Bisection on the key's bits finds the cut. (2) A
product with a triangle of ones ranks the keys equal to the cut, and then the chosen ones. (3) Each
slot of the list finds its row by comparing ranks; a product with that one-hot matrix fetches the
row's prefix counts, which give the column. Keys are fetched the same way, digit by digit. float16
holds counts up to 128 and digits of 11 bits exactly.

Axis letters: R rows (64), C columns (128): entry R * 128 + C; V slots per block (64).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import TILED, along, load

ROWS, COLUMNS, SLOTS = 64, 128, 64
SIZE = ROWS * COLUMNS
# Less than the key of any score.
NOTHING = -(2**31)
_DIGITS, _DIGIT_BITS = 3, 11

_i32, _f32, _f16 = jnp.int32, jnp.float32, jnp.float16
_MATRIX, _BY_ROW, _BY_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)


def iota(shape: tuple[int, ...], dim: int, layout: Any = _MATRIX) -> Array:
    """Numbers along a dim, by default in the layout of a product."""
    return plgpu.layout_cast(jax.lax.broadcasted_iota(_i32, shape, dim), layout)


def product(a_ref: Any, b_ref: Any) -> Array:
    """`mosaic_gpu.product` of matrices that were just written."""
    plgpu.commit_smem()
    return mosaic_gpu.product(a_ref, b_ref)


def cut(keys_ref: Any, k: int) -> tuple[Array, Array]:
    """The smallest chosen key, and how many of the keys equal to it are chosen."""
    keys_RC = keys_ref[...]
    at_least = lambda key: jnp.sum((keys_RC >= key).astype(_i32))

    def narrow(state: Any) -> Any:
        bit, low, count = state
        # Keys are offset to be unsigned: `low ^ NOTHING` is the key of the bits found so far.
        trial = low | jax.lax.shift_left(jnp.int32(1), bit)
        reached = at_least(trial ^ NOTHING)
        accept = reached >= k
        return bit - 1, jnp.where(accept, trial, low), jnp.where(accept, reached, count)

    going = lambda state: (state[0] >= 0) & (state[2] > k)
    start = jnp.int32(31), jnp.int32(0), at_least(NOTHING + 1)
    _, low, _ = jax.lax.while_loop(going, narrow, start)
    least = jnp.maximum(low ^ NOTHING, NOTHING + 1)
    return least, k - jnp.sum((keys_RC > least).astype(_i32))


def slots(k: int) -> int:
    """Length of a list of k entries: a warpgroup processes 128 at a time."""
    return -(-k // (2 * SLOTS)) * (2 * SLOTS)


def select(keys_ref: Any, at_ref: Any, k: int) -> None:
    """Write the places of the k best keys, ascending, then -1; ties go to the first.

    Args:
      keys_ref: i32[R, C] in shared memory.
      at_ref: i32[slots(k)], receives the places, R * 128 + C.
      k: keys to choose.
    """

    def run(**ranks: Any) -> None:
        choose = functools.partial(_rank_chosen, keys_ref, k, ranks)
        pl.run_scoped(choose, _matrix(ROWS, COLUMNS), _matrix(COLUMNS, COLUMNS))
        list_block = functools.partial(_list_block, at_ref, ranks)
        pl.run_scoped(lambda row_VR: _each_block(at_ref, list_block, row_VR), _matrix(SLOTS, ROWS))

    vector = plgpu.SMEM((ROWS,), _i32)
    pl.run_scoped(run, within_RC=_matrix(ROWS, COLUMNS), total_R=vector, before_R=vector)


def fetch(keys_ref: Any, at_ref: Any, key_ref: Any) -> None:
    """Write the keys at these places, NOTHING where there is none.

    Args:
      keys_ref: i32[R, C] in shared memory.
      at_ref: i32[slots(k)], written by `select`.
      key_ref: i32[slots(k)], receives the keys.
    """

    def run(digit_RC: Any, row_VR: Any) -> None:
        for digit in range(_DIGITS):
            shift = jnp.int32(digit * _DIGIT_BITS)
            part_RC = jax.lax.shift_right_logical(load(keys_ref, _MATRIX), shift)
            digit_RC[...] = (part_RC & (2**_DIGIT_BITS - 1)).astype(_f32).astype(_f16)
            add = functools.partial(_fetch_block, at_ref, key_ref, digit_RC, shift, digit == 0)
            _each_block(at_ref, add, row_VR)

    pl.run_scoped(run, _matrix(ROWS, COLUMNS), _matrix(SLOTS, ROWS))


def _matrix(rows: int, columns: int) -> Any:
    return plgpu.SMEM((rows, columns), _f16, transforms=TILED)


def _each_block(at_ref: Any, do: Callable[..., None], row_VR: Any) -> None:
    pl.loop(0, at_ref.shape[0] // SLOTS)(lambda block: do(row_VR, block * SLOTS))


def _rank_chosen(keys_ref: Any, k: int, ranks: Any, mask_RC: Any, ones_CC: Any) -> None:
    """Fill `ranks` with the numbers of chosen keys: within each row, per row, and before a row."""
    least, ties = cut(keys_ref, k)
    shape = (COLUMNS, COLUMNS)
    ones_CC[...] = (iota(shape, 0) <= iota(shape, 1)).astype(_f32).astype(_f16)
    keys_RC = load(keys_ref, _MATRIX)
    rank_RC = _rank(keys_RC == least, ranks, mask_RC, ones_CC)
    chosen_RC = (keys_RC > least) | ((keys_RC == least) & (rank_RC <= ties))
    _rank(chosen_RC, ranks, mask_RC, ones_CC)


def _rank(here_RC: Array, ranks: Any, mask_RC: Any, ones_CC: Any) -> Array:
    """How many are true up to and including each."""
    mask_RC[...] = here_RC.astype(_f32).astype(_f16)
    within_RC = product(mask_RC, ones_CC)
    ranks["within_RC"][...] = within_RC.astype(_f16)
    ranks["total_R"][...] = jnp.sum(here_RC.astype(_i32), axis=1)
    square = (ROWS, ROWS)
    total_RR = along(load(ranks["total_R"], _BY_COLUMN), square, 1)
    before_R = jnp.sum(jnp.where(iota(square, 1) < iota(square, 0), total_RR, 0), axis=1)
    ranks["before_R"][...] = before_R
    return within_RC.astype(_i32) + along(before_R, (ROWS, COLUMNS), 0)


def _list_block(at_ref: Any, ranks: Any, row_VR: Any, first: Array) -> None:
    """Write the places of one block of slots."""
    square = (SLOTS, ROWS)
    before_VR = along(load(ranks["before_R"], _BY_COLUMN), square, 1)
    total_VR = along(load(ranks["total_R"], _BY_COLUMN), square, 1)
    slot_VR = iota(square, 0) + first
    here_VR = (slot_VR >= before_VR) & (slot_VR < before_VR + total_VR)
    row_VR[...] = here_VR.astype(_f32).astype(_f16)
    within_VC = product(row_VR, ranks["within_RC"]).astype(_i32)
    rank_V = jnp.sum(jnp.where(here_VR, slot_VR - before_VR, 0), axis=1)
    column_V = jnp.sum((within_VC <= along(rank_V, (SLOTS, COLUMNS), 0)).astype(_i32), axis=1)
    row_V = jnp.sum(jnp.where(here_VR, iota(square, 1), 0), axis=1)
    exists_V = jnp.sum(here_VR.astype(_i32), axis=1) > 0
    at_ref[pl.ds(first, SLOTS)] = jnp.where(exists_V, row_V * COLUMNS + column_V, -1)


def _fetch_block(
    at_ref: Any, key_ref: Any, digit_RC: Any, shift: Array, clear: bool, row_VR: Any, first: Array
) -> None:
    """Add one digit to the keys of one block of slots."""
    block = pl.ds(first, SLOTS)
    at_V = load(at_ref.at[block], _BY_ROW)
    row_V = jax.lax.shift_right_arithmetic(at_V, jnp.int32(COLUMNS.bit_length() - 1))
    here_VR = iota((SLOTS, ROWS), 1) == along(row_V, (SLOTS, ROWS), 0)
    row_VR[...] = here_VR.astype(_f32).astype(_f16)
    digit_VC = product(row_VR, digit_RC).astype(_i32)
    shape = (SLOTS, COLUMNS)
    this_VC = iota(shape, 1) == along(at_V & (COLUMNS - 1), shape, 0)
    part_V = jax.lax.shift_left(jnp.sum(jnp.where(this_VC, digit_VC, 0), axis=1), shift)
    before_V = jnp.where(at_V < 0, NOTHING, 0) if clear else load(key_ref.at[block], _BY_ROW)
    key_ref[block] = before_V | part_V
