"""Gradients on TPUs for small pools: all entries are read, masked by the block's lists.

Each entry has a word with one bit per query of the block: whether that query lists the entry.

Axis letters: as in `tpu_attention_backward`; k entries listed, C = 128 lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tpu_attention_backward as backward
from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract
from pallas_kernels.sparse_attention.inputs import PrefillInputs
from pallas_kernels.sparse_attention.tpu_gather import in_lanes
from pallas_kernels.tpu_attention_pull import Visibility

_QUERIES = 16  # a float32 sums this many bits exactly


def call(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: PrefillInputs,
    *,
    window: int,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink."""
    _, queries, heads, _ = inputs.q_BTHK.shape
    block = backward.queries_per_block(queries, heads, _QUERIES)
    tiles = pl.cdiv(inputs.pool_LBSK.shape[2], LANES)
    words = pltpu.VMEM((tiles * LANES, LANES), jnp.int32)
    indices_BNQk = backward.blocks_of(in_lanes(inputs.indices_BTk, -1), block, fill=-1)
    return backward.gradients(
        grad_BTHK,
        out_BTHK,
        inputs,
        Visibility(indices_BNQk, (words,), _write_words, _listed),
        block=block,
        window=window,
        scale=scale,
        name="sparse_attention_prefill_backward",
    )


def _write_words(indices_ref: Any, scratch: tuple[Any]) -> Int[Array, ""]:
    """Fill the words by a matmul of one-hot matrices: of each listed entry's lane and its tile.

    Returns 1 + the last entry listed.
    """
    (words_ref,), (queries, k) = scratch, indices_ref.shape
    tiles = words_ref.shape[0] // LANES
    one_hot = lambda size, at_1k: jax.lax.broadcasted_iota(jnp.int32, (size, k), 0) == at_1k
    words_CN = jnp.zeros((LANES, tiles), jnp.float32)
    for t in range(queries):
        index_1k = indices_ref[t : t + 1]
        lane_Ck = jnp.where(one_hot(LANES, index_1k & (LANES - 1)), 2.0**t, 0.0)
        # -1 is in tile -1, which does not exist.
        tile_Nk = jnp.where(one_hot(tiles, index_1k >> 7), 1.0, 0.0)
        words_CN += contract(lane_Ck.astype(jnp.bfloat16), tile_Nk.astype(jnp.bfloat16), 1, 1)
    words_CN = words_CN.astype(jnp.int32)
    for n in range(tiles):
        words_ref[n * LANES : (n + 1) * LANES] = jnp.broadcast_to(
            words_CN[:, n : n + 1], (LANES, LANES)
        )
    return jnp.max(indices_ref[...]) + 1


def _listed(
    indices_ref: Any, scratch: tuple[Any], query_1R: Any, first: Any, count: int
) -> tuple[Any, Any]:
    words_EC, rows = scratch[0][pl.ds(first, count)], query_1R.shape[1]
    words_E1 = words_EC[:, :1]
    words_ER = words_E1 if rows % LANES else jnp.concatenate([words_EC] * (rows // LANES), axis=1)
    return words_E1 != 0, (words_ER & (1 << query_1R)) != 0
