"""Rounding to E4M3 and E2M1, the Hadamard transform and dequantised matmuls in plain maths.

Axis letters: K input channels, N output channels, R rows, B blocks, C channels of a block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from pallas_kernels import products
from pallas_kernels.dtypes import accumulator
from pallas_kernels.quantize.leaves import (
    FP4_BLOCK,
    FP8_BLOCK,
    Fp4Weight,
    Fp8Weight,
    Weight,
    of_layer,
)

MANTISSA = 23  # mantissa bits of float32
BIAS = 127
E2M1_UNIT = 2.0**6  # E2M1 codes read as E4M3 are too small by this factor


def _bits(x: Float32[Array, "*dims"]) -> Int32[Array, "*dims"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Int32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _scale_bits(amax: Float32[Array, "*dims"], largest: float) -> Int32[Array, "*dims"]:
    """Bits of exactly 2^ceil(log2(amax / largest)): a float's bits are a piecewise linear log2."""
    bits_of_1 = BIAS << MANTISSA
    distance = _bits(amax) + (bits_of_1 - int(np.float32(largest).view(np.int32)))
    return (distance + (1 << MANTISSA) - 1) & -(1 << MANTISSA)


def _nearest(
    x: Float32[Array, "*dims"], mantissa: int, least_exponent: int
) -> Float32[Array, "*dims"]:
    """The nearest float with `mantissa` bits, ties to even, subnormal below 2^least_exponent.

    Adding 1.5 * 2^23 steps makes the hardware round to whole steps; needs |x| < 2^100.
    """
    bits = _bits(x)
    octave = jnp.maximum(bits & 0xFF << MANTISSA, (least_exponent + BIAS) << MANTISSA)
    many_steps = _float(octave + ((MANTISSA - mantissa << MANTISSA) + (1 << MANTISSA - 1)))
    rounded = (x + many_steps) - many_steps
    return _float(_bits(rounded) | bits & -(1 << 31))  # zeros keep their sign


@dataclasses.dataclass(frozen=True)
class Format:
    """Number format that a scaled block is rounded to."""

    largest: float
    mantissa: int
    least_exponent: int
    floor: float  # lower bound of a block's amax


E4M3 = Format(largest=448.0, mantissa=3, least_exponent=-6, floor=1e-4)
E2M1 = Format(largest=6.0, mantissa=1, least_exponent=0, floor=6 * 2.0**-126)


def scaled(
    x: Float32[Array, "*dims"], amax: Float32[Array, "*amaxes"], to: Format
) -> tuple[Float32[Array, "*dims"], Int32[Array, "*amaxes"]]:
    """Numbers of the format, and the bits of the scales that multiply them.

    Scales follow from the blocks' largest magnitudes `amax`.
    """
    scale_bits = _scale_bits(jnp.maximum(amax, to.floor), to.largest)
    over_scale = x * _float((2 * BIAS << MANTISSA) - scale_bits)
    return _nearest(over_scale, to.mantissa, to.least_exponent), scale_bits


def rounded(
    x: Float32[Array, "*dims"], amax: Float32[Array, "*amaxes"], to: Format
) -> Float32[Array, "*dims"]:
    """Round values to the format, as for `scaled`."""
    values, scale_bits = scaled(x, amax, to)
    return values * _float(scale_bits)


def in_blocks(x: Float[Array, "*rows K"], block: int) -> Float32[Array, "*rows B C"]:
    """Blocks of channels in float32; the last one is filled with zeros."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    return jnp.pad(x.astype(jnp.float32), padding).reshape(*x.shape[:-1], -1, block)


def _fake_quant(x: Float[Array, "*rows K"], block: int, to: Format) -> Float[Array, "*rows K"]:
    x_BC = in_blocks(x, block)
    rounded_BC = rounded(x_BC, jnp.max(jnp.abs(x_BC), axis=-1, keepdims=True), to)
    return rounded_BC.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)


def fake_quant_fp8(
    x: Float[Array, "*rows K"], block: int, amax_floor: float
) -> Float[Array, "*rows K"]:
    """Round to E4M3 times a power of two per block (DeepSeek's runtime, act_quant)."""
    return _fake_quant(x, block, dataclasses.replace(E4M3, floor=amax_floor))


def fake_quant_fp4(x: Float[Array, "*rows K"], block: int) -> Float[Array, "*rows K"]:
    """Round to E2M1 times a power of two per block (DeepSeek's runtime, fp4_act_quant)."""
    return _fake_quant(x, block, E2M1)


@functools.lru_cache
def _signs(n: int) -> np.ndarray:
    index = np.arange(n)
    odd = np.bitwise_count(index[:, None] & index[None, :]) & 1
    return 1 - 2 * odd.astype(np.int8)


def signs(n: int, dtype: Any) -> Float[Array, "K K"]:
    """The transform's matrix without its factor K^-0.5."""
    return jnp.asarray(_signs(n), dtype)


def hadamard(x: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """Multiply by the matrix of signs at full precision, then by K^-0.5."""
    n = x.shape[-1]
    wide = accumulator(x.dtype)
    summed = jnp.matmul(x.astype(wide), signs(n, wide), precision=jax.lax.Precision.HIGHEST)
    return (summed * n**-0.5).astype(x.dtype)


def decode_e2m1(packed_BJN: UInt8[Array, "*stack J N"]) -> Float[Array, "*stack C N"]:
    """A block's bytes to values over `E2M1_UNIT`: read as E4M3, which has a larger bias."""
    code_BCN = jnp.concatenate([packed_BJN & 15, packed_BJN >> 4], axis=-2)
    e4m3_BCN = (code_BCN & 8) << 4 | (code_BCN & 7) << 2
    return jax.lax.bitcast_convert_type(e4m3_BCN, jnp.float8_e4m3fn)


def dense_transposed(w: Fp8Weight | Fp4Weight, dtype: Any) -> Float[Array, "*stack K N"]:
    """Dequantise a weight in float32, to the transpose [..., K, N] of its matrix."""
    stack, (rows, N), scale = w.codes.shape[:-2], w.codes.shape[-2:], w.scale.astype(jnp.float32)
    if isinstance(w, Fp4Weight):
        code_BCN = decode_e2m1(w.codes.reshape(*stack, -1, FP4_BLOCK // 2, N))
        dense_BCN = code_BCN.astype(jnp.float32) * (E2M1_UNIT * scale[..., None, :])
        return dense_BCN.reshape(*stack, 2 * rows, N).astype(dtype)
    scale_KN = jnp.repeat(jnp.repeat(scale, FP8_BLOCK, axis=-2), FP8_BLOCK, axis=-1)
    return (w.codes.astype(jnp.float32) * scale_KN[..., :rows, :N]).astype(dtype)


def dense(w: Weight, dtype: Any) -> Float[Array, "*stack N K"]:
    """Dequantise a weight in any format to an array [..., N, K] in `dtype`."""
    if isinstance(w, Fp8Weight | Fp4Weight):
        return jnp.swapaxes(dense_transposed(w, dtype), -1, -2)
    return w.astype(dtype)


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows N"]:
    """Dequantise, then multiply; accumulate in float32 or wider, return x's dtype."""
    w = of_layer(w, layer)
    w_NK = dense(w, x.dtype) if isinstance(w, Fp8Weight | Fp4Weight) else w
    if groups == 1:
        return products.with_transposed(x, w_NK, precision).astype(x.dtype)
    x_RGK = x.reshape(-1, groups, w_NK.shape[1])
    w_GnK = w_NK.reshape(groups, -1, w_NK.shape[1])
    matmul = {"precision": precision, "preferred_element_type": accumulator(x.dtype)}
    y_RGn = jnp.einsum("rgk,gnk->rgn", x_RGK, w_GnK, **matmul)
    return y_RGn.reshape(*x.shape[:-1], w_NK.shape[0]).astype(x.dtype)


def linear_backward(
    dy: Float[Array, "*rows N"],
    w: Fp8Weight | Fp4Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows GK"]:
    """The gradient of x: dy times the matrix, accumulated as in `linear`."""
    w_NK = dense(of_layer(w, layer), dy.dtype)
    matmul = {"precision": precision, "preferred_element_type": accumulator(dy.dtype)}
    if groups > 1:
        dy_RGn = dy.reshape(-1, groups, w_NK.shape[0] // groups)
        w_GnK = w_NK.reshape(groups, -1, w_NK.shape[1])
        # XLA's CPU backend has no such matmul from bfloat16 to float32; float32 products are exact.
        wide = accumulator(dy.dtype)
        dx = jnp.einsum("rgn,gnk->rgk", dy_RGn.astype(wide), w_GnK.astype(wide), **matmul)
    else:
        dx = jnp.matmul(dy, w_NK, **matmul)
    return dx.reshape(*dy.shape[:-1], groups * w_NK.shape[1]).astype(dy.dtype)
