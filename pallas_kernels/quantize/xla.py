"""Matmuls with quantised weights in plain XLA, laid out so that it dequantises in the matmul.

Axis letters: R rows, K input channels, N output channels, B blocks of K, C channels of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.dtypes import accumulator
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.leaves import (
    FP4_BLOCK,
    FP8_BLOCK,
    Fp4Weight,
    Fp8Weight,
    Weight,
    of_layer,
)

_STRIP = 2**22


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows N"]:
    """Few rows: a sum per block, times its scale. Many: weights times scales, then one matmul."""
    w = of_layer(w, layer)
    if not isinstance(w, Fp8Weight | Fp4Weight) or not _cuts(w, groups):
        return reference.linear(x, w, groups=groups, precision=precision)
    if groups > 1:
        return _by_group(functools.partial(linear, precision=precision), x, w, groups)
    code_BCN, scale_BN = _blocks(w)
    B, C, N = code_BCN.shape
    x_RK = x.reshape(-1, x.shape[-1])
    x_RK = jnp.pad(x_RK, ((0, 0), (0, B * C - x_RK.shape[1])))
    matmul = functools.partial(
        jnp.matmul, precision=precision, preferred_element_type=accumulator(x.dtype)
    )
    # Up to here the sums need no more memory than the 16-bit copy of the weight that XLA makes of
    # the other form on some devices.
    if len(x_RK) <= C // 2:
        x_BRC = jnp.swapaxes(x_RK.reshape(-1, B, C), 0, 1)
        sum_BRN = matmul(x_BRC, code_BCN.astype(x.dtype))
        y_RN = jnp.sum(sum_BRN * scale_BN[:, None, :].astype(sum_BRN.dtype), axis=0)
    else:
        # Powers of two are exact in any dtype.
        exact = x.dtype if w.scale.dtype == jnp.float8_e8m0fnu else jnp.float32
        w_BCN = code_BCN.astype(exact) * scale_BN[:, None, :].astype(exact)
        y_RN = matmul(x_RK, w_BCN.reshape(B * C, N).astype(x.dtype))
    return y_RN.reshape(*x.shape[:-1], N).astype(x.dtype)


def _cuts(w: Fp8Weight | Fp4Weight, groups: int) -> bool:
    """Whether groups of N consist of whole blocks."""
    return groups == 1 or isinstance(w, Fp4Weight) or w.shape[0] // groups % FP8_BLOCK == 0


def _by_group(
    run: Callable[[Any, Any], Array], x: Float[Array, "*rows C"], w: Any, groups: int
) -> Float[Array, "*rows D"]:
    """One matmul per group in sequence, so that the weight is never dequantised as a whole."""
    split = lambda part: jnp.split(part, groups, axis=-1)
    weights = map(type(w), split(w.codes), split(w.scale))
    return jnp.concatenate(list(map(run, split(x), weights)), axis=-1)


def linear_backward(
    dy: Float[Array, "*rows N"],
    w: Fp8Weight | Fp4Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows GK"]:
    """The gradient of x by strips of K, so that the weight is never dequantised as a whole."""
    w = of_layer(w, layer)
    if not _cuts(w, groups):
        return reference.linear_backward(dy, w, groups=groups, precision=precision)
    if groups > 1:
        return _by_group(functools.partial(linear_backward, precision=precision), dy, w, groups)
    (N, K), rows = w.shape, w.codes.shape[0]
    dy_RN = dy.reshape(-1, N)
    strips = _strips(w)
    scales, size = w.scale.shape[0] // strips, K // strips

    def add(i: int | Array, dx_RK: Float[Array, "R K"]) -> Float[Array, "R K"]:
        part = lambda a, size: jax.lax.dynamic_slice_in_dim(a, i * size, size)
        strip = type(w)(part(w.codes, rows // strips), part(w.scale, scales))
        dx_RC = reference.linear_backward(dy_RN, strip, precision=precision)
        return jax.lax.dynamic_update_slice_in_dim(dx_RK, dx_RC, i * size, axis=1)

    dx_RK = jnp.zeros((len(dy_RN), K), dy.dtype)
    dx_RK = add(0, dx_RK) if strips == 1 else jax.lax.fori_loop(0, strips, add, dx_RK)
    return dx_RK.reshape(*dy.shape[:-1], K)


def _strips(w: Fp8Weight | Fp4Weight) -> int:
    """Into how many strips of whole blocks of K to cut: the fewest of at most `_STRIP` weights."""
    (N, K), blocks = w.shape, w.scale.shape[0]
    if K % blocks or K // blocks not in (FP4_BLOCK, FP8_BLOCK):
        return 1
    parts = (n for n in range(1, blocks + 1) if blocks % n == 0 and N * K // n <= _STRIP)
    return next(parts, blocks)


def _blocks(w: Fp8Weight | Fp4Weight) -> tuple[Float[Array, "B C N"], Float32[Array, "B N"]]:
    """Codes as FP8 values by blocks of K, and the factors to multiply them by."""
    scale, N = w.scale.astype(jnp.float32), w.codes.shape[-1]
    if isinstance(w, Fp4Weight):
        code_BCN = reference.decode_e2m1(w.codes.reshape(-1, FP4_BLOCK // 2, N))
        return code_BCN, scale * reference.E2M1_UNIT
    missing = -w.codes.shape[0] % FP8_BLOCK
    code_BCN = jnp.pad(w.codes, ((0, missing), (0, 0))).reshape(-1, FP8_BLOCK, N)
    return code_BCN, jnp.repeat(scale, FP8_BLOCK, axis=1)[:, :N]
