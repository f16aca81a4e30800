"""Rows of bytes decoded inside TPU kernels, exactly, in few vector instructions.

Axis letters: X rows, W bytes of a row, K channels, C = 128 lanes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32, UInt8

from pallas_kernels.byte_rows import FP4, FP8, Codec
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.quantize import tpu_codes

# Rows that are decoded at once: their instructions hide each other's latency.
_ROWS: dict[Codec, int] = {FP8: 128, FP4: 256}
# Bytes of the last vector of a row of FP8: high bytes of the rotated channels, then scales.
_SCALES = slice(FP8.rotated, FP8.rotated + FP8.scales)


def decode(rows_ref: Any, to_ref: Any, codec: Codec) -> None:
    """Decode rows [X, W] to [X, K] in the dtype of `to_ref`; X must be a multiple of 32.

    Channels of FP4 stay in the order of `FP4.by_nibble`.
    """
    total = rows_ref.shape[0]
    rows = math.gcd(_ROWS[codec], total)
    read = _fp8 if codec == FP8 else _fp4

    def step(i: Any, _: Any) -> None:
        at = pl.ds(pl.multiple_of(i * rows, rows), rows)
        to_ref[at] = read(rows_ref[at]).astype(to_ref.dtype)

    jax.lax.fori_loop(0, total // rows, step, None)


def _fp8(row_XW: UInt8[Array, "X W"]) -> Float32[Array, "X K"]:
    """`FP8.decode`; zeros may lose their sign."""
    native = tpu_codes.has_native_e4m3()
    code_XK = pltpu.bitcast(row_XW[:, : FP8.channels], jnp.float8_e4m3fn)
    value_XK = tpu_codes.e4m3_values(code_XK, native).astype(jnp.float32)
    tail_XC = row_XW[:, FP8.channels :].astype(jnp.int32)
    straight_XK = value_XK * _spread(tail_XC, tpu_codes.e4m3_unit(native))
    low_XC = row_XW[:, FP8.channels - LANES : FP8.channels].astype(jnp.int32)
    word_XC = low_XC | pltpu.roll(tail_XC, LANES - FP8.rotated, 1) << 8
    rotated_XC = jax.lax.bitcast_convert_type(word_XC << 16, jnp.float32)
    lane_XC = jax.lax.broadcasted_iota(jnp.int32, rotated_XC.shape, 1)
    last_XC = jnp.where(lane_XC < LANES - FP8.rotated, straight_XK[:, -LANES:], rotated_XC)
    return jnp.concatenate([straight_XK[:, :-LANES], last_XC], axis=1)


def _spread(tail_XC: Int32[Array, "X C"], unit: float) -> Float32[Array, "X K"]:
    """Each block's scale times `unit` in all its channels, by an exact one-hot matmul."""
    shape = (LANES, FP8.channels)
    from_CK = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - _SCALES.start
    to_CK = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 1), FP8.block)
    one_hot_CK = jnp.where(from_CK == to_CK, unit, 0.0).astype(jnp.bfloat16)
    lane_XC = jax.lax.broadcasted_iota(jnp.int32, tail_XC.shape, 1)
    # Any other byte could be an infinite scale, and 0 * inf is NaN.
    scales_XC = (lane_XC >= _SCALES.start) & (lane_XC < _SCALES.stop)
    power_XC = jax.lax.bitcast_convert_type(tail_XC << 23, jnp.float32)
    power_XC = jnp.where(scales_XC, power_XC, 0.0).astype(jnp.bfloat16)
    return jnp.dot(power_XC, one_hot_CK, preferred_element_type=jnp.float32)


def _fp4(row_XW: UInt8[Array, "X W"]) -> Float32[Array, "X K"]:
    """`FP4.decode`, with channels in the order of `FP4.by_nibble`."""
    # Four rows at a time: a lane's word has a byte of each.
    word = pltpu.bitcast(row_XW, jnp.int32)
    other = pltpu.roll(word, FP4.channels // 2, 1)
    first = jax.lax.broadcasted_iota(jnp.int32, word.shape, 1) < FP4.channels // 2
    code = jnp.where(first, word, other >> 4)
    scale_XK = pltpu.bitcast(jnp.where(first, other, word), jnp.uint8)
    # The same bits in E5M2, which all chips convert, are a number that is too small.
    e5m2 = (code & 0x07070707) << 1 | (code & 0x08080808) << 4
    value_XK = pltpu.bitcast(e5m2, jnp.float8_e5m2).astype(jnp.float32) * tpu_codes.E2M1_UNIT
    power_XK = jax.lax.bitcast_convert_type(scale_XK.astype(jnp.int32) << 23, jnp.float32)
    return value_XK * power_XK
