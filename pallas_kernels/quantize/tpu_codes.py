"""Exact conversion of codes inside TPU kernels, in few vector instructions.

Axis letters: K input channels, N output channels, J bytes of packed codes, B blocks of K.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK

_LOW7, _SIGN = 0x7F7F7F7F, -0x7F7F7F80  # of each byte of a word


def has_native_e4m3() -> bool:
    """Whether the target chip converts E4M3 in hardware, as TPU7x does.

    Affects speed only: the bits are the same either way. True if no TPU is known.
    """
    try:
        return pltpu.get_tpu_info().generation >= 7
    except ValueError:
        return True


def e4m3_unit(native: bool) -> float:
    """The factor that `e4m3_values` must be multiplied by."""
    return 1.0 if native else 2.0**4


def e4m3_values(codes_KN: Float[Array, "K N"], native: bool) -> Float[Array, "K N"]:
    """Values over `e4m3_unit`, in bfloat16. NaN codes become 480 unless `native`.

    Chips before TPU7x convert E4M3B11 instead: the same codes with a bias of 11, but 0x80, -0 in
    E4M3, is NaN. Replacing it takes four instructions, the compiler's own conversion about thirty.
    """
    if native:
        return codes_KN.astype(jnp.bfloat16)
    word = pltpu.bitcast(codes_KN, jnp.int32)
    word = word & (((word & _LOW7) + _LOW7) | _LOW7)
    return pltpu.bitcast(word, jnp.float8_e4m3b11fnuz).astype(jnp.bfloat16)


E2M1_UNIT = 2.0**14  # E2M1 codes read as E5M2, which all chips convert, are too small by this


def e2m1_halves(packed_JN: UInt8[Array, "J N"]) -> list[Float[Array, "J N"]]:
    """Values of the low and of the high nibbles over `E2M1_UNIT`, in float8_e5m2."""
    word = pltpu.bitcast(packed_JN, jnp.int32)
    low = (word & 0x07070707) << 1 | (word & 0x08080808) << 4
    high = (word >> 3) & 0x0E0E0E0E | (word & _SIGN)
    return [pltpu.bitcast(half, jnp.float8_e5m2) for half in (low, high)]


def e2m1_values(packed_JN: UInt8[Array, "J N"]) -> Float[Array, "K N"]:
    """Values over `E2M1_UNIT` in bfloat16, in the order of K; J must be a multiple of 32."""
    halves = [half.astype(jnp.bfloat16) for half in e2m1_halves(packed_JN)]
    step = FP4_BLOCK // 2
    parts = [half[at : at + step] for at in range(0, len(packed_JN), step) for half in halves]
    return jnp.concatenate(parts)


def rows_per_block(x_RK: Float[Array, "R K"]) -> Float[Array, "X K"]:
    """128 channels of rows, once per block of 32, zero in the other blocks.

    One product of these with 128 channels of FP4 weights gives the sums of each block.
    """
    block = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, x_RK.shape, 1), FP4_BLOCK)
    blocks = range(FP8_BLOCK // FP4_BLOCK)
    return jnp.concatenate([jnp.where(block == i, x_RK, jnp.zeros_like(x_RK)) for i in blocks])


def scale_values(scale: Shaped[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """Scales in float32; E8M0 is converted by its bits."""
    if scale.dtype == jnp.float32:
        return scale
    exponent = pltpu.bitcast(scale, jnp.uint8).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def spread(scale_Bn: Float32[Array, "B n"], first: Any, width: int) -> Float32[Array, "B N"]:
    """Columns `first`, `first + 1`, ... of the scales, each repeated for its block of N."""
    lane = jax.lax.broadcasted_iota(jnp.int32, scale_Bn.shape, 1)
    pick = lambda column: jnp.sum(jnp.where(lane == column, scale_Bn, 0.0), axis=1, keepdims=True)
    blocks = range(-(-width // FP8_BLOCK))
    size = lambda i: (scale_Bn.shape[0], min(FP8_BLOCK, width - i * FP8_BLOCK))
    return jnp.concatenate([jnp.broadcast_to(pick(first + i), size(i)) for i in blocks], axis=1)


def rows(
    scale_Bn: Float32[Array, "B n"], first: Int32[Array, ""], count: int
) -> Float32[Array, "b n"]:
    """Rows `first` to `first + count`, at any alignment to registers."""
    row = jax.lax.broadcasted_iota(jnp.int32, scale_Bn.shape, 0)
    pick = lambda at: jnp.sum(jnp.where(row == at, scale_Bn, 0.0), axis=0, keepdims=True)
    return jnp.concatenate([pick(first + i) for i in range(count)])
