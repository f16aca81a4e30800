"""A running softmax over blocks of keys, inside a kernel.

Its state is three refs: the largest logit so far [R, W], the same in all lanes; the sum of weights
[R, W], to be summed over lanes; and the sum of weighted values [R, K].

Axis letters: as in `tpu`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract

_LOWEST = -1e30


def begin(sink_ref: Any, largest_ref: Any, total_ref: Any, value_ref: Any) -> None:
    """Start from the sink alone, with weight 1; a sink of -inf would make masked logits NaN."""
    rows, heads = largest_ref.shape[0], sink_ref.shape[0]
    largest_ref[...] = jnp.maximum(jnp.tile(sink_ref[...], (rows // heads, 1)), _LOWEST)
    lane_RW = jax.lax.broadcasted_iota(jnp.int32, total_ref.shape, 1)
    total_ref[...] = jnp.where(lane_RW == 0, 1.0, 0.0)
    value_ref[...] = jnp.zeros_like(value_ref)


def logits(
    q_RK: Float[Array, "R K"], keys_XK: Float[Array, "X K"], scale: float
) -> Float32[Array, "R X"]:
    return scale * contract(q_RK, keys_XK, 1, 1)


def add(
    logits_RX: Float32[Array, "R X"],
    keys_XK: Float[Array, "X K"],
    largest_ref: Any,
    total_ref: Any,
    value_ref: Any,
) -> None:
    before_RW = largest_ref[...]
    largest_RW = jnp.maximum(before_RW, jnp.max(logits_RX, axis=1, keepdims=True))
    shrink_RW = jnp.exp(before_RW - largest_RW)
    weights_RX = jnp.exp(logits_RX - _lanes(largest_RW, logits_RX.shape[1]))
    largest_ref[...] = largest_RW
    total_ref[...] = total_ref[...] * shrink_RW + _partial_sums(weights_RX)
    value_RK = jnp.matmul(
        weights_RX.astype(keys_XK.dtype), keys_XK, preferred_element_type=jnp.float32
    )
    value_ref[...] = value_ref[...] * _lanes(shrink_RW, value_ref.shape[1]) + value_RK


def _lanes(x_RW: Float32[Array, "R W"], width: int) -> Float32[Array, "R _"]:
    """A row's value in `width` lanes, or in one lane, which broadcasts."""
    if width % LANES:
        return x_RW[:, :1]
    return jnp.concatenate([x_RW] * (width // LANES), axis=1)


def _partial_sums(x_RX: Float32[Array, "R X"]) -> Float32[Array, "R W"]:
    """128 lanes with the same sum as x: entire registers are added, no lane moves."""
    rows, width = x_RX.shape
    if width % LANES:
        lane_RW = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        return jnp.where(lane_RW == 0, jnp.sum(x_RX, axis=1, keepdims=True), 0.0)
    parts = [x_RX[:, at : at + LANES] for at in range(0, width, LANES)]
    return functools.reduce(jnp.add, parts)
