"""Pallas kernels for TPUs. See the package.

Axis letters: as in the package.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementations import Unsupported
from pallas_kernels.sparse_attention import tpu_backward, tpu_decode, tpu_prefill, xla
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool
from pallas_kernels.sparse_attention.tpu_gather import LANES, packing
from pallas_kernels.tpu_attention_backward import Gradients

_QUERIES = 8

decode_backward = xla.decode_backward


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
    _require(q_BTHK, window_BRK, pool_LBSK)
    if q_BTHK.shape[1] > _QUERIES:
        raise Unsupported(
            f"sparse_attention.decode for TPUs takes up to {_QUERIES} queries a row, not "
            f"{q_BTHK.shape[1]}; prefill takes more."
        )
    return tpu_decode.call(
        q_BTHK,
        window_BRK,
        _fill(window_mask_BTR.astype(jnp.int32), 0),
        pool_LBSK.data if isinstance(pool_LBSK, Fp8Rows) else pool_LBSK,
        layer.astype(jnp.int32),
        _fill(indices_BTk.astype(jnp.int32), -1),
        sink_H.astype(jnp.float32)[:, None],
        scale=scale,
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
    _require(q_BTHK, window_BXK, pool_LBSK)
    if isinstance(pool_LBSK, Fp8Rows):
        raise Unsupported("sparse_attention.prefill for TPUs does not take Fp8Rows; decode does.")
    return tpu_prefill.call(
        q_BTHK,
        window_BXK,
        start_B.astype(jnp.int32),
        pool_LBSK,
        layer.astype(jnp.int32),
        _fill(indices_BTk.astype(jnp.int32), -1),
        sink_H.astype(jnp.float32)[:, None],
        first_BT,
        window=window,
        scale=scale,
    )


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
) -> Gradients:
    """Gradients of queries, window, pool and sink."""
    _require(q_BTHK, window_BXK, pool_LBSK)
    if isinstance(pool_LBSK, Fp8Rows):
        raise Unsupported("the gradient of sparse_attention.prefill on TPUs takes no Fp8Rows.")
    return tpu_backward.call(
        grad_BTHK,
        out_BTHK,
        q_BTHK,
        window_BXK,
        start_B,
        pool_LBSK,
        layer,
        _fill(indices_BTk.astype(jnp.int32), -1),
        sink_H,
        first_BT,
        window=window,
        scale=scale,
    )


def _fill(x: Int[Array, "B T X"], value: int) -> Int[Array, "B T N"]:
    """Up to whole lanes."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)), constant_values=value)


def _require(q_BTHK: Any, window: Any, pool: Pool) -> None:
    """Refuse what the kernels do not take."""
    dtype, (heads, dim) = q_BTHK.dtype, q_BTHK.shape[2:]
    if dtype not in (jnp.bfloat16, jnp.float32) or window.dtype != dtype:
        raise Unsupported(
            "sparse_attention for TPUs takes queries and window both in bfloat16 or both in "
            f"float32, not {dtype} and {window.dtype}."
        )
    if heads % 16 or dim % LANES:
        raise Unsupported(
            "sparse_attention for TPUs takes heads in multiples of 16 and head dims of "
            f"{LANES}, not {heads} of {dim}."
        )
    data = pool.data if isinstance(pool, Fp8Rows) else pool
    if data.dtype not in (dtype, jnp.uint8):
        raise Unsupported(
            f"sparse_attention for TPUs takes a pool in the queries' dtype or Fp8Rows, not "
            f"{data.dtype}."
        )
    if data.shape[2] % (tile := 8 * packing(data.dtype)):
        raise Unsupported(
            f"sparse_attention for TPUs takes a pool with room for a multiple of {tile} "
            f"entries of {data.dtype}, not {data.shape[2]}."
        )
