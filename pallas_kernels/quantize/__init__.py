"""Quantised formats: rounding, weights saved in the checkpoint's bits, matmuls with them.

Axis letters: K input channels, N output channels, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import (
    Impl,
    check_arrays,
    check_number,
    check_whole,
    dispatch,
    dtype_of,
)
from pallas_kernels.quantize import gpu, reference, tpu, tpu_rounding, xla
from pallas_kernels.quantize.checkpoint import (
    decode_fp4_blocks,
    decode_fp8_blocks,
    encode_fp4_blocks,
    encode_fp8_blocks,
    fp4_codes,
    fp4_from_checkpoint,
    fp4_scales,
    fp4_to_checkpoint,
    fp8_codes,
    fp8_from_checkpoint,
    fp8_scales,
    fp8_to_checkpoint,
)
from pallas_kernels.quantize.leaves import Fp4Weight, Fp8Weight, Weight, check_weight

__all__ = [
    "Fp4Weight",
    "Fp8Weight",
    "Weight",
    "decode_fp4_blocks",
    "decode_fp8_blocks",
    "dense",
    "encode_fp4_blocks",
    "encode_fp8_blocks",
    "fake_quant_fp4",
    "fake_quant_fp8",
    "fp4_codes",
    "fp4_from_checkpoint",
    "fp4_scales",
    "fp4_to_checkpoint",
    "fp8_codes",
    "fp8_from_checkpoint",
    "fp8_scales",
    "fp8_to_checkpoint",
    "hadamard",
    "linear",
]

_FORMS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}
_ROUNDING = {"tpu": tpu_rounding, "xla": reference, "reference": reference}


def fake_quant_fp8(
    x: Float[Array, "*rows K"], *, block: int, amax_floor: float = 1e-4, impl: Impl = "auto"
) -> Float[Array, "*rows K"]:
    """The values that x has after a trip through FP8 E4M3.

    Each block of the last axis gets the scale 2^ceil(log2(amax / 448)); values are rounded to
    nearest, ties to even. The gradient passes straight through.

    What is infinite or NaN stays so, and takes all meaning from the rest of its block. A value
    within half a step of the largest that x's dtype has may become infinite.

    Args:
      x: at least one dim, any float dtype; rounded in float32.
      block: channels per scale; the last block may be shorter.
      amax_floor: least amax of a block, so that zeros have a scale.
      impl: 'tpu' takes blocks of 32, 64 and 128; all forms give the same bits of finite blocks.

    Returns:
      The shape and dtype of x.

    Raises:
      NotImplementedError: no such form, or it does not take these arguments.
      TypeError: x is no array of floats.
      ValueError: x has no dims, or the block is not at least 1.
    """
    _check_rows("quantize.fake_quant_fp8", x, block)
    check_number("quantize.fake_quant_fp8", amax_floor=amax_floor)
    settings = (("block", block), ("amax_floor", amax_floor))
    return _straight_through(x, "fake_quant_fp8", settings, impl)


def fake_quant_fp4(
    x: Float[Array, "*rows K"], *, block: int = 32, impl: Impl = "auto"
) -> Float[Array, "*rows K"]:
    """The values that x has after a trip through FP4 E2M1, scale 2^ceil(log2(amax / 6)) per block.

    Otherwise as `fake_quant_fp8`.
    """
    _check_rows("quantize.fake_quant_fp4", x, block)
    return _straight_through(x, "fake_quant_fp4", (("block", block),), impl)


def _check_rows(op: str, x: Any, block: Any = 1) -> None:
    if not jnp.issubdtype(dtype := dtype_of(op, "x", x), jnp.floating):
        raise TypeError(f"{op}: x is {dtype}; it takes floats.")
    if not jnp.ndim(x):
        raise ValueError(f"{op}: x has no dims; its last is that of the channels.")
    check_whole(op, "block", block)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _straight_through(
    x: Float[Array, "*rows K"], name: str, settings: tuple[tuple[str, Any], ...], impl: Impl
) -> Float[Array, "*rows K"]:
    if x.size == 0:
        return x
    return dispatch("quantize", name, impl, _ROUNDING, x, **dict(settings))


@_straight_through.defjvp
def _(name: str, settings: Any, impl: Impl, primals: Any, tangents: Any) -> Any:
    return _straight_through(*primals, name, settings, impl), tangents[0]


def hadamard(x: Float[Array, "*rows K"], *, impl: Impl = "auto") -> Float[Array, "*rows K"]:
    """Orthonormal Walsh-Hadamard transform of the last axis, in float32, returned in x's dtype.

    Raises:
      ValueError: K is not a power of two.
      TypeError: x is no array of floats.
      NotImplementedError: no such form, or it does not take these arguments.
    """
    _check_rows("quantize.hadamard", x)
    channels = x.shape[-1]
    if channels < 1 or channels & (channels - 1):
        raise ValueError(
            f"quantize.hadamard: x has {channels} channels, of which the transform is not defined: "
            "use a power of two."
        )
    return _hadamard(x, impl)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _hadamard(x: Float[Array, "*rows K"], impl: Impl) -> Float[Array, "*rows K"]:
    return dispatch("quantize", "hadamard", impl, _ROUNDING, x)


@_hadamard.defjvp
def _(impl: Impl, primals: Any, tangents: Any) -> Any:
    # XLA's form, which can be transposed.
    return _hadamard(*primals, impl), reference.hadamard(*tangents)


def dense(w: Weight, dtype: Any) -> Float[Array, "*stack N K"]:
    """The matrix [..., N, K] that a weight in any format stands for, as an array in `dtype`."""
    return reference.dense(w, dtype)


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    *,
    layer: Int[Array, ""] | None = None,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
    impl: Impl = "auto",
) -> Float[Array, "*rows N"]:
    """Multiply x by the transpose of w, a matrix [N, K] in any format.

    Differentiable in x, and in w where that is an array: quantised weights are constants.

    Args:
      x: rows of input channels, or one row.
      w: an array in x's dtype, or a quantised weight, multiplied out in x's dtype.
      layer: which matrix to take where w is a stack of them; kernels read it where it lies.
      groups: G, a divisor of N: N / G outputs each take K channels of x, their group's own.
      precision: of the matmul, as in `jnp.einsum`.
      impl: 'reference' dequantises the whole weight first, 'xla' inside the matmul where XLA can,
        'tpu' and 'gpu' (in bfloat16) tile by tile on the chip; 'auto' takes the best form for
        the compile target.

    Returns:
      Accumulated in float32 (or wider, if x is), in x's dtype.

    Raises:
      NotImplementedError: no such form, or it does not take these arguments.
      TypeError: x is no array of floats, the layer no integer, or parts of w are of other dtypes
        than `Weight` says.
      ValueError: shapes that do not fit together.
    """
    _check_linear(x, w, layer, groups)
    layer = layer if layer is None else jnp.asarray(layer)
    if isinstance(w, Fp8Weight | Fp4Weight):
        return _linear_quantised(x, w, layer, groups, precision, impl)
    # XLA multiplies plain arrays best, and differentiates them.
    impl = "xla" if impl == "auto" else impl
    static = {"groups": groups, "precision": precision}
    return dispatch("quantize", "linear", impl, _FORMS, x, w, layer, **static)


def _check_linear(x: Any, w: Any, layer: Any, groups: int) -> None:
    op = "quantize.linear"
    _check_rows(op, x)
    check_whole(op, "groups", groups)
    if layer is not None:
        check_arrays(op, {"layer": layer}, integers=("layer",))
    check_weight(op, "w", w)
    shape: Any = getattr(w, "shape", ())  # A plain number has none.
    if len(shape) != (2 if layer is None else 3):
        wanted = "a matrix, unless a layer is named" if layer is None else "a stack of matrices"
        raise ValueError(f"{op}: w stands for {shape}; it takes {wanted}.")
    N, K = shape[-2:]
    if N % groups or groups * K != x.shape[-1]:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} channels; {groups} groups of a matrix of {N} x {K} take "
            f"{groups * K}, and groups divide {N}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear_quantised(
    x: Float[Array, "*rows GK"],
    w: Fp8Weight | Fp4Weight,
    layer: Int[Array, ""] | None,
    groups: int,
    precision: jax.lax.PrecisionLike,
    impl: Impl,
) -> Float[Array, "*rows N"]:
    static = {"groups": groups, "precision": precision}
    return dispatch("quantize", "linear", impl, _FORMS, x, w, layer, **static)


def _forward(x: Any, w: Any, layer: Any, groups: int, precision: Any, impl: Impl) -> Any:
    return _linear_quantised(x, w, layer, groups, precision, impl), (w, layer)


def _backward(groups: int, precision: Any, impl: Impl, saved: Any, dy: Any) -> Any:
    w, layer = saved
    # A layer's number that is known while tracing comes back as NumPy's.
    layer = layer if layer is None else jnp.asarray(layer)
    static = {"groups": groups, "precision": precision}
    dx = dispatch("quantize", "linear_backward", impl, _FORMS, dy, w, layer, **static)
    return dx, None, None


_linear_quantised.defvjp(_forward, _backward)
