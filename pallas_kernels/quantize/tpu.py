"""Matmuls with quantised weights on TPUs: codes are dequantised in VMEM, tile by tile.

Weights are read in place: the index of their tiles picks the layer of a stack, that of the rows'
tiles a group's channels. Nothing is sliced beforehand.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import in_hbm
from pallas_kernels.quantize import tpu_few, tpu_many
from pallas_kernels.quantize.leaves import Fp4Weight, Fp8Weight, Weight, as_stack

_FEW = {Fp8Weight: 128, Fp4Weight: 16}  # products are scaled for up to this many rows


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows N"]:
    """`quantize.linear`, for quantised weights.

    Raises:
      Unsupported: an array, another dtype or K, or groups that are not whole blocks of N.
    """
    stack, layer_1 = _checked(x, w, layer, groups)
    x_RK = x.reshape(-1, x.shape[-1])
    run = tpu_few.matmul if len(x_RK) <= _FEW[type(w)] else tpu_many.matmul
    y_RN = run(x_RK, stack, layer_1, groups, precision)
    return y_RN.reshape(*x.shape[:-1], stack.codes.shape[-1])


def linear_backward(
    dy: Float[Array, "*rows N"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows GK"]:
    """`xla.linear_backward`, for quantised weights.

    Raises:
      Unsupported: an array, or another dtype, K or N.
    """
    stack, layer_1 = _checked(dy, w, layer, groups)
    N, K = w.shape[-2:]
    if N // groups % 128:
        raise Unsupported(
            "The TPU form of linear_backward takes N per group in multiples of 128, not"
            f" {N // groups}."
        )
    dy_RN = dy.reshape(-1, N)
    dx_RK = tpu_many.matmul(dy_RN, stack, layer_1, groups, precision, transposed=True)
    return dx_RK.reshape(*dy.shape[:-1], groups * K)


def _checked(
    x: Array, w: Weight, layer: Array | None, groups: int
) -> tuple[Fp8Weight | Fp4Weight, Int[Array, " 1"]]:
    """The weight as a stack [L, ...], and the layer index; raises `Unsupported`."""
    if not isinstance(w, Fp8Weight | Fp4Weight):
        raise Unsupported("The TPU form of linear takes Fp8Weight and Fp4Weight, not arrays.")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"The TPU form of linear takes bfloat16 and float32, not {x.dtype}.")
    if w.codes.ndim != (2 if layer is None else 3) or x.size == 0:
        raise Unsupported(
            "The TPU form of linear takes one matrix and at least one row, not codes of shape"
            f" {w.codes.shape} and rows of shape {x.shape}."
        )
    N, K = w.shape[-2:]
    if K % 256 and not (K % 128 == 0 and isinstance(w, Fp8Weight)):
        raise Unsupported(
            f"The TPU form of linear takes K in multiples of 128 (FP8) or 256 (FP4), not {K}."
        )
    if groups > 1 and N // groups % 128:
        raise Unsupported(
            f"The TPU form of linear takes N per group in multiples of 128, not {N // groups}."
        )
    return as_stack(w if layer is None else in_hbm(w), layer)
