"""Reject values that no checkpoint may hold and that would surface as NaN far from their cause.

Every tensor is checked as it is read, whichever command reads it. The checks are mere reductions
over integers of the same width, which run at memory bandwidth.
"""

import itertools
from collections.abc import Sequence
from typing import NoReturn

import ml_dtypes
import numpy as np

from v4jax.checkpoints.disk import CheckpointError

# The smallest positive bit pattern that is not finite; with the sign bit set, the same.
_FIRST_BITS = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
}
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
# 448, the largest E4M3 value, times 2**119 is finite in float32 and bfloat16; times 2**120 is not.
_MAX_EXPONENT = 119
_E8M0_BIAS = 127
_DAMAGED = "The file is damaged; download it again."


def are_finite(values: np.ndarray) -> bool:
    """Whether floats of any width hold neither NaN nor infinity; true for integers."""
    first = _FIRST_BITS.get(values.dtype)
    if first is None or not values.size:
        return True
    size = values.dtype.itemsize
    signed, unsigned = values.view(f"i{size}"), values.view(f"u{size}")
    return bool(signed.max() < first and unsigned.max() < first | 1 << (8 * size - 1))


def check(name: str, values: np.ndarray, *, start: Sequence[int] = ()) -> None:
    """Reject a tensor that holds NaN or infinity, or FP8 codes for them.

    Args:
      name: file and tensor, for the message.
      values: the tensor or a part of it. E8M0 is checked as scales, integers not at all.
      start: index of the first value, if they are a part of a tensor; 0 for dims left out.

    Raises:
      CheckpointError: the message gives the first bad position.
    """
    if values.dtype == _E8M0:
        check_scales(name, values, start=start)
    elif not are_finite(values):
        with np.errstate(invalid="ignore"):
            bad = ~np.isfinite(values)
        _refuse(name, bad, "values that are not finite numbers", start)


def check_scales(name: str, scales: np.ndarray, *, start: Sequence[int] = ()) -> None:
    """Reject scales that are not from 0 to 2**119, above which FP8 codes overflow.

    Args:
      name: file and tensor, for the message.
      scales: E8M0, or its bytes as uint8, in which 255 is NaN; or floats.
      start: see `check`.

    Raises:
      CheckpointError: the message gives the first bad position.
    """
    if scales.itemsize == 1:
        bad = scales.view(np.uint8) > _E8M0_BIAS + _MAX_EXPONENT
    else:
        bad = ~((scales >= 0) & (scales <= 2.0**_MAX_EXPONENT))
    if bad.any():
        problem = f"scales that are not finite numbers from 0 to 2**{_MAX_EXPONENT}"
        _refuse(name, bad, problem, start)


def check_ids(name: str, ids: np.ndarray, count: int, *, start: Sequence[int] = ()) -> None:
    """Reject ids that are not from 0 to `count` - 1.

    Raises:
      CheckpointError: the message gives the first bad position.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        problem = f"ids outside 0 to {count - 1}, the experts in config.json"
        _refuse(name, (ids < 0) | (ids >= count), problem, start)


def _refuse(name: str, bad: np.ndarray, problem: str, start: Sequence[int]) -> NoReturn:
    inside = map(int, np.unravel_index(int(bad.argmax()), bad.shape))
    at = [i + first for i, first in itertools.zip_longest(inside, start, fillvalue=0)]
    raise CheckpointError(f"{name} has {int(bad.sum()):,} {problem}, the first at {at}. {_DAMAGED}")
