"""Entries stored in eight bits: one row of bytes each, as in DeepSeek's runtime.

Of a row's 584 bytes, 448 are E4M3 codes of the unrotated channels, 128 the bfloat16 values of the
64 rotated channels, 7 the E8M0 scales of blocks of 64 codes, and one is unused (FlashMLA,
tests/quant.py). Here the low and the high bytes of the rotated channels are separate, so that each
lane is a channel, and rows are padded to 640 bytes, five vectors of 128 lanes: XLA would store
other widths transposed.

Axis letters: S entries, K = 512 channels, W bytes per row.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.paged import Paged

CODES = 448
BLOCK = 64
ROTATED = 64
SCALES = CODES // BLOCK
CHANNELS = CODES + ROTATED
BYTES = CODES + 2 * ROTATED + SCALES + 1
WIDTH = 640
_LOW, _HIGH, _SCALE = CODES, CODES + ROTATED, CODES + 2 * ROTATED
_LEAST = 1e-4  # lower bound of a block's amax, so that zeros have a scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Rows:
    """Entries of 512 channels in 640 bytes.

    Attributes:
      data: uint8 [..., S, 640].
    """

    data: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded entries: [..., S, 512]."""
        return (*self.data.shape[:-1], CHANNELS)


Pool: TypeAlias = Float[Array, "L B S K"] | Fp8Rows | Paged


def encode(entries: Float[Array, "*rows K"]) -> Fp8Rows:
    """Round entries to the format: scale 2^ceil(log2(amax / 448)) per block, ties to even.

    Raises:
      ValueError: entries do not have 512 channels.
    """
    if entries.shape[-1] != CHANNELS:
        raise ValueError(
            f"Fp8Rows hold {CHANNELS} channels, not {entries.shape[-1]}; store these in bfloat16."
        )
    rows = entries.shape[:-1]
    blocks = entries[..., :CODES].astype(jnp.float32).reshape(*rows, SCALES, BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), _LEAST)
    fraction, exponent = jnp.frexp(amax / 448.0)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)
    scaled = jnp.clip(jnp.ldexp(blocks, -exponent[..., None]), -448.0, 448.0)
    codes = jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8)
    rotated = jax.lax.bitcast_convert_type(entries[..., CODES:].astype(jnp.bfloat16), jnp.uint16)
    low, high = (rotated & 255).astype(jnp.uint8), (rotated >> 8).astype(jnp.uint8)
    unused = jnp.zeros((*rows, WIDTH - _SCALE - SCALES), jnp.uint8)
    scale = (exponent + 127).astype(jnp.uint8)
    parts = (codes.reshape(*rows, CODES), low, high, scale, unused)
    return Fp8Rows(jnp.concatenate(parts, axis=-1))


def decode(data: UInt8[Array, "*rows W"], dtype: Any) -> Float[Array, "*rows K"]:
    """Decode rows of bytes to entries in `dtype`; bfloat16 holds them exactly."""
    rows = data.shape[:-1]
    codes = jax.lax.bitcast_convert_type(data[..., :CODES], jnp.float8_e4m3fn).astype(jnp.float32)
    scale = jax.lax.bitcast_convert_type(
        data[..., _SCALE : _SCALE + SCALES].astype(jnp.int32) << 23, jnp.float32
    )
    unrotated = codes.reshape(*rows, SCALES, BLOCK) * scale[..., None]
    words = data[..., _LOW:_SCALE].astype(jnp.uint16)
    rotated = words[..., :ROTATED] | words[..., ROTATED:] << 8
    rotated = jax.lax.bitcast_convert_type(rotated, jnp.bfloat16)
    both = (unrotated.reshape(*rows, CODES).astype(dtype), rotated.astype(dtype))
    return jnp.concatenate(both, axis=-1)
