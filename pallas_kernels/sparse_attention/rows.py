"""Entries stored in eight bits: one row of bytes each, as in DeepSeek's runtime.

Of a row's 584 bytes, 448 are E4M3 codes of the unrotated channels, 128 the bfloat16 values of the
64 rotated channels, 7 the E8M0 scales of blocks of 64 codes, and one is unused (FlashMLA,
tests/quant.py). Here the low and the high bytes of the rotated channels are separate, so that each
lane is a channel, and rows are padded to 640 bytes, five vectors of 128 lanes: XLA would store
other widths transposed (`byte_rows.Fp8Codec`).

Axis letters: S entries, K = 512 channels, W bytes per row.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.byte_rows import FP8
from pallas_kernels.paged import Paged

CODES, BLOCK, ROTATED = FP8.codes, FP8.block, FP8.rotated
SCALES, CHANNELS, WIDTH = FP8.scales, FP8.channels, FP8.width
BYTES = CODES + 2 * ROTATED + SCALES + 1


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
    return Fp8Rows(FP8.encode(entries))


def decode(data: UInt8[Array, "*rows W"], dtype: Any) -> Float[Array, "*rows K"]:
    """Decode rows of bytes to entries in `dtype`; bfloat16 holds them exactly."""
    return FP8.decode(data, dtype)
