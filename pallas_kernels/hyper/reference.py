"""Hyper-connections in plain maths, with custom gradients for what is linear in the streams.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import sums


def mixes(
    x_BTM: Float[Array, "B T M"], fn_QM: Float[Array, "Q M"], eps: float
) -> Float32[Array, "B T Q"]:
    """The mixing logits: a projection of the streams' root-mean-square norm, in float32."""
    x32_BTM = x_BTM.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTM), axis=-1, keepdims=True) + eps)
    highest = jax.lax.Precision.HIGHEST
    fn32_QM = fn_QM.astype(jnp.float32)
    return jnp.einsum("btm,qm->btq", x32_BTM, fn32_QM, precision=highest) * inverse_BT1


def sinkhorn(
    logits_BTNN: Float32[Array, "B T N N"], *, steps: int, eps: float
) -> Float32[Array, "B T N N"]:
    """Alternately normalise rows and columns.

    Args:
      logits_BTNN: an N x N matrix of any range per token.
      steps: row/column passes; the checkpoint's `hc_sinkhorn_iters`.
      eps: added to the softmax and to every divisor.

    Returns:
      Non-negative matrices whose columns (summed over the first N) sum to 1 within eps, and whose
      rows nearly do.
    """
    # Tokens last: 4 x 4 matrices in the last dims would leave vector lanes empty.
    m_NNBT = jax.nn.softmax(jnp.moveaxis(logits_BTNN, (2, 3), (0, 1)), axis=1) + eps
    balance = lambda _, m: _normalised(_normalised(m, 1, eps), 0, eps)
    m_NNBT = jax.lax.fori_loop(0, steps - 1, balance, _normalised(m_NNBT, 0, eps))
    return jnp.moveaxis(m_NNBT, (0, 1), (2, 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalised(
    m_NNBT: Float32[Array, "N N B T"], axis: int, eps: float
) -> Float32[Array, "N N B T"]:
    """Divided by the sums along an axis."""
    return m_NNBT / (_added(m_NNBT, axis) + eps)


def _normalised_forward(m_NNBT: Array, axis: int, eps: float) -> tuple[Array, tuple[Array, Array]]:
    divisor = _added(m_NNBT, axis) + eps
    new_NNBT = m_NNBT / divisor
    return new_NNBT, (new_NNBT, 1 / divisor)


def _normalised_backward(
    axis: int, eps: float, saved: tuple[Array, Array], grad_NNBT: Array
) -> tuple[Array]:
    new_NNBT, inverse = saved
    return ((grad_NNBT - _added(grad_NNBT * new_NNBT, axis)) * inverse,)


_normalised.defvjp(_normalised_forward, _normalised_backward)


def _added(m_NNBT: Float32[Array, "N N B T"], axis: int) -> Array:
    """Sums along an axis, keeping it; slice by slice, as XLA is slow at sums of four."""
    parts = [jax.lax.index_in_dim(m_NNBT, i, axis) for i in range(m_NNBT.shape[axis])]
    return functools.reduce(jnp.add, parts)


def pre(
    x_BTM: Float[Array, "B T M"],
    fn_QM: Float[Array, "Q M"],
    base_Q: Float32[Array, " Q"],
    scale_3: Float32[Array, " 3"],
    *,
    streams: int,
    steps: int,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T N"], Float32[Array, "B T N N"]]:
    """Pass the mixing logits through sigmoids and the Sinkhorn iteration."""
    mix_BTQ = mixes(x_BTM, fn_QM, norm_eps)
    part = lambda start, stop, i: (
        mix_BTQ[..., start:stop] * scale_3[i] + base_Q[None, None, start:stop]
    )
    pre_BTN = jax.nn.sigmoid(part(0, streams, 0)) + eps
    post_BTN = 2 * jax.nn.sigmoid(part(streams, 2 * streams, 1))
    logits_BTQ = part(2 * streams, None, 2)
    logits_BTNN = logits_BTQ.reshape(*logits_BTQ.shape[:2], streams, streams)
    comb_BTNN = sinkhorn(logits_BTNN, steps=steps, eps=eps)
    return collapse(x_BTM, pre_BTN), post_BTN, comb_BTNN


@jax.custom_vjp
def post(
    output_BTD: Float[Array, "B T D"],
    x_BTM: Float[Array, "B T M"],
    post_BTN: Float[Array, "B T N"],
    comb_BTNN: Float[Array, "B T N N"],
) -> Float[Array, "B T M"]:
    """Stream by stream; the streams stay side by side."""
    wide = post_BTN.dtype
    output_BTD = output_BTD.astype(wide)
    olds_BTD = jnp.split(x_BTM.astype(wide), post_BTN.shape[-1], axis=-1)
    news_BTD = []
    for k in range(len(olds_BTD)):
        new_BTD = post_BTN[..., k, None] * output_BTD
        for j, old_BTD in enumerate(olds_BTD):
            new_BTD = new_BTD + comb_BTNN[..., j, k, None] * old_BTD
        news_BTD.append(new_BTD)
    return jnp.concatenate(news_BTD, axis=-1).astype(x_BTM.dtype)


def _post_backward(
    saved: tuple[Array, Array, Array, Array], grad_BTM: Float[Array, "B T M"]
) -> tuple[Array, Array, Array, Array]:
    output_BTD, x_BTM, post_BTN, comb_BTNN = saved
    wide, N = post_BTN.dtype, post_BTN.shape[-1]
    every_BTJN = jnp.concatenate([comb_BTNN, post_BTN[:, :, None]], axis=2)
    dx_BTM, doutput_BTD = jnp.split(_mixed(every_BTJN, grad_BTM), [x_BTM.shape[-1]], axis=-1)
    grad_BTND = _streams(grad_BTM, N, wide)
    dpost_BTN = sums.table(grad_BTND, output_BTD.astype(wide)[:, :, None])[..., 0]
    dcomb_BTNN = sums.table(_streams(x_BTM, N, wide), grad_BTND)
    return doutput_BTD.astype(output_BTD.dtype), dx_BTM.astype(x_BTM.dtype), dpost_BTN, dcomb_BTNN


post.defvjp(lambda *args: (post(*args), args), _post_backward)


@jax.custom_vjp
def collapse(
    x_BTM: Float[Array, "B T M"], weight_BTN: Float32[Array, "B T N"]
) -> Float[Array, "B T D"]:
    """The weighted sum of the streams, in float32, returned in x's dtype."""
    parts = jnp.split(x_BTM.astype(jnp.float32), weight_BTN.shape[-1], axis=-1)
    return _weighted(weight_BTN, parts).astype(x_BTM.dtype)


def _collapse_backward(
    saved: tuple[Array, Array], grad_BTD: Float[Array, "B T D"]
) -> tuple[Array, Array]:
    x_BTM, weight_BTN = saved
    N, grad32_BTD = weight_BTN.shape[-1], grad_BTD.astype(jnp.float32)
    dx_BTM = _outer(weight_BTN, grad32_BTD)
    x32_BTND = _streams(x_BTM, N, jnp.float32)
    dweight_BTN = sums.table(x32_BTND, grad32_BTD[:, :, None])[..., 0]
    return dx_BTM.astype(x_BTM.dtype), dweight_BTN


collapse.defvjp(lambda *args: (collapse(*args), args), _collapse_backward)


def _streams(x_BTM: Float[Array, "B T M"], N: int, dtype: Any) -> Float[Array, "B T N D"]:
    return x_BTM.astype(dtype).reshape(*x_BTM.shape[:2], N, -1)


def _weighted(weight_BTN: Float[Array, "B T N"], parts: list[Array]) -> Float[Array, "B T D"]:
    """The sum of N arrays [B, T, D], each times its weight."""
    return functools.reduce(
        jnp.add, [weight_BTN[..., n, None] * part_BTD for n, part_BTD in enumerate(parts)]
    )


def _mixed(weight_BTJN: Float[Array, "B T J N"], x_BTM: Float[Array, "B T M"]) -> Array:
    """J weighted sums of the streams, side by side, in the weights' dtype.

    On CPU a matmul: XLA would recompute an elementwise sum for each of its readers.
    """
    wide, (J, N) = weight_BTJN.dtype, weight_BTJN.shape[2:]

    def products(weight_BTJN: Array, x_BTM: Array) -> Array:
        x_BTND, highest = _streams(x_BTM, N, wide), jax.lax.Precision.HIGHEST
        new_BTJD = jnp.einsum("btjn,btnd->btjd", weight_BTJN, x_BTND, precision=highest)
        return new_BTJD.reshape(*x_BTM.shape[:2], -1)

    def added(weight_BTJN: Array, x_BTM: Array) -> Array:
        parts = jnp.split(x_BTM.astype(wide), N, axis=-1)
        return jnp.concatenate([_weighted(weight_BTJN[:, :, j], parts) for j in range(J)], axis=-1)

    return jax.lax.platform_dependent(weight_BTJN, x_BTM, cpu=products, default=added)


def _outer(weight_BTN: Float[Array, "B T N"], x_BTD: Float[Array, "B T D"]) -> Array:
    """Copies of x side by side, each times its weight, written so that each platform fuses it."""

    def rows(weight_BTN: Array, x_BTD: Array) -> Array:
        return (weight_BTN[..., None] * x_BTD[:, :, None]).reshape(*x_BTD.shape[:2], -1)

    def columns(weight_BTN: Array, x_BTD: Array) -> Array:
        weights = range(weight_BTN.shape[-1])
        return jnp.concatenate([weight_BTN[..., n, None] * x_BTD for n in weights], axis=-1)

    return jax.lax.platform_dependent(weight_BTN, x_BTD, cpu=rows, default=columns)


def head(
    x_BTM: Float[Array, "B T M"],
    fn_NM: Float[Array, "N M"],
    base_N: Float32[Array, " N"],
    scale_1: Float32[Array, " 1"],
    *,
    eps: float,
    norm_eps: float,
) -> Float[Array, "B T D"]:
    """Collapse the streams to one, before the final norm."""
    mix_BTN = mixes(x_BTM, fn_NM, norm_eps)
    return collapse(x_BTM, jax.nn.sigmoid(mix_BTN * scale_1[0] + base_N[None, None]) + eps)
