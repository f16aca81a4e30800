"""Weights in the checkpoint's bits, laid out as matmuls read them: K first, N along lanes.

Axis letters: K input channels, N output channels; stacks of layers and experts may come first.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import check_dtype, check_kind

FP8_BLOCK = 128  # one scale per 128 x 128 block
FP4_BLOCK = 32  # one scale per 32 input channels of each output channel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """E4M3 in blocks of 128 x 128. The last block of either dim may be short.

    Attributes:
      codes: float8_e4m3fn [..., K, N]; the value of NaN codes differs between chips.
      scale: float8_e8m0fnu or float32 [..., ceil(K / 128), ceil(N / 128)], finite, at least
        2^-126.
    """

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised matrix: [..., N, K], as in the checkpoint."""
        *stack, k, n = self.codes.shape
        return (*stack, n, k)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp4Weight:
    """E2M1 in blocks of 32 along K, two codes to a byte.

    The byte in row 16 * b + r holds elements 32 * b + r (low nibble) and 32 * b + 16 + r (high):
    unpacking a block stacks two halves, without interleaving.

    Attributes:
      codes: uint8 [..., K / 2, N].
      scale: float8_e8m0fnu [..., K / 32, N], finite, at least 2^-126.
    """

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised matrix: [..., N, K], as in the checkpoint."""
        *stack, half_k, n = self.codes.shape
        return (*stack, n, 2 * half_k)


Weight: TypeAlias = Float[Array, "..."] | Fp8Weight | Fp4Weight


def of_layer(w: Any, layer: Array | None) -> Any:
    """Slice one matrix from a stack; `w` itself if `layer` is None."""
    if layer is None:
        return w
    take = lambda part: jax.lax.dynamic_index_in_dim(part, layer, 0, keepdims=False)
    return jax.tree.map(take, w)


def as_stack(w: Any, layer: Array | None) -> tuple[Any, Int[Array, " 1"]]:
    """A stack [L, ...] and a layer index, for kernels: a single matrix is a stack of one."""
    if layer is None:
        return jax.tree.map(lambda part: part[None], w), jnp.zeros(1, jnp.int32)
    return w, layer.astype(jnp.int32)[None]


def check_weight(op: str, name: str, w: Any) -> None:
    """Require an array of floats, or codes and scales that match.

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong shape.
    """
    if not isinstance(w, Fp8Weight | Fp4Weight):
        check_kind(op, name, w)
        return
    fp8, e8m0 = isinstance(w, Fp8Weight), jnp.float8_e8m0fnu
    check_dtype(op, f"{name}.codes", w.codes, jnp.float8_e4m3fn if fp8 else jnp.uint8)
    check_dtype(op, f"{name}.scale", w.scale, e8m0, *[jnp.float32] * fp8)
    if len(w.codes.shape) < 2:
        raise ValueError(f"{op}: {name}.codes has shape {w.codes.shape}; it must be a matrix.")
    *stack, rows, n = w.codes.shape
    parts = (-(-rows // FP8_BLOCK), -(-n // FP8_BLOCK)) if fp8 else (2 * rows // FP4_BLOCK, n)
    if w.scale.shape != (*stack, *parts) or (not fp8 and 2 * rows % FP4_BLOCK):
        raise ValueError(
            f"{op}: {name}.scale has shape {w.scale.shape}, which does not match codes of shape"
            f" {w.codes.shape}: blocks are {'128 x 128' if fp8 else '16 bytes of a column'}."
        )
