"""Matmuls with quantised weights on TPUs: the codes become numbers in VMEM, tile by tile.

Weights are read where they lie: a layer of a stack by the tiles' index, a group's channels by that
of the rows' tiles. Nothing is sliced before.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import in_hbm
from pallas_kernels.quantize import tpu_few, tpu_many
from pallas_kernels.quantize.leaves import Fp4Weight, Fp8Weight, Weight, as_stack

_FEW = {Fp8Weight: 128, Fp4Weight: 16}  # rows up to which products are scaled


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows N"]:
    """As `quantize.linear`, for quantised weights.

    Raises:
      Unsupported: another kind of weight, dtype, or K; groups that are not whole blocks of N.
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
    """As `xla.linear_backward`, for quantised weights.

    Raises:
      Unsupported: another kind of weight, dtype, K or N.
    """
    stack, layer_1 = _checked(dy, w, layer, groups)
    N, K = w.shape[-2:]
    if N // groups % 128:
        raise Unsupported(f"The TPU form of linear_backward takes N in 128s, not {N // groups}.")
    dy_RN = dy.reshape(-1, N)
    dx_RK = tpu_many.matmul(dy_RN, stack, layer_1, groups, precision, transposed=True)
    return dx_RK.reshape(*dy.shape[:-1], groups * K)


def _checked(
    x: Array, w: Weight, layer: Array | None, groups: int
) -> tuple[Fp8Weight | Fp4Weight, Int[Array, " 1"]]:
    """The weight as a stack [L, ...], and which layer of it."""
    if not isinstance(w, Fp8Weight | Fp4Weight):
        raise Unsupported("The TPU form of linear takes Fp8Weight and Fp4Weight, not arrays.")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"The TPU form of linear takes bfloat16 and float32, not {x.dtype}.")
    if w.codes.ndim != (2 if layer is None else 3) or x.size == 0:
        raise Unsupported(f"The TPU form of linear takes one matrix and rows; got {w.codes.shape}.")
    N, K = w.shape[-2:]
    if K % 256 and not (K % 128 == 0 and isinstance(w, Fp8Weight)):
        raise Unsupported(f"The TPU form of linear takes K in 128s (FP8) or 256s (FP4), not {K}.")
    if groups > 1 and N // groups % 128:
        raise Unsupported(f"The TPU form of linear takes groups of 128s of N, not {N // groups}.")
    return as_stack(w if layer is None else in_hbm(w), layer)
