"""Convert between the checkpoint's arrays and ours on the host: repack, decode, encode in NumPy.

The checkpoint stores matrices [N, K]: E4M3 with a scale per 128 x 128 block, or E2M1 with a scale
per row and 32 columns, byte j of a row holding columns 2j (low nibble) and 2j + 1 (high).

Axis letters: N output channels, K input channels, J bytes of a row of E2M1 codes.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int8, Shaped, UInt8

from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_STRIP = 16
# Table lookups are several times faster than ml_dtypes' casts.
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float32)
_BYTE = np.arange(256)
_E2M1_PAIRS = _E2M1_VALUES[np.stack([_BYTE & 15, _BYTE >> 4], axis=-1)]


def _transposed(x: Shaped[np.ndarray, "*stack N K"]) -> Shaped[np.ndarray, "*stack K N"]:
    *stack, rows, columns = x.shape
    out = np.empty((*stack, columns, rows), x.dtype)
    # Narrow strips stay in the cache: 4 times as fast as NumPy's own transposed copy.
    for row in range(0, rows, _STRIP):
        strip = slice(row, row + _STRIP)
        out[..., strip] = np.swapaxes(x[..., strip, :], -1, -2)
    return out


def fp8_from_checkpoint(
    weight: Shaped[np.ndarray, "*stack N K"], scale: Shaped[np.ndarray, "*stack n k"]
) -> tuple[Shaped[np.ndarray, "*stack K N"], Shaped[np.ndarray, "*stack k n"]]:
    """The arrays of an `Fp8Weight`."""
    return _transposed(weight), _transposed(scale)


def fp8_to_checkpoint(
    codes: Shaped[np.ndarray, "*stack K N"], scale: Shaped[np.ndarray, "*stack k n"]
) -> tuple[Shaped[np.ndarray, "*stack N K"], Shaped[np.ndarray, "*stack n k"]]:
    """The exact inverse of `fp8_from_checkpoint`."""
    return _transposed(codes), _transposed(scale)


def fp4_from_checkpoint(
    packed: Int8[np.ndarray, "*stack N J"], scale: Shaped[np.ndarray, "*stack N k"]
) -> tuple[UInt8[np.ndarray, "*stack J N"], Shaped[np.ndarray, "*stack k N"]]:
    """The arrays of an `Fp4Weight`."""
    halves = packed.view(np.uint8).reshape(*packed.shape[:-1], -1, 2, FP4_BLOCK // 4)
    first, second = halves[..., 0, :], halves[..., 1, :]
    even = first & 0x0F | second << 4
    odd = first >> 4 | second & 0xF0
    codes = np.stack([even, odd], axis=-1).reshape(packed.shape)
    return _transposed(codes), _transposed(scale)


def fp4_to_checkpoint(
    codes: UInt8[np.ndarray, "*stack J N"], scale: Shaped[np.ndarray, "*stack k N"]
) -> tuple[Int8[np.ndarray, "*stack N J"], Shaped[np.ndarray, "*stack N k"]]:
    """The exact inverse of `fp4_from_checkpoint`."""
    rows = _transposed(codes)
    pairs = rows.reshape(*rows.shape[:-1], -1, FP4_BLOCK // 4, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    first = even & 0x0F | odd << 4
    second = even >> 4 | odd & 0xF0
    packed = np.stack([first, second], axis=-2).reshape(rows.shape)
    return packed.view(np.int8), _transposed(scale)


def decode_fp8_blocks(
    codes: Shaped[np.ndarray, "N K"], scale: Shaped[np.ndarray, "n k"]
) -> Float32[np.ndarray, "N K"]:
    """Decode a matrix from the checkpoint's FP8."""
    values = np.take(_E4M3_VALUES, codes.view(np.uint8))
    return values * _spread(scale.astype(np.float32), codes.shape)


def decode_fp4_blocks(
    packed: Int8[np.ndarray, "N J"], scale: Shaped[np.ndarray, "N k"]
) -> Float32[np.ndarray, "N K"]:
    """Decode a matrix from the checkpoint's FP4."""
    pairs = np.take(_E2M1_PAIRS, packed.view(np.uint8), axis=0)
    blocks = pairs.reshape(len(packed), -1, FP4_BLOCK) * scale.astype(np.float32)[..., None]
    return blocks.reshape(len(packed), -1)


def encode_fp8_blocks(
    w: Float32[np.ndarray, "N K"],
) -> tuple[Shaped[np.ndarray, "N K"], Shaped[np.ndarray, "n k"]]:
    """Encode a matrix in the checkpoint's FP8; scales are amax / 448 rounded up to a power of two.

    Values that already are E4M3 times such a scale are encoded exactly.
    """
    scale = fp8_scales(w)
    return fp8_codes(w, scale), scale


def fp8_scales(w: Float32[np.ndarray, "N K"]) -> Shaped[np.ndarray, "n k"]:
    """The scales that `encode_fp8_blocks` chooses."""
    amax = np.maximum.reduceat(np.abs(w), np.arange(0, w.shape[0], FP8_BLOCK), axis=0)
    amax = np.maximum.reduceat(amax, np.arange(0, w.shape[1], FP8_BLOCK), axis=1)
    return _power_of_two_scale(amax, 448.0)


def fp8_codes(
    w: Float32[np.ndarray, "N K"], scale: Shaped[np.ndarray, "n k"]
) -> Shaped[np.ndarray, "N K"]:
    """Encode a matrix in the checkpoint's FP8 with given scales; clips values out of range."""
    scaled = w / _spread(scale.astype(np.float32), w.shape)
    return np.clip(scaled, -448, 448).astype(E4M3)


def encode_fp4_blocks(
    w: Float32[np.ndarray, "N K"],
) -> tuple[Int8[np.ndarray, "N J"], Shaped[np.ndarray, "N k"]]:
    """Encode a matrix in the checkpoint's FP4; scales are amax / 6 rounded up to a power of two.

    Values that already are E2M1 times such a scale are encoded exactly.

    Raises:
      ValueError: K is not a multiple of 32.
    """
    scale = fp4_scales(w)
    return fp4_codes(w, scale), scale


def fp4_scales(w: Float32[np.ndarray, "N K"]) -> Shaped[np.ndarray, "N k"]:
    """The scales that `encode_fp4_blocks` chooses; raises like it."""
    rows, columns = w.shape
    if columns % FP4_BLOCK:
        raise ValueError(
            f"FP4 needs rows of whole blocks of {FP4_BLOCK}; these have {columns} columns."
        )
    return _power_of_two_scale(np.abs(w.reshape(rows, -1, FP4_BLOCK)).max(axis=-1), 6.0)


def fp4_codes(
    w: Float32[np.ndarray, "N K"], scale: Shaped[np.ndarray, "N k"]
) -> Int8[np.ndarray, "N J"]:
    """Encode a matrix in the checkpoint's FP4 with given scales; clips values out of range."""
    blocks = w.reshape(len(w), -1, FP4_BLOCK) / scale.astype(np.float32)[..., None]
    code = np.clip(blocks, -6, 6).astype(E2M1).view(np.uint8).reshape(len(w), -1, 2) & 15
    return (code[..., 0] | code[..., 1] << 4).view(np.int8)


def _spread(
    scale: Float32[np.ndarray, "n k"], shape: tuple[int, ...]
) -> Float32[np.ndarray, "N K"]:
    rows = np.repeat(scale, FP8_BLOCK, axis=0)[: shape[0]]
    return np.repeat(rows, FP8_BLOCK, axis=1)[:, : shape[1]]


def _power_of_two_scale(
    amax: Float32[np.ndarray, "n k"], largest: float
) -> Shaped[np.ndarray, "n k"]:
    # Scales below 2^-126 would be subnormal float32, which devices flush to zero.
    quotient = np.maximum(amax.astype(np.float64) / largest, 2.0**-126)
    fraction, exponent = np.frexp(quotient)
    exponent = exponent - (fraction == 0.5)
    return (exponent + 127).astype(np.uint8).view(E8M0)
