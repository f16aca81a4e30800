"""Weights kept in the checkpoint's bits, laid out as matmuls read them: K first, N along lanes.

Axis letters: K input channels, N output channels; stacks of layers and experts may come first.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float

FP8_BLOCK = 128  # one scale per 128 x 128 block
FP4_BLOCK = 32  # one scale per 32 input channels of each output channel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """E4M3 in blocks of 128 x 128. The last block of either dim may be short.

    Attributes:
      codes: float8_e4m3fn [..., K, N].
      scale: float8_e8m0fnu or float32 [..., ceil(K / 128), ceil(N / 128)].
    """

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix it stands for: [..., N, K], as in the checkpoint."""
        *stack, k, n = self.codes.shape
        return (*stack, n, k)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp4Weight:
    """E2M1 in blocks of 32 along K, two codes to a byte.

    The byte in row 16 * b + r holds elements 32 * b + r (low nibble) and 32 * b + 16 + r (high):
    a block is unpacked by stacking two halves, without interleaving.

    Attributes:
      codes: uint8 [..., K / 2, N].
      scale: float8_e8m0fnu [..., K / 32, N].
    """

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix it stands for: [..., N, K], as in the checkpoint."""
        *stack, half_k, n = self.codes.shape
        return (*stack, n, 2 * half_k)


Weight: TypeAlias = Float[Array, "..."] | Fp8Weight | Fp4Weight
