"""Pallas kernels for TPUs. See the package.

Axis letters: as in the package.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.byte_rows import FP8
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import tpu_backward, tpu_decode, tpu_prefill, xla
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool
from pallas_kernels.sparse_attention.tpu_gather import array_of, packing

_QUERIES = 8

decode_backward = xla.decode_backward


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    _require(inputs.q_BTHK, inputs.window_BRK, inputs.pool_LBSK)
    if (queries := inputs.q_BTHK.shape[1]) > _QUERIES:
        raise Unsupported(
            f"sparse_attention.decode on TPUs takes up to {_QUERIES} queries per row, not "
            f"{queries}; prefill takes more."
        )
    return tpu_decode.call(inputs, scale=scale)


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    _require(inputs.q_BTHK, inputs.window_BXK, inputs.pool_LBSK)
    return tpu_prefill.call(inputs, window=window, scale=scale)


def prefill_backward(grad: Any, out: Any, inputs: PrefillInputs, **static: Any) -> Gradients:
    """Gradients of queries, window, pool and sink."""
    _require(inputs.q_BTHK, inputs.window_BXK, inputs.pool_LBSK)
    if isinstance(inputs.pool_LBSK, Fp8Rows):
        raise Unsupported("The gradient of sparse_attention.prefill on TPUs takes no Fp8Rows.")
    return tpu_backward.call(grad, out, inputs, **static)


def _require(q_BTHK: Any, window: Any, pool: Pool) -> None:
    """Reject what the kernels do not support."""
    dtype, (heads, dim) = q_BTHK.dtype, q_BTHK.shape[2:]
    if dtype not in (jnp.bfloat16, jnp.float32) or window.dtype != dtype:
        raise Unsupported(
            "sparse_attention on TPUs takes queries and window both in bfloat16 or both in "
            f"float32, not {dtype} and {window.dtype}."
        )
    if heads % 16 or dim % LANES:
        raise Unsupported(
            "sparse_attention on TPUs takes heads in multiples of 16 and head dims in multiples "
            f"of {LANES}, not {heads} heads of dim {dim}."
        )
    if isinstance(pool, Paged) and pool.codec not in (None, FP8):
        raise Unsupported(f"sparse_attention on TPUs takes pages in {FP8}, not in {pool.codec}.")
    data = array_of(pool)
    if data.dtype not in (dtype, jnp.uint8):
        raise Unsupported(
            "sparse_attention on TPUs takes a pool in the queries' dtype or Fp8Rows, not "
            f"{data.dtype}."
        )
    size, tile = data.shape[2], 8 * packing(data.dtype)
    if isinstance(pool, Paged) and (size < tile or size & (size - 1)):
        raise Unsupported(
            f"sparse_attention on TPUs takes pages of 2^n entries of {data.dtype}, {tile} or more, "
            f"not {size}."
        )
    if size % tile:
        raise Unsupported(
            f"sparse_attention on TPUs takes a pool whose capacity is a multiple of {tile} "
            f"entries of {data.dtype}, not {size}."
        )
