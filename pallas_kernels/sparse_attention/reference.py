"""The same as dense attention under a mask made of the list: the specification. See the package."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention import reference as dense
from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool


def decode(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    masks = [window_mask_BTR, _listed(indices_BTk, pool_LBSK.shape[2])]
    return dense.attend(
        q_BTHK, [window_BRK, _layer_of(pool_LBSK, layer, window_BRK.dtype)], masks, sink_H, scale
    )


def prefill(
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    first_BT: Int[Array, "B T"] | None = None,
    *,
    window: int,
    scale: float,
) -> Float[Array, "B T H K"]:
    near_BTX = dense.band(start_B, q_BTHK.shape[1], window, first_BT)
    masks = [near_BTX, _listed(indices_BTk, pool_LBSK.shape[2])]
    keys = [window_BXK, _layer_of(pool_LBSK, layer, window_BXK.dtype)]
    return dense.attend(q_BTHK, keys, masks, sink_H, scale)


def decode_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> tuple[Any, Any, Any, Any]:
    """Gradients of queries, window, pool and sink; None of rows of bytes."""
    run = lambda q, window, pool, sink: decode(
        q, window, window_mask_BTR, pool, layer, indices_BTk, sink, scale=scale
    )
    return _pull(run, grad_BTHK, q_BTHK, window_BRK, pool_LBSK, sink_H)


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    first_BT: Int[Array, "B T"] | None = None,
    *,
    window: int,
    scale: float,
) -> tuple[Any, Any, Any, Any]:
    """Gradients of queries, window, pool and sink; None of rows of bytes."""
    run = lambda q, keys, pool, sink: prefill(
        q, keys, start_B, pool, layer, indices_BTk, sink, first_BT, window=window, scale=scale
    )
    return _pull(run, grad_BTHK, q_BTHK, window_BXK, pool_LBSK, sink_H)


def _pull(run: Any, grad: Any, q: Any, window: Any, pool: Pool, sink: Any) -> Any:
    if isinstance(pool, Fp8Rows):
        bytes_fixed = lambda q, window, sink: run(q, window, pool, sink)
        q, window, sink = jax.vjp(bytes_fixed, q, window, sink)[1](grad)
        return q, window, None, sink
    return jax.vjp(run, q, window, pool, sink)[1](grad)


def _layer_of(pool: Pool, layer: Int[Array, ""], dtype: Any) -> Float[Array, "B S K"]:
    return rows.decode(pool.data[layer], dtype) if isinstance(pool, Fp8Rows) else pool[layer]


def _listed(indices_BTk: Int[Array, "B T k"], entries: int) -> Bool[Array, "B T S"]:
    return jnp.any(indices_BTk[..., None] == jnp.arange(entries)[None, None, None], axis=2)
