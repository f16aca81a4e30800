"""What follows pooling inside a kernel: norm, RoPE, rounding.

Channels come in columns of 128, as many as the lanes of a vector register.

Axis letters: R rows, V channels of a column (128), K all channels, Q rotary pairs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.compress.reference import FP4_BLOCK, FP8_BLOCK
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract
from pallas_kernels.quantize import reference as formats
from pallas_kernels.rotary.tpu import turn


def finish(
    columns_RV: list[Float32[Array, "R V"]],
    scale_1K: Float[Array, "1 K"],
    cos_RV: Float32[Array, "R V"],
    sin_RV: Float32[Array, "R V"],
    *,
    rotated: int,
    eps: float,
    rounding: str,
    dtype: Any,
) -> Float[Array, "R K"]:
    """Finish pooled entries; returns them in `dtype`.

    Cosine and sine, as `in_pairs` returns them, are for the last `rotated` lanes (2Q) of the last
    column.
    """
    to_dtype = lambda x: x.astype(dtype).astype(jnp.float32)
    columns_RV = [to_dtype(x_RV) for x_RV in columns_RV]
    squares_RV = functools.reduce(jnp.add, [x_RV * x_RV for x_RV in columns_RV])
    channels = LANES * len(columns_RV)
    mean_R1 = jnp.sum(squares_RV, axis=1, keepdims=True) / channels
    inverse_R1 = jax.lax.rsqrt(mean_R1 + eps)
    scale_1K = scale_1K.astype(jnp.float32)
    for i, x_RV in enumerate(columns_RV):
        columns_RV[i] = to_dtype(x_RV * inverse_R1 * scale_1K[:, i * LANES : (i + 1) * LANES])
    columns_RV[-1] = to_dtype(turn(columns_RV[-1], cos_RV, sin_RV, rotated))
    if rounding == "fp4":
        x_RV = to_dtype(_hadamard(columns_RV[0], dtype))
        columns_RV = [formats.rounded(x_RV, _amax(x_RV, FP4_BLOCK), formats.E2M1)]
    elif rounding == "fp8":
        straight = channels - rotated
        columns_RV = [_fp8(x_RV, straight - i * LANES) for i, x_RV in enumerate(columns_RV)]
    return jnp.concatenate(columns_RV, axis=1).astype(dtype)


def in_pairs(part: Float[Array, "..."], dim: int) -> Float32[Array, "R V"]:
    """Each value of a table twice, in the last lanes: a matmul with ones, exact at full precision.

    Args:
      part: cosine or sine, [R, Q] or [Q, R].
      dim: index of the dim Q.
    """
    pairs = part.shape[dim]
    shape = (pairs, LANES)
    pair_QV = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane_QV = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - (LANES - 2 * pairs)
    ones_QV = ((lane_QV >> 1) == pair_QV).astype(jnp.float32)
    return contract(part.astype(jnp.float32), ones_QV, dim, 0, jax.lax.Precision.HIGHEST)


def _lane(x: Any) -> Int32[Array, "R V"]:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)


def _hadamard(x_RV: Float32[Array, "R V"], dtype: Any) -> Float32[Array, "R V"]:
    """Signs are the parity of the bits that row and column share; products are exact."""
    shape = (LANES, LANES)
    shared_VV = jax.lax.broadcasted_iota(jnp.int32, shape, 0) & jax.lax.broadcasted_iota(
        jnp.int32, shape, 1
    )
    for shift in (4, 2, 1):
        shared_VV = shared_VV ^ (shared_VV >> shift)
    signs_VV = (1 - 2 * (shared_VV & 1)).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    operands = x_RV.astype(dtype), signs_VV.astype(dtype)
    summed_RV = jnp.dot(*operands, precision=highest, preferred_element_type=jnp.float32)
    return summed_RV * LANES**-0.5


def _amax(x_RV: Float32[Array, "R V"], block: int) -> Float32[Array, "R V"]:
    """The largest magnitude of each block of lanes, in all of its lanes."""
    size_RV, block_RV = jnp.abs(x_RV), _lane(x_RV) >> (block.bit_length() - 1)
    amax_RV = jnp.zeros_like(x_RV)
    for i in range(LANES // block):
        here_RV = block_RV == i
        largest_R1 = jnp.max(jnp.where(here_RV, size_RV, 0.0), axis=1, keepdims=True)
        amax_RV = jnp.where(here_RV, largest_R1, amax_RV) if i else largest_R1 + amax_RV
    return amax_RV


def _fp8(x_RV: Float32[Array, "R V"], straight: int) -> Float32[Array, "R V"]:
    """E4M3 in the first `straight` lanes."""
    if straight >= LANES:
        return formats.rounded(x_RV, _amax(x_RV, FP8_BLOCK), formats.E4M3)
    straight_RV = _lane(x_RV) < straight
    amax_RV = _amax(jnp.where(straight_RV, x_RV, 0.0), FP8_BLOCK)
    return jnp.where(straight_RV, formats.rounded(x_RV, amax_RV, formats.E4M3), x_RV)
