"""The specification: dense attention under a mask built from the lists.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention_gradients import Gradients, of_reference
from pallas_kernels.dense_attention import reference as dense
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    return _attend(inputs, inputs.window_BRK, inputs.window_mask_BTR, scale)


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    near_BTX = dense.band(inputs.start_B, inputs.q_BTHK.shape[1], window, inputs.first_BT)
    return _attend(inputs, inputs.window_BXK, near_BTX, scale)


def decode_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: DecodeInputs,
    *,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool (None for Fp8Rows) and sink."""
    return of_reference(functools.partial(decode, scale=scale), grad_BTHK, inputs)


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: PrefillInputs,
    *,
    window: int,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool (None for Fp8Rows) and sink."""
    run = functools.partial(prefill, window=window, scale=scale)
    return of_reference(run, grad_BTHK, inputs)


def _attend(inputs: Any, keys: Any, near: Any, scale: float) -> Float[Array, "B T H K"]:
    """Attend to the window under its mask, and to all entries under a mask built from the lists."""
    masks = [near, _listed(inputs.indices_BTk, inputs.pool_LBSK.shape[2])]
    entries_BSK = _layer_of(inputs.pool_LBSK, inputs.layer, keys.dtype)
    return dense.attend(inputs.q_BTHK, [keys, entries_BSK], masks, inputs.sink_H, scale)


def _layer_of(pool: Pool, layer: Int[Array, ""], dtype: Any) -> Float[Array, "B S K"]:
    match pool:
        case Fp8Rows():
            return rows.decode(pool.data[layer], dtype)
        case Paged():
            return pool.of_layer(layer)
        case _:
            return pool[layer]


def _listed(indices_BTk: Int[Array, "B T k"], entries: int) -> Bool[Array, "B T S"]:
    return jnp.any(indices_BTk[..., None] == jnp.arange(entries)[None, None, None], axis=2)
