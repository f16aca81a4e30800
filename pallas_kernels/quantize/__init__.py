"""Quantised formats: rounding, weights kept in the checkpoint's bits, matmuls with them.

Axis letters: K input channels, N output channels, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import (
    Impl,
    LazyForm,
    check_arrays,
    check_kind,
    check_number,
    check_whole,
    dispatch,
)
from pallas_kernels.quantize import reference, tpu, tpu_rounding, xla
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
from pallas_kernels.quantize.reference import dense

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

_FORMS = {"tpu": tpu, "gpu": LazyForm(f"{__name__}.gpu"), "xla": xla, "reference": reference}
_ROUNDING = {"tpu": tpu_rounding, "xla": reference, "reference": reference}


def fake_quant_fp8(
    x: Float[Array, "*rows K"], *, block: int, amax_floor: float = 1e-4, impl: Impl = "auto"
) -> Float[Array, "*rows K"]:
    """Round x to FP8 E4M3 and back.

    Each block of the last axis gets the scale 2^ceil(log2(amax / 448)); values are rounded to
    nearest, ties to even. The gradient passes straight through.

    Infinities and NaNs stay as they are and make the rest of their block meaningless. A value
    within half a step of the largest finite value of x's dtype may become infinite.

    Args:
      x: at least one dim, any float dtype; rounded in float32.
      block: channels per scale; the last block may be shorter.
      amax_floor: lower bound of a block's amax, so that blocks of zeros have a scale.
      impl: 'tpu' takes blocks of 32, 64 and 128; all forms agree bit for bit on finite blocks.

    Returns:
      An array of x's shape and dtype.

    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: x is not an array of floats.
      ValueError: x has no dims, or block is less than 1.
    """
    _check_rows("quantize.fake_quant_fp8", x, block)
    check_number("quantize.fake_quant_fp8", amax_floor=amax_floor)
    settings = (("block", block), ("amax_floor", amax_floor))
    return _straight_through(x, "fake_quant_fp8", settings, impl)


def fake_quant_fp4(
    x: Float[Array, "*rows K"], *, block: int = 32, impl: Impl = "auto"
) -> Float[Array, "*rows K"]:
    """Round x to FP4 E2M1 and back, with the scale 2^ceil(log2(amax / 6)) per block.

    Otherwise like `fake_quant_fp8`.
    """
    _check_rows("quantize.fake_quant_fp4", x, block)
    return _straight_through(x, "fake_quant_fp4", (("block", block),), impl)


def _check_rows(op: str, x: Any, block: Any = 1) -> None:
    check_kind(op, "x", x)
    if not jnp.ndim(x):
        raise ValueError(f"{op}: x has no dims; its last dim must be the channels.")
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
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: x is not an array of floats.
      ValueError: K is not a power of two.
    """
    _check_rows("quantize.hadamard", x)
    channels = x.shape[-1]
    if channels < 1 or channels & (channels - 1):
        raise ValueError(
            f"quantize.hadamard: x has {channels} channels; the transform is only defined for a "
            "power of two."
        )
    return _hadamard(x, impl)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _hadamard(x: Float[Array, "*rows K"], impl: Impl) -> Float[Array, "*rows K"]:
    return dispatch("quantize", "hadamard", impl, _ROUNDING, x)


@_hadamard.defjvp
def _(impl: Impl, primals: Any, tangents: Any) -> Any:
    # XLA's form, because it can be transposed.
    return _hadamard(*primals, impl), reference.hadamard(*tangents)


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

    Differentiable in x, and in w if it is an array: quantised weights are constants.

    Args:
      x: rows of input channels, or one row.
      w: an array in x's dtype, or a quantised weight, which is dequantised to x's dtype.
      layer: index of the matrix if w is a stack; kernels read it in place.
      groups: G, a divisor of N: each group of N / G outputs reads its own K channels of x.
      precision: precision of the matmul, as in `jnp.einsum`.
      impl: 'reference' dequantises the entire weight first, 'xla' inside the matmul where XLA can,
        'tpu' and 'gpu' (in bfloat16) tile by tile on the chip; 'auto' picks the best form for the
        compile target.

    Returns:
      The product in x's dtype, accumulated in float32, or in x's dtype if wider.

    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: x is not an array of floats, layer is not an integer, or parts of w have a dtype
        that `Weight` does not allow.
      ValueError: shapes that do not match.
    """
    _check_linear(x, w, layer, groups)
    layer = layer if layer is None else jnp.asarray(layer)
    static = {"groups": groups, "precision": precision}
    if isinstance(w, Fp8Weight | Fp4Weight):
        return _linear_quantised(x, w, layer, impl, tuple(static.items()))
    # XLA is best at multiplying plain arrays, and differentiates the product.
    impl = "xla" if impl == "auto" else impl
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
        expected = "a matrix if no layer is given" if layer is None else "a stack of matrices"
        raise ValueError(f"{op}: w stands for {shape}; it must be {expected}.")
    N, K = shape[-2:]
    if N % groups or groups * K != x.shape[-1]:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} channels; {groups} groups of a matrix of {N} x {K} take "
            f"{groups * K}, and groups must divide {N}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear_quantised(
    x: Float[Array, "*rows GK"],
    w: Fp8Weight | Fp4Weight,
    layer: Int[Array, ""] | None,
    impl: Impl,
    static: tuple[tuple[str, Any], ...],
) -> Float[Array, "*rows N"]:
    return dispatch("quantize", "linear", impl, _FORMS, x, w, layer, **dict(static))


def _forward(x: Any, w: Any, layer: Any, impl: Impl, static: Any) -> Any:
    return _linear_quantised(x, w, layer, impl, static), (w, layer)


def _backward(impl: Impl, static: Any, saved: Any, dy: Any) -> Any:
    w, layer = saved
    # A layer index that is known while tracing comes back as a NumPy scalar.
    layer = layer if layer is None else jnp.asarray(layer)
    dx = dispatch("quantize", "linear_backward", impl, _FORMS, dy, w, layer, **dict(static))
    return dx, None, None


_linear_quantised.defvjp(_forward, _backward)
