"""One softmax over several sets of keys and a sink, inside a kernel.

Axis letters: H heads, X keys, K channels.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.products import contract


def logits(q_HK: Float[Array, "H K"], keys_XK: Float[Array, "X K"], scale: float) -> Any:
    """Scaled logits, float32 [H, X]."""
    return contract(q_HK, keys_XK, 1, 1) * scale


def attend(
    q_HK: Float[Array, "H K"],
    parts: list[tuple[Float[Array, "_ K"], Bool[Array, "1 _"]]],
    sink_H1: Float[Array, "H 1"],
    scale: float,
) -> Float32[Array, "H K"]:
    """Attend to several sets of finite keys, which are also the values, each under its mask."""
    masked = [
        jnp.where(mask_1X, logits(q_HK, keys_XK, scale), -jnp.inf) for keys_XK, mask_1X in parts
    ]
    largest_H1 = sink_H1
    for part_HX in masked:
        largest_H1 = jnp.maximum(largest_H1, jnp.max(part_HX, axis=1, keepdims=True))
    total_H1 = jnp.exp(sink_H1 - largest_H1)
    value_HK = jnp.zeros(q_HK.shape, jnp.float32)
    for part_HX, (keys_XK, _) in zip(masked, parts, strict=True):
        weights_HX = jnp.exp(part_HX - largest_H1)
        total_H1 += jnp.sum(weights_HX, axis=1, keepdims=True)
        value_HK += jnp.dot(
            weights_HX.astype(keys_XK.dtype), keys_XK, preferred_element_type=jnp.float32
        )
    return value_HK / total_H1
