"""The number formats of the released checkpoints, each as a table of its codes' values.

Codes are uint8 arrays, values float64. Axis letters: O output rows and I inputs of a weight matrix;
`...` is any leading shape.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126


def _positive_values(exponent_bits: int, mantissa_bits: int, bias: int) -> Float[np.ndarray, " n"]:
    code = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
    fraction = mantissa / 2**mantissa_bits
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    return np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)


_E4M3 = _positive_values(4, 3, bias=7)[:-1]  # the last code, 0x7f, is NaN
_E2M1 = _positive_values(2, 1, bias=1)
E4M3_VALUES = np.concatenate([_E4M3, [np.nan], -_E4M3, [np.nan]])
E2M1_VALUES = np.concatenate([_E2M1, -_E2M1])


def decode_e4m3(codes: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Values of FP8 E4M3 codes (no infinities; 0x7f and 0xff are NaN)."""
    return E4M3_VALUES[codes]


def decode_e2m1(codes: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Values of FP4 E2M1 codes 0..15, one code per element."""
    return E2M1_VALUES[codes]


def decode_e8m0(codes: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Scales 2^(code - 127); code 255 is NaN."""
    exponent = codes.astype(np.int32) - 127
    return np.where(codes == 255, np.nan, np.ldexp(1.0, exponent))


def _nearest_code(
    x: Float[np.ndarray, "..."], positive: Float[np.ndarray, " n"], sign_bit: int
) -> UInt8[np.ndarray, "..."]:
    midpoints = (positive[1:] + positive[:-1]) / 2
    magnitude = np.minimum(np.abs(x).astype(np.float64), positive[-1])
    code = np.searchsorted(midpoints, magnitude, side="left")  # a tie gets the lower code
    tie = magnitude == np.append(midpoints, np.inf)[code]
    code = code + (tie & (code % 2 == 1))  # an even code has an even mantissa
    return (code | np.where(np.signbit(x), sign_bit, 0)).astype(np.uint8)


def encode_e4m3(x: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """FP8 E4M3 codes: clamped to +-448, then rounded to nearest, ties to even; NaN is 0x7f."""
    code = _nearest_code(np.nan_to_num(x, nan=0.0), _E4M3, 0x80)
    return np.where(np.isnan(x), np.uint8(0x7F), code)


def encode_e2m1(x: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """FP4 E2M1 codes: clamped to +-6, then rounded to nearest, ties to even mantissa.

    Raises:
      ValueError: `x` has a NaN, which the format cannot represent.
    """
    if np.isnan(x).any():
        raise ValueError("encode_e2m1: NaN has no E2M1 code; look for its origin upstream.")
    return _nearest_code(x, _E2M1, 0x8)


def dequantize_fp8(
    codes_OI: UInt8[np.ndarray, "O I"], scales: Float[np.ndarray, "o i"], block: int = 128
) -> Float[np.ndarray, "O I"]:
    """A matrix stored as E4M3, one scale per `block` x `block` tile; edge tiles may be partial."""
    scale_OI = np.repeat(np.repeat(scales, block, axis=0), block, axis=1)
    n_out, n_in = codes_OI.shape
    return decode_e4m3(codes_OI) * scale_OI[:n_out, :n_in]


def dequantize_fp4(
    packed: Int[np.ndarray, "O half_I"], scales: Float[np.ndarray, "O i"], block: int = 32
) -> Float[np.ndarray, "O I"]:
    """A matrix in E2M1, two inputs per byte (low nibble first), one scale per row and block."""
    byte = packed.view(np.uint8)
    codes_OI = np.stack([byte & 0xF, byte >> 4], axis=-1).reshape(len(packed), -1)
    scale_OI = np.repeat(scales, block, axis=1)[:, : codes_OI.shape[1]]
    return decode_e2m1(codes_OI) * scale_OI


def power_of_two_at_least(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The smallest power of two that is at least `x`, for positive `x`."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.ones_like(x), exponent - (mantissa == 0.5))


def fake_quant_fp8(
    x: Float[np.ndarray, "... n"], block: int, amax_floor: float = FP8_AMAX_FLOOR
) -> Float[np.ndarray, "... n"]:
    """Round `x` to E4M3 times a power of two per `block` channels; the last block may be short.

    The scale is the smallest power of two that brings max(|block|, amax_floor) within 448.
    """
    return _fake_quant(x, block, amax_floor, E4M3_MAX, lambda y: decode_e4m3(encode_e4m3(y)))


def fake_quant_fp4(x: Float[np.ndarray, "... n"], block: int = 32) -> Float[np.ndarray, "... n"]:
    """Round `x` to E2M1 times a power of two, chosen per block as in `fake_quant_fp8`."""
    return _fake_quant(x, block, FP4_AMAX_FLOOR, E2M1_MAX, lambda y: decode_e2m1(encode_e2m1(y)))


def _fake_quant(
    x: Float[np.ndarray, "... n"],
    block: int,
    amax_floor: float,
    largest: float,
    round_trip: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, "... n"]:
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        amax = np.maximum(np.abs(part).max(axis=-1, keepdims=True), x.dtype.type(amax_floor))
        scale = power_of_two_at_least(amax / largest)
        out[..., start : start + block] = round_trip(part / scale) * scale
    return out


def hadamard(x: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    """Orthonormal Walsh-Hadamard transform of the last axis, in Sylvester order, without signs.

    Raises:
      ValueError: the last axis is not a power of two.
    """
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"hadamard: the last axis is {n}; it must be a power of two.")
    width = 1
    while width < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * width), 2, width)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([even + odd, even - odd], axis=-2).reshape(x.shape)
        width *= 2
    return x * x.dtype.type(n**-0.5)
