"""Gradients on TPU: rows see entries below a count. See `tpu_attention_backward`.

Axis letters: as there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tpu_attention_backward as backward
from pallas_kernels.tpu_attention_pull import Seen

_QUERIES = 128


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Float[Array, "L B S K"] | None,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    sink_H: Float[Array, " H"],
    *,
    window: int,
    scale: float,
) -> backward.Gradients:
    """Gradients of queries, window, pool and sink."""
    queries, heads = q_BTHK.shape[1:3]
    block = backward.queries_of_a_block(queries, heads, _QUERIES)
    seen = None
    if pool_LBSK is not None:
        visible_BNQ = backward.blocks_of(visible_BT.astype(jnp.int32), block, fill=0)
        visible_BN1R = jnp.repeat(visible_BNQ, heads, axis=2)[:, :, None]
        seen = Seen(visible_BN1R, (), _end, _below)
    return backward.gradients(
        (grad_BTHK, out_BTHK, q_BTHK),
        window_BXK,
        start_B,
        pool_LBSK,
        layer,
        seen,
        sink_H,
        block=block,
        window=window,
        scale=scale,
        name="dense_attention_prefill_backward",
    )


def _end(visible_ref: Any, scratch: Any) -> Int[Array, ""]:
    return jnp.max(visible_ref[...])


def _below(visible_ref: Any, scratch: Any, query_1R: Any, first: Any, count: int) -> Any:
    index_E1 = first + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    return index_E1 < jnp.max(visible_ref[...]), index_E1 < visible_ref[...]
