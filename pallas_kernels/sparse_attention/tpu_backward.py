"""Gradients on TPUs among few entries: all are read, under a mask made of a block's lists.

An entry's word has a bit for each query of the block: whether it lists the entry.

Axis letters: as in `tpu_attention_backward`; k entries listed, C = 128 lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import tpu_attention_backward as backward
from pallas_kernels.tpu_attention_pull import Seen

_LANES = 128
_QUERIES = 16  # whose bits a float32 adds up exactly


def call(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int32[Array, "B T k"],
    sink_H: Float[Array, " H"],
    first_BT: Int[Array, "B T"] | None,
    *,
    window: int,
    scale: float,
) -> backward.Gradients:
    """Gradients of queries, window, pool and sink; k is a multiple of 128."""
    _, queries, heads, _ = q_BTHK.shape
    block = backward.queries_of_a_block(queries, heads, _QUERIES)
    words = pltpu.VMEM((pl.cdiv(pool_LBSK.shape[2], _LANES) * _LANES, _LANES), jnp.int32)
    indices_BNQk = backward.blocks_of(indices_BTk, block, fill=-1)
    return backward.gradients(
        (grad_BTHK, out_BTHK, q_BTHK),
        window_BXK,
        start_B,
        pool_LBSK,
        layer,
        Seen(indices_BNQk, (words,), _note, _listed),
        sink_H,
        first_BT,
        block=block,
        window=window,
        scale=scale,
        name="sparse_attention_prefill_backward",
    )


def _note(indices_ref: Any, scratch: tuple[Any]) -> Int[Array, ""]:
    """Fill the words: a matmul of ones, which say the entry's lane and its tile."""
    (words_ref,), (queries, k) = scratch, indices_ref.shape
    tiles = words_ref.shape[0] // _LANES
    ones = lambda size, at_1k: jax.lax.broadcasted_iota(jnp.int32, (size, k), 0) == at_1k
    words_CN = jnp.zeros((_LANES, tiles), jnp.float32)
    for t in range(queries):
        index_1k = indices_ref[t : t + 1]
        lane_Ck = jnp.where(ones(_LANES, index_1k & (_LANES - 1)), 2.0**t, 0.0)
        # -1 is in tile -1: nowhere.
        tile_Nk = jnp.where(ones(tiles, index_1k >> 7), 1.0, 0.0)
        words_CN += jax.lax.dot_general(
            lane_Ck.astype(jnp.bfloat16),
            tile_Nk.astype(jnp.bfloat16),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    words_CN = words_CN.astype(jnp.int32)
    for n in range(tiles):
        words_ref[n * _LANES : (n + 1) * _LANES] = jnp.broadcast_to(
            words_CN[:, n : n + 1], (_LANES, _LANES)
        )
    return jnp.max(indices_ref[...]) + 1


def _listed(
    indices_ref: Any, scratch: tuple[Any], query_1R: Any, first: Any, count: int
) -> tuple[Any, Any]:
    words_EC, rows = scratch[0][pl.ds(first, count)], query_1R.shape[1]
    words_E1 = words_EC[:, :1]
    words_ER = words_E1 if rows % _LANES else jnp.concatenate([words_EC] * (rows // _LANES), axis=1)
    return words_E1 != 0, (words_ER & (1 << query_1R)) != 0
