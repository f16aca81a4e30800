"""Values that no checkpoint may hold: they would come out of the model as NaN, far from the cause.

Every tensor is checked as it is read, whichever command reads it. Only reductions over integers of
the same width are made, which run at the memory's speed.
"""

from typing import NoReturn

import ml_dtypes
import numpy as np

from v4jax.checkpoints.disk import CheckpointError

# The bits of the first number, counted upwards, that is not finite; the sign's bit set, the same.
_FIRST_BITS = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
}
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
# 448, E4M3's largest number, times this is finite in float32 and bfloat16; times twice this is not.
_MOST_EXPONENT = 119
_E8M0_BIAS = 127
_DAMAGED = "The file is damaged; download it again."


def are_finite(values: np.ndarray) -> bool:
    """Whether floats, of any width, hold neither NaN nor infinity; true of integers."""
    first = _FIRST_BITS.get(values.dtype)
    if first is None or not values.size:
        return True
    size = values.dtype.itemsize
    signed, unsigned = values.view(f"i{size}"), values.view(f"u{size}")
    return bool(signed.max() < first and unsigned.max() < first | 1 << (8 * size - 1))


def check(name: str, values: np.ndarray, *, first_row: int = 0) -> None:
    """Refuse a tensor with NaN or infinity in it, of FP8 with a code that stands for NaN.

    Args:
      name: the file and the tensor, for the message.
      values: all of it or some of its rows. E8M0 is checked as scales, integers are not.
      first_row: the row that `values` begin with.

    Raises:
      CheckpointError: naming the first bad position.
    """
    if values.dtype == _E8M0:
        check_scales(name, values, first_row=first_row)
    elif not are_finite(values):
        with np.errstate(invalid="ignore"):
            bad = ~np.isfinite(values)
        _refuse(name, bad, "values that are not finite numbers", first_row)


def check_scales(name: str, scales: np.ndarray, *, first_row: int = 0) -> None:
    """Refuse scales that are no numbers from 0 to 2**119, above which FP8 codes overflow.

    Args:
      name: the file and the tensor, for the message.
      scales: E8M0, or its bytes as uint8, in which 255 is NaN; or floats.
      first_row: the row that `scales` begin with.

    Raises:
      CheckpointError: naming the first bad position.
    """
    if scales.itemsize == 1:
        bad = scales.view(np.uint8) > _E8M0_BIAS + _MOST_EXPONENT
    else:
        bad = ~((scales >= 0) & (scales <= 2.0**_MOST_EXPONENT))
    if bad.any():
        says = f"scales that are not finite numbers from 0 to 2**{_MOST_EXPONENT}"
        _refuse(name, bad, says, first_row)


def check_ids(name: str, ids: np.ndarray, count: int, *, first_row: int = 0) -> None:
    """Refuse ids that are not 0 to `count` - 1.

    Raises:
      CheckpointError: naming the first bad position.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        says = f"ids outside 0 to {count - 1}, the experts that config.json tells of"
        _refuse(name, (ids < 0) | (ids >= count), says, first_row)


def _refuse(name: str, bad: np.ndarray, says: str, first_row: int) -> NoReturn:
    at = [int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape)]
    if at:
        at[0] += first_row
    raise CheckpointError(f"{name} has {int(bad.sum()):,} {says}, the first at {at}. {_DAMAGED}")
