"""The k best of 8192 keys that lie in one multiprocessor's shared memory, without sort or scatter.

Keys are integers in the order of the scores. (1) Bisection on the key's bits finds the cut. (2) A
product with a triangle of ones ranks equal keys at the cut, and then the chosen ones. (3) Each slot
of the list finds its row by comparing ranks; a product with that one-hot matrix fetches the row's
prefix counts, by which the column is found, and the digits of its keys. Counts up to 128 and digits
of 11 bits are whole numbers that float16 holds exactly.

Axis letters: R rows (64), C columns (128): entry R * 128 + C; V slots of a block (64).
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

ROWS, COLUMNS, SLOTS = 64, 128, 64
SIZE = ROWS * COLUMNS
# Less than the key of any score.
NOTHING = -(2**31)
_DIGITS, _DIGIT_BITS = 3, 11

_i32, _f32, _f16 = jnp.int32, jnp.float32, jnp.float16
# How products want operands of 16 bits to lie.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_MATRIX, _BY_ROW, _BY_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)
# JAX 0.10 wants the index as an argument of its own, of which 0.11 warns.
_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect._empty else ()


def load(ref: Any, layout: Any) -> Array:
    """What a reference to shared memory holds, as a register array of this layout."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def iota(shape: tuple[int, ...], dim: int, layout: Any = _MATRIX) -> Array:
    """Numbers along a dim, laid out like a product unless told otherwise."""
    return plgpu.layout_cast(jax.lax.broadcasted_iota(_i32, shape, dim), layout)


def product(a_ref: Any, b_ref: Any) -> Array:
    """Matrix product of shared memory on tensor cores, in float32."""
    plgpu.commit_smem()

    def multiply(acc_ref: Any) -> Array:
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    shape = (a_ref.shape[0], b_ref.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, _f32))


def _along_rows(vector: Array, shape: tuple[int, int]) -> Array:
    return jax.lax.broadcast_in_dim(vector, shape, (0,))


def _along_columns(vector: Array, shape: tuple[int, int]) -> Array:
    return jax.lax.broadcast_in_dim(vector, shape, (1,))


def cut(keys_ref: Any, k: int) -> tuple[Array, Array]:
    """The least key chosen, and how many of the keys equal to it are chosen."""
    keys_RC = keys_ref[...]
    at_least = lambda key: jnp.sum((keys_RC >= key).astype(_i32))

    def narrow(state: Any) -> Any:
        bit, low, count = state
        # Keys without their sign: low is NOTHING plus the bits found.
        tried = low | jax.lax.shift_left(jnp.int32(1), bit)
        reached = at_least(tried ^ NOTHING)
        keep = reached >= k
        return bit - 1, jnp.where(keep, tried, low), jnp.where(keep, reached, count)

    going = lambda state: (state[0] >= 0) & (state[2] > k)
    start = jnp.int32(31), jnp.int32(0), at_least(NOTHING + 1)
    _, low, _ = jax.lax.while_loop(going, narrow, start)
    least = jnp.maximum(low ^ NOTHING, NOTHING + 1)
    return least, k - jnp.sum((keys_RC > least).astype(_i32))


def scratch(*, digits: bool) -> dict[str, Any]:
    """Shared memory for `select`, with room for the digits of keys if those are wanted."""
    planes = 1 + _DIGITS * digits
    return {
        "mask_RC": plgpu.SMEM((ROWS, COLUMNS), _f16, transforms=TILED),
        "ones_CC": plgpu.SMEM((COLUMNS, COLUMNS), _f16, transforms=TILED),
        "planes_PRC": plgpu.SMEM((planes, ROWS, COLUMNS), _f16, transforms=TILED),
        "row_VR": plgpu.SMEM((SLOTS, ROWS), _f16, transforms=TILED),
        "total_R": plgpu.SMEM((ROWS,), _i32),
        "before_R": plgpu.SMEM((ROWS,), _i32),
    }


def slots(k: int) -> int:
    """Entries of a list of k: a warpgroup takes them 128 at a time."""
    return -(-k // (2 * SLOTS)) * (2 * SLOTS)


def select(keys_ref: Any, at_ref: Any, key_ref: Any, k: int, work: Any) -> None:
    """Where the k best keys are, ascending, then -1; of equal keys the first are chosen.

    Args:
      keys_ref: i32[R, C] in shared memory.
      at_ref: receives i32[slots(k)]: R * 128 + C.
      key_ref: receives their keys, NOTHING where there is none; None if they are not wanted.
      k: how many.
      work: references to `scratch`.
    """
    least, ties = cut(keys_ref, k)
    _triangle(work["ones_CC"])
    keys_RC = load(keys_ref, _MATRIX)
    rank_RC = _ranks(keys_RC == least, work)
    chosen_RC = (keys_RC > least) | ((keys_RC == least) & (rank_RC <= ties))
    _ranks(chosen_RC, work)
    if key_ref is not None:
        for digit in range(_DIGITS):
            part_RC = jax.lax.shift_right_logical(keys_RC, jnp.int32(digit * _DIGIT_BITS))
            part_RC = (part_RC & (2**_DIGIT_BITS - 1)).astype(_f32).astype(_f16)
            work["planes_PRC"][1 + digit] = part_RC

    @pl.loop(0, slots(k) // SLOTS)
    def _(block: Array) -> None:
        _list_block(block * SLOTS, at_ref, key_ref, work)


def _triangle(ones_ref: Any) -> None:
    shape = (COLUMNS, COLUMNS)
    ones_ref[...] = (iota(shape, 0) <= iota(shape, 1)).astype(_f32).astype(_f16)


def _ranks(mask_RC: Array, work: Any) -> Array:
    """How many are true up to each, itself included; leaves what a list needs in `work`."""
    work["mask_RC"][...] = mask_RC.astype(_f32).astype(_f16)
    within_RC = product(work["mask_RC"], work["ones_CC"])
    work["planes_PRC"][0] = within_RC.astype(_f16)
    work["total_R"][...] = jnp.sum(mask_RC.astype(_i32), axis=1)
    square = (ROWS, ROWS)
    total_RR = _along_columns(load(work["total_R"], _BY_COLUMN), square)
    earlier_RR = iota(square, 1) < iota(square, 0)
    before_R = jnp.sum(jnp.where(earlier_RR, total_RR, 0), axis=1)
    work["before_R"][...] = before_R
    return within_RC.astype(_i32) + _along_rows(before_R, (ROWS, COLUMNS))


def _list_block(first: Array, at_ref: Any, key_ref: Any, work: Any) -> None:
    """Fill one block of slots."""
    square, wide = (SLOTS, ROWS), (SLOTS, COLUMNS)
    before_VR = _along_columns(load(work["before_R"], _BY_COLUMN), square)
    total_VR = _along_columns(load(work["total_R"], _BY_COLUMN), square)
    slot_VR = iota(square, 0) + first
    here_VR = (slot_VR >= before_VR) & (slot_VR < before_VR + total_VR)
    work["row_VR"][...] = here_VR.astype(_f32).astype(_f16)
    fetch = lambda plane: product(work["row_VR"], work["planes_PRC"].at[plane]).astype(_i32)

    rank_V = jnp.sum(jnp.where(here_VR, slot_VR - before_VR, 0), axis=1)
    column_V = jnp.sum((fetch(0) <= _along_rows(rank_V, wide)).astype(_i32), axis=1)
    row_V = jnp.sum(jnp.where(here_VR, iota(square, 1), 0), axis=1)
    there_V = jnp.sum(here_VR.astype(_i32), axis=1) > 0
    block = pl.ds(first, SLOTS)
    at_ref[block] = jnp.where(there_V, row_V * COLUMNS + column_V, -1)
    if key_ref is None:
        return
    this_VC = iota(wide, 1) == _along_rows(column_V, wide)
    key_V = jnp.where(there_V, 0, NOTHING)
    for digit in range(_DIGITS):
        part_V = jnp.sum(jnp.where(this_VC, fetch(1 + digit), 0), axis=1)
        key_V |= jax.lax.shift_left(part_V, jnp.int32(digit * _DIGIT_BITS))
    key_ref[block] = key_V
