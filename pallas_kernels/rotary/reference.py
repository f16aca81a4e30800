"""Reference norm and rotary embedding.

Axis letters: as in the package.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Norm:
    """A root-mean-square norm without a weight.

    Attributes:
      eps: added to the mean square.
      float32: whether to square and average in float32; otherwise in the heads' dtype, like
        DeepSeek's runtime.
    """

    eps: float
    float32: bool


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    cos_BTQ: Float[Array, "B T Q"],
    sin_BTQ: Float[Array, "B T Q"],
    *,
    norm: Norm | None,
) -> Float[Array, "B T H K"]:
    """See `rotary.rotate`."""
    if norm is not None:
        x_BTHK = _normed(x_BTHK, norm)
    cos, sin = (part[:, :, None].astype(jnp.float32) for part in (cos_BTQ, sin_BTQ))
    unrotated = x_BTHK.shape[-1] - 2 * cos.shape[-1]
    rotated = x_BTHK[..., unrotated:].astype(jnp.float32)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    rotated = pairs.reshape(rotated.shape).astype(x_BTHK.dtype)
    return jnp.concatenate([x_BTHK[..., :unrotated], rotated], axis=-1)


def _normed(x_BTHK: Float[Array, "B T H K"], norm: Norm) -> Float[Array, "B T H K"]:
    squares = jnp.square(x_BTHK.astype(jnp.float32) if norm.float32 else x_BTHK)
    mean_BTH1 = jnp.mean(squares, axis=-1, keepdims=True)
    inverse_BTH1 = jax.lax.rsqrt(mean_BTH1 + jnp.asarray(norm.eps, mean_BTH1.dtype))
    return x_BTHK * inverse_BTH1.astype(x_BTHK.dtype)
