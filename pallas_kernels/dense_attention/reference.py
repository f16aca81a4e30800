"""Reference attention: all logits of window and entries at once.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention_gradients import Gradients, of_reference
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.paged import Paged


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    return _attend(inputs, inputs.window_BRK, inputs.window_mask_BTR, None, scale)


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    near_BTX = band(inputs.start_B, inputs.q_BTHK.shape[1], window, inputs.first_BT)
    return _attend(inputs, inputs.window_BXK, near_BTX, inputs.hidden_BT, scale)


def decode_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: DecodeInputs,
    *,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink."""
    return of_reference(functools.partial(decode, scale=scale), grad_BTHK, inputs)


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: PrefillInputs,
    *,
    window: int,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink."""
    run = functools.partial(prefill, window=window, scale=scale)
    return of_reference(run, grad_BTHK, inputs)


def _attend(
    inputs: Any, window: Any, near: Any, hidden_BT: Any, scale: float
) -> Float[Array, "B T H K"]:
    """Attend to the window under its mask, and to the entries from `hidden` to `visible`."""
    keys, masks = [window], [near]
    if inputs.pool_LBSK is not None:
        pool, layer = inputs.pool_LBSK, inputs.layer
        keys.append(pool.of_layer(layer) if isinstance(pool, Paged) else pool[layer])
        index_11S = jnp.arange(pool.shape[2])[None, None]
        masks.append(index_11S < inputs.visible_BT[..., None])
        if hidden_BT is not None:
            masks[-1] &= index_11S >= hidden_BT[..., None]
    return attend(inputs.q_BTHK, keys, masks, inputs.sink_H, scale)


def band(
    start_B: Int[Array, " B"], queries: int, window: int, first_BT: Int[Array, "B T"] | None = None
) -> Bool[Array, "B T X"]:
    """Which keys of a chunk's window each query sees.

    Key e is at position start - window + e. Query j sees the keys j < e <= j + window whose
    position is neither negative nor below the query's `first`.
    """
    e_X, j_T = jnp.arange(window + queries), jnp.arange(queries)
    near_TX = (e_X[None] > j_T[:, None]) & (e_X[None] <= j_T[:, None] + window)
    position_BX = start_B[:, None] - window + e_X[None]
    exists_BX = position_BX >= 0
    mask_BTX = near_TX[None] & exists_BX[:, None]
    if first_BT is None:
        return mask_BTX
    return mask_BTX & (position_BX[:, None] >= first_BT[..., None])


def attend(
    q_BTHK: Float[Array, "B T H K"],
    keys: list[Float[Array, "B _ K"]],
    masks: list[Bool[Array, "B T _"]],
    sink_H: Float[Array, " H"],
    scale: float,
) -> Float[Array, "B T H K"]:
    """One softmax over several sets of keys and a sink."""
    keys = [_zero_unseen(part, mask) for part, mask in zip(keys, masks, strict=True)]
    logits = [
        jnp.where(
            mask[:, :, None],
            jnp.einsum("bthk,bxk->bthx", q_BTHK, part, preferred_element_type=jnp.float32) * scale,
            -jnp.inf,
        )
        for part, mask in zip(keys, masks, strict=True)
    ]
    shape = (*q_BTHK.shape[:3], 1)
    sink_BTH1 = jnp.broadcast_to(sink_H.astype(jnp.float32)[None, None, :, None], shape)
    largest_BTH1 = jnp.max(jnp.concatenate([*logits, sink_BTH1], axis=-1), axis=-1, keepdims=True)
    # The result does not depend on the maximum.
    largest_BTH1 = jax.lax.stop_gradient(largest_BTH1)
    total_BTH1 = jnp.exp(sink_BTH1 - largest_BTH1)
    value_BTHK = jnp.zeros(q_BTHK.shape, jnp.float32)
    for part, logits_BTHX in zip(keys, logits, strict=True):
        weights = jnp.exp(logits_BTHX - largest_BTH1)
        total_BTH1 += jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(part.dtype)
        value_BTHK += jnp.einsum(
            "bthx,bxk->bthk", weights, part, preferred_element_type=jnp.float32
        )
    return (value_BTHK / total_BTH1).astype(q_BTHK.dtype)


def _zero_unseen(keys: Float[Array, "B X K"], mask: Bool[Array, "B T X"]) -> Float[Array, "B X K"]:
    """Keep garbage that no query sees out of products: 0 * NaN is NaN."""
    return jnp.where(jnp.any(mask, axis=1)[..., None], keys, jnp.zeros((), keys.dtype))
