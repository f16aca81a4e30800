"""The same as dense attention under a mask made of the list: the specification. See the package."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention import reference as dense


def decode(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    masks = [window_mask_BTR, _listed(indices_BTk, pool_LBSK.shape[2])]
    return dense.attend(q_BTHK, [window_BRK, pool_LBSK[layer]], masks, sink_H, scale)


def prefill(
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    window: int,
    scale: float,
) -> Float[Array, "B T H K"]:
    near_BTX = dense.band(start_B, q_BTHK.shape[1], window)
    masks = [near_BTX, _listed(indices_BTk, pool_LBSK.shape[2])]
    return dense.attend(q_BTHK, [window_BXK, pool_LBSK[layer]], masks, sink_H, scale)


def _listed(indices_BTk: Int[Array, "B T k"], entries: int) -> Bool[Array, "B T S"]:
    return jnp.any(indices_BTk[..., None] == jnp.arange(entries)[None, None, None], axis=2)
