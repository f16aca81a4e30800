"""Entries of pools as rows of bytes, in the numbers that caches are rounded to.

What `quantize.fake_quant_fp8` or `fake_quant_fp4` returned is read back bit for bit; other values
are rounded first. A block with a value that is not finite reads as infinities and NaNs. TPUs pad
rows to 128 bytes, so these are.

Axis letters: K channels, W bytes of a row, E blocks of channels.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.quantize import reference as quantize

_LANES = 128
_NOT_FINITE = 255  # a scale


@dataclasses.dataclass(frozen=True)
class Fp8Codec:
    """Entries of attention: FP8 but for the last channels, which are rotated, in bfloat16.

    A row has the E4M3 codes, the low and then the high bytes of the rotated channels, so that each
    lane is a channel, and the E8M0 scales of blocks of 64 codes.

    Attributes:
      channels: channels of an entry.
      rotated: how many of them are rotated.
    """

    channels: int
    rotated: int

    block = 64

    @property
    def codes(self) -> int:
        """Number of codes."""
        return self.channels - self.rotated

    @property
    def scales(self) -> int:
        """Number of scales."""
        return -(-self.codes // self.block)

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return _padded(self.codes + 2 * self.rotated + self.scales)

    def encode(self, x: Float[Array, "*rows K"]) -> UInt8[Array, "*rows W"]:
        """Entries to rows of bytes."""
        values, scale = _scaled(x[..., : self.codes], self.block, quantize.E4M3)
        codes = jax.lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)
        rotated = x[..., self.codes :].astype(jnp.bfloat16)
        rotated = jax.lax.bitcast_convert_type(rotated, jnp.uint16)
        low, high = (rotated & 255).astype(jnp.uint8), (rotated >> 8).astype(jnp.uint8)
        return _row(codes, low, high, scale)

    def decode(
        self, rows: UInt8[Array, "*rows W"], dtype: Any = jnp.bfloat16
    ) -> Float[Array, "*rows K"]:
        """Rows of bytes to entries; bfloat16 holds them exactly."""
        low, high, scale = (self.codes + part * self.rotated for part in range(3))
        codes = jax.lax.bitcast_convert_type(rows[..., :low], jnp.float8_e4m3fn)
        powers = _powers(rows[..., scale : scale + self.scales])
        powers = jnp.repeat(powers, self.block, axis=-1)[..., : self.codes]
        straight = codes.astype(jnp.float32) * powers
        words = rows[..., low:scale].astype(jnp.uint16)
        rotated = words[..., : self.rotated] | words[..., high - low :] << 8
        rotated = jax.lax.bitcast_convert_type(rotated, jnp.bfloat16)
        return jnp.concatenate([straight.astype(dtype), rotated.astype(dtype)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Fp4Codec:
    """Keys of the indexer: FP4.

    Byte i of a block of 32 channels has the E2M1 codes of its channels i (low nibble) and 16 + i. A
    row has the bytes of all blocks, and then for each of them the E8M0 scale of its block, so that
    kernels need not spread scales.

    Attributes:
      channels: channels of a key, an even number below 32 or a multiple of 32.
    """

    channels: int

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % self.block or self.block % 2:
            raise ValueError(
                f"Fp4Codec needs even blocks of channels, not {self.channels} channels."
            )

    @property
    def block(self) -> int:
        """Channels per scale."""
        return min(32, self.channels)

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return _padded(self.channels)

    def encode(self, x: Float[Array, "*rows K"]) -> UInt8[Array, "*rows W"]:
        """Keys to rows of bytes."""
        values, scale_E = _scaled(x, self.block, quantize.E2M1)
        # A number of E2M1 over 2^6 has its bits in E4M3, which has a larger bias.
        e4m3 = (values / quantize.E2M1_UNIT).astype(jnp.float8_e4m3fn)
        bits = jax.lax.bitcast_convert_type(e4m3, jnp.uint8)
        code_EC = (bits >> 4 & 8 | bits >> 2 & 7).reshape(*scale_E.shape, self.block)
        half = self.block // 2
        packed = (code_EC[..., :half] | code_EC[..., half:] << 4).reshape(*x.shape[:-1], -1)
        return _row(packed, jnp.repeat(scale_E, half, axis=-1))

    def decode(
        self, rows: UInt8[Array, "*rows W"], dtype: Any = jnp.bfloat16
    ) -> Float[Array, "*rows K"]:
        """Rows of bytes to keys; bfloat16 holds them exactly."""
        half = self.channels // 2
        in_blocks = lambda x: x.reshape(*rows.shape[:-1], -1, self.block // 2)
        packed, scale = in_blocks(rows[..., :half]), in_blocks(rows[..., half : self.channels])
        packed = packed.astype(jnp.int32)
        values = e2m1(jnp.concatenate([packed, packed >> 4], axis=-1))
        keys = values * _powers(scale[..., :1])
        return keys.reshape(*rows.shape[:-1], self.channels).astype(dtype)

    def by_nibble(self, x: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
        """Channels in the order of codes: those in low nibbles, then those in high ones."""
        halves = x.reshape(*x.shape[:-1], -1, 2, self.block // 2)
        return jnp.swapaxes(halves, -3, -2).reshape(x.shape)


Codec: TypeAlias = Fp8Codec | Fp4Codec
# The codecs that kernels take.
FP8, FP4 = Fp8Codec(channels=512, rotated=64), Fp4Codec(channels=128)


def _scaled(
    x: Float[Array, "*rows K"], block: int, to: quantize.Format
) -> tuple[Float32[Array, "*rows K"], UInt8[Array, "*rows E"]]:
    """Values over their block's scale, numbers of the format, and the scales in E8M0."""
    x_EC = quantize.in_blocks(x, block)
    amax_E1 = jnp.max(jnp.abs(x_EC), axis=-1, keepdims=True)
    values_EC, scale_bits_E1 = quantize.scaled(x_EC, amax_E1, to)
    exponent_E1 = scale_bits_E1 >> quantize.MANTISSA
    scale_E = jnp.where(jnp.isfinite(amax_E1), exponent_E1, _NOT_FINITE)[..., 0].astype(jnp.uint8)
    return values_EC.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scale_E


def _powers(scale: UInt8[Array, "*dims"]) -> Float32[Array, "*dims"]:
    return jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << quantize.MANTISSA, jnp.float32)


def e2m1(code: Int32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """E2M1 codes, the lowest four bits, as float32; subnormals are a difference."""
    magnitude = code & 7
    normal = jax.lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    size = jnp.where(magnitude < 2, 2.0 * normal - 1.0, normal)
    return jnp.where((code & 8) == 0, size, -size)


def _row(*parts: UInt8[Array, "*rows _"]) -> UInt8[Array, "*rows W"]:
    row = jnp.concatenate(parts, axis=-1)
    missing = _padded(row.shape[-1]) - row.shape[-1]
    return jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, missing)])


def _padded(width: int) -> int:
    return -(-width // _LANES) * _LANES
