"""Exact conversion of E2M1 codes inside Mosaic GPU kernels.

Axis letters: K input channels, N output channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.mosaic_gpu import along, load
from pallas_kernels.quantize.leaves import FP4_BLOCK

_HALF = FP4_BLOCK // 2  # rows of bytes per block


def write_fp4(codes: Any, scale: Any, tile: Any) -> None:
    """Convert a tile of codes to a tile of numbers; all three are in shared memory.

    Args:
      codes: bytes [K / 2, N], packed as in `Fp4Weight`.
      scale: exponents as bytes [K / 32, N].
      tile: bfloat16 [K, N], with a swizzle of 128 bytes.
    """
    layout = tile_layout(_HALF, codes.shape[1])
    for block in range(scale.shape[0]):
        code_KN = load(codes.at[pl.ds(block * _HALF, _HALF)], layout).astype(jnp.int32)
        scale_N = power_of_two(load(scale.at[block], layout.reduce(0)))
        scale_KN = plgpu.layout_cast(along(scale_N, code_KN.shape, 1), layout)
        for half in range(2):
            value_KN = e2m1(code_KN >> 4 if half else code_KN & 15) * scale_KN
            rows = pl.ds(block * FP4_BLOCK + half * _HALF, _HALF)
            tile[rows, :] = value_KN.astype(jnp.bfloat16)


def power_of_two(exponent: Array) -> Array:
    """E8M0 as float32: 2^(e - 127), except that the smallest, which would be subnormal, is 0."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32)


def e2m1(code: Array) -> Array:
    """E2M1 codes, as 32-bit integers, to float32.

    Sign, exponent and mantissa move to where float16 has them: 0 and 0.5 are subnormal there as
    well, and all numbers are 2^14 times too small.
    """
    bits = (code << 9) + 0x7000 & 0x8E00  # the sign is carried from bit 12 to bit 15
    small = jax.lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)
    return (small * jnp.float16(2.0**14)).astype(jnp.float32)


@functools.cache
def tile_layout(rows: int, columns: int) -> Any:
    """Layout of registers from which a tile is written without bank conflicts."""
    return plgpu.Layout.SMEM_GMEM_COPY((rows, columns), jnp.bfloat16, 128)
