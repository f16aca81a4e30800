"""Rounding and the Hadamard transform on TPUs: x is read once and written once.

XLA's form reshapes rows to blocks, which TPUs do by copying them in float32.

Axis letters: R rows, K channels, L lanes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import LANES, resident
from pallas_kernels.quantize import reference

_ROWS = 128  # rows that are in registers at once
_BLOCK_BYTES = 2**20
_MOST_CHANNELS = 2**14  # the most of which a block of `_ROWS` rows fits
_VMEM_BYTES = 48 * 2**20


def fake_quant_fp8(
    x: Float[Array, "*rows K"], block: int, amax_floor: float
) -> Float[Array, "*rows K"]:
    """`reference.fake_quant_fp8` as a kernel.

    Raises:
      Unsupported: another dtype or block.
    """
    return _fake_quant(x, block, dataclasses.replace(reference.E4M3, floor=amax_floor))


def fake_quant_fp4(x: Float[Array, "*rows K"], block: int) -> Float[Array, "*rows K"]:
    """`reference.fake_quant_fp4` as a kernel.

    Raises:
      Unsupported: another dtype or block.
    """
    return _fake_quant(x, block, reference.E2M1)


def hadamard(x: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """`reference.hadamard` as a kernel: products with signs are exact in x's dtype.

    Raises:
      Unsupported: another dtype or K.
    """
    if x.shape[-1] not in (128, 256, 512):
        raise Unsupported(f"The TPU form transforms 128, 256 or 512 channels, not {x.shape[-1]}.")
    return _by_rows(_transform, "hadamard", x, reference.signs(x.shape[-1], x.dtype))


def _transform(x_ref: Any, signs_ref: Any, out_ref: Any) -> None:
    # One pass of the matrix unit is exact for bfloat16, but not for float32.
    bfloat16 = x_ref.dtype == jnp.bfloat16
    summed = jax.lax.dot(
        x_ref[...],
        signs_ref[...],
        precision=None if bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    out_ref[...] = (summed * x_ref.shape[1] ** -0.5).astype(out_ref.dtype)


def _fake_quant(
    x: Float[Array, "*rows K"], block: int, to: reference.Format
) -> Float[Array, "*rows K"]:
    if block not in (32, 64, 128):
        raise Unsupported(f"The TPU form rounds in blocks of 32, 64 and 128, not {block}.")
    kernel = functools.partial(_round, block=block, to=to, channels=x.shape[-1])
    return _by_rows(kernel, "fake_quant", x)


def _by_rows(kernel: Any, name: str, x: Float[Array, "*rows K"], *others: Array) -> Array:
    """Run a kernel on blocks of rows, channels padded to whole lanes; `others` are not divided."""
    if x.dtype not in (jnp.bfloat16, jnp.float32) or x.size == 0:
        raise Unsupported(f"The TPU form takes bfloat16 and float32, not {x.dtype} {x.shape}.")
    if x.shape[-1] > _MOST_CHANNELS:
        raise Unsupported(f"The TPU form takes up to {_MOST_CHANNELS} channels, not {x.shape[-1]}.")
    x_RK = x.reshape(-1, x.shape[-1])
    R, K = x_RK.shape
    width = -(-K // LANES) * LANES
    rows = min(-(-R // _ROWS), max(_BLOCK_BYTES // (4 * width * _ROWS), 1)) * _ROWS
    spec = pl.BlockSpec((rows, width), lambda row_block: (row_block, 0))
    y_RK = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(R, rows),),
        in_specs=[spec, *(resident(*other.shape) for other in others)],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x_RK.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES
        ),
        name=name,
    )(x_RK, *others)
    return y_RK.reshape(x.shape)


def _round(
    x_ref: Any,  # [rows, K padded to whole lanes]
    out_ref: Any,  # the same
    *,
    block: int,
    to: reference.Format,
    channels: int,
) -> None:
    columns = x_ref.shape[1] // LANES

    def body(i: Any, carry: None) -> None:
        row = pl.multiple_of(jax.lax.div(i, columns) * _ROWS, _ROWS)
        column = pl.multiple_of(jax.lax.rem(i, columns) * LANES, LANES)
        at = (pl.ds(row, _ROWS), pl.ds(column, LANES))
        x_RL = x_ref[at].astype(jnp.float32)
        if channels % block:
            lane = jax.lax.broadcasted_iota(jnp.int32, x_RL.shape, 1)
            x_RL = jnp.where(column + lane < channels, x_RL, 0.0)
        amax_RL = _largest(jnp.abs(x_RL), block)
        out_ref[at] = reference.rounded(x_RL, amax_RL, to).astype(out_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0] // _ROWS * columns, body, None)


def _largest(x_RL: Float32[Array, "R L"], block: int) -> Float32[Array, "R l"]:
    """The largest value of each block of lanes, in each of its lanes."""
    if block == LANES:
        return jnp.max(x_RL, axis=1, keepdims=True)
    distance = 1
    while distance < block:  # each lane gets the largest of twice as many lanes up to it
        x_RL = jnp.maximum(x_RL, pltpu.roll(x_RL, distance, axis=1))
        distance *= 2
    last_RL = jax.lax.broadcasted_iota(jnp.int32, x_RL.shape, 1) | (block - 1)
    return jnp.take_along_axis(x_RL, last_RL, axis=1)
