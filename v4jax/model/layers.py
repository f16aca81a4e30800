"""Norms, rotary embedding and linear maps.

Axis letters: B batch, T tokens, D channels of the array at hand, H heads, K head dim, Q rotary
pairs.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import quantize, rotary, sums
from pallas_kernels.grouped_matmul import LoraWeight
from pallas_kernels.quantize.leaves import of_layer
from pallas_kernels.residuals import saveable
from v4jax.model import sharding, storage
from v4jax.model.config import ModelConfig, Yarn
from v4jax.model.numerics import Numerics
from v4jax.model.storage import value

_TILE = 8  # rows of the tiles in which TPUs store arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropped:
    """The first factor of a low-rank update, with dropout on its input, for training.

    Attributes:
      a: the factor, float [..., r, K].
      key: raw random keys, [..., 2].
      rate: fraction of each token's channels that are dropped.
    """

    a: Any
    key: Any
    rate: float = dataclasses.field(metadata={"static": True})


def linear(
    x: Float[Array, "*rows K"], weight: Any, axes: tuple[str | None, str | None] = (None, None)
) -> Float[Array, "*rows N"]:
    """X times a weight [N, K] in any format; accumulates in float32, returns x's dtype.

    Args:
      x: the input; its first dim is the batch.
      weight: the weight, or one layer of a stack.
      axes: logical axes of the weight. Kernels multiply by quantised weights on each device, and
        sums over a split K are added up in float32.
    """
    matrix, _ = storage.matrix_and_layer(weight)
    if isinstance(matrix, LoraWeight):
        return _updated(x, matrix, axes)
    if not isinstance(matrix, quantize.Fp8Weight | quantize.Fp4Weight):
        return saveable(quantize.linear(x, _dense(weight, axes)))
    (outputs, inputs), middle = axes, (None,) * (x.ndim - 2)

    def run(x_here: Array, matrix: Any, layer: Any) -> Array:
        y = quantize.linear(x_here, matrix, layer=layer)
        if inputs is None or x_here.shape[-1] == x.shape[-1]:
            return y
        return jax.lax.psum(y.astype(jnp.float32), sharding.mesh_axes(inputs)).astype(y.dtype)

    y = storage.per_device(
        run,
        x,
        weight=weight,
        axes=(("batch", *middle, inputs),),
        weight_axes=axes,
        out=("batch", *middle, outputs),
    )
    return saveable(y)


def _updated(
    x: Float[Array, "*rows K"],
    weight: LoraWeight,
    axes: tuple[str | None, str | None],
    precision: Any = None,
) -> Float[Array, "*rows N"]:
    """Base and update; with a precision, everything is in x's dtype, which is float32."""
    inputs, a = x, weight.a
    if isinstance(a, Dropped):
        mask = jax.random.bernoulli(jax.random.wrap_key_data(a.key), 1.0 - a.rate, x.shape)
        inputs, a = jnp.where(mask, x / (1.0 - a.rate), 0.0).astype(x.dtype), a.a
    plain = lambda x, factor, axes: quantize.linear(
        x, _dense(factor, axes).astype(x.dtype), precision=precision
    )
    low = plain(inputs, a, (None, axes[1]))
    delta = plain(low, weight.b, (axes[0], None)).astype(jnp.float32)
    base = linear(x, weight.base, axes) if precision is None else linear_float32(x, weight.base)
    return (base.astype(jnp.float32) + weight.scale * delta).astype(x.dtype)


def linear_float32(x: Float[Array, "*rows K"], weight: Any) -> Float32[Array, "*rows N"]:
    """`linear` in float32 throughout, at full precision on every device."""
    matrix, x32, highest = value(weight), x.astype(jnp.float32), jax.lax.Precision.HIGHEST
    unsplit = (None, None)
    if isinstance(matrix, LoraWeight):
        return _updated(x32, matrix, unsplit, precision=highest)
    dense = _dense(weight, unsplit).astype(jnp.float32)
    return saveable(quantize.linear(x32, dense, precision=highest))


def _dense(weight: Any, axes: tuple[str | None, str | None]) -> Float[Array, "N K"]:
    """A weight that is an array, or a layer of a stack of arrays."""
    matrix, layer = storage.matrix_and_layer(weight)
    return storage.whole(matrix if layer is None else read_in_place(matrix, layer), axes)


def read_in_place(
    w: Float[Array, "*L N K"], layer: Int[Array, ""] | None = None
) -> Float[Array, "N K"]:
    """A matrix that a program reads in a loop, or one of a stack.

    tpu7x multiplies by 16-bit weights fastest in tiles larger than those in which they are stored,
    and programs would first copy them all. Seen as tiles of the smaller size, they stay in place.
    """
    take = lambda w: w if layer is None else jax.lax.dynamic_index_in_dim(w, layer, 0, False)
    *stack, N, K = w.shape
    if w.dtype.itemsize != 2 or N % (_TILE * sharding.ways("heads")):
        return take(w)

    def in_tiles(w: Array) -> Array:
        tiles = jax.lax.optimization_barrier(w.reshape(*stack, -1, _TILE, K))
        return take(tiles).reshape(N, K)

    return jax.lax.platform_dependent(w, tpu=in_tiles, default=take)


def grouped_linear(x_BTGP: Float[Array, "B T G P"], weight_QP: Any) -> Float[Array, "B T Q"]:
    """One linear map per group; the weight's rows are the groups' outputs, concatenated."""
    matrix_QP, layer = storage.matrix_and_layer(weight_QP)
    if not isinstance(matrix_QP, quantize.Fp8Weight | quantize.Fp4Weight):
        matrix_QP = matrix_QP if layer is None else of_layer(matrix_QP, layer)
        return saveable(_by_group(x_BTGP, storage.whole(matrix_QP, ("heads", None)), None))
    x_BTQ = storage.per_device(
        _by_group,
        x_BTGP,
        weight=weight_QP,
        axes=(("batch", None, "heads", None),),
        weight_axes=("heads", None),
        out=("batch", None, "heads"),
    )
    return saveable(x_BTQ)


def _by_group(
    x_BTGP: Float[Array, "B T G P"], weight: Any, layer: Int[Array, ""] | None
) -> Float[Array, "B T Q"]:
    x_BTC = x_BTGP.reshape(*x_BTGP.shape[:2], -1)
    return quantize.linear(x_BTC, weight, layer=layer, groups=x_BTGP.shape[2])


def rms_norm(x: Float[Array, "*rows D"], scale_D: Any, eps: float) -> Float[Array, "*rows D"]:
    """Root-mean-square norm in float32, including the scale, cast once to x's dtype."""
    return _rms_norm(eps, x, value(scale_D))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(
    eps: float, x: Float[Array, "*rows D"], scale_D: Float[Array, " D"]
) -> Float[Array, "*rows D"]:
    x32, inverse, scale = _normed(eps, x, scale_D)
    return (x32 * inverse * scale).astype(x.dtype)


def _normed(eps: float, x: Array, scale_D: Array) -> tuple[Array, Array, Array]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32, inverse, jnp.expand_dims(scale_D.astype(jnp.float32), tuple(range(x.ndim - 1)))


def _rms_norm_backward(
    eps: float, saved: tuple[Array, Array], grad: Float[Array, "*rows D"]
) -> tuple[Array, Array]:
    x, scale_D = saved
    x32, inverse, scale = _normed(eps, x, scale_D)
    grad32 = grad.astype(jnp.float32)
    normed, scaled = x32 * inverse, grad32 * scale
    mean = sums.dot(scaled, normed)[..., None] / x.shape[-1]
    dscale_D = jnp.sum(grad32 * normed, axis=tuple(range(x.ndim - 1)))
    dx = inverse * (scaled - normed * mean)
    return dx.astype(x.dtype), dscale_D.astype(scale_D.dtype)


_rms_norm.defvjp(
    lambda eps, x, scale_D: (_rms_norm(eps, x, scale_D), (x, scale_D)), _rms_norm_backward
)


@functools.lru_cache
def inverse_frequencies(rope_dim: int, theta: float, yarn: Yarn | None) -> tuple[float, ...]:
    """Radians per position of each rotary pair, rounded to float32 step by step as published."""
    exponents = np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(theta), exponents)
    if yarn is None:
        return tuple(frequencies.tolist())
    turns = lambda beta: math.log(yarn.original_max_position_embeddings / (beta * 2 * math.pi))
    bound = lambda beta: rope_dim * turns(beta) / (2 * math.log(theta))
    low = max(math.floor(bound(yarn.beta_fast)), 0)
    high = min(math.ceil(bound(yarn.beta_slow)), rope_dim - 1)
    width = np.float32(high - low if high != low else 0.001)
    ramp = np.clip((np.arange(rope_dim // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)
    keep = np.float32(1.0) - ramp
    stretched = frequencies / np.float32(yarn.factor)
    return tuple((stretched * (np.float32(1.0) - keep) + frequencies * keep).tolist())


def rope_table(
    position_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    numerics: Numerics,
    dtype: Any,
    *,
    compressed: bool,
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T Q"]]:
    """Cosine and sine at each position, for sliding layers or for compressed ones (YaRN)."""
    theta, yarn = (cfg.compress_rope_theta, cfg.yarn) if compressed else (cfg.rope_theta, None)
    frequency_Q = jnp.asarray(inverse_frequencies(cfg.qk_rope_head_dim, theta, yarn), jnp.float32)
    angle_BTQ = position_BT[..., None].astype(jnp.float32) * frequency_Q[None, None]
    table_dtype = jnp.float32 if numerics.float32_islands else dtype
    return jnp.cos(angle_BTQ).astype(table_dtype), jnp.sin(angle_BTQ).astype(table_dtype)


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    table: tuple[Float[Array, "B T Q"], Float[Array, "B T Q"]],
    *,
    norm: rotary.Norm | None = None,
    inverse: bool = False,
    heads: str | None = "heads",
) -> Float[Array, "B T H K"]:
    """RoPE on the last 2Q channels, after `norm`; `inverse` undoes it. `heads` is H's axis."""
    cos_BTQ, sin_BTQ = table
    axes = ("batch", None, heads)
    return sharding.per_device(
        functools.partial(rotary.rotate, norm=norm),
        *(x_BTHK, cos_BTQ, -sin_BTQ if inverse else sin_BTQ),
        axes=(axes, sharding.ROWS, sharding.ROWS),
        out=axes,
    )


def round_kv(x: Float[Array, "*rows D"], rope_dim: int) -> Float[Array, "*rows D"]:
    """FP8 rounding of all but the rotary channels, in blocks of 64 (report, section 3.10)."""
    plain, rotated = x[..., :-rope_dim], x[..., -rope_dim:]
    if plain.shape[-1] == 0:
        return x
    return jnp.concatenate([quantize.fake_quant_fp8(plain, block=64), rotated], axis=-1)


def round_index(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Hadamard transform, then FP4 rounding in blocks of 32, for the indexer's queries and keys."""
    return quantize.fake_quant_fp4(quantize.hadamard(x).astype(x.dtype), block=32)
