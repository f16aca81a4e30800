"""Gradients on TPUs, where rows see the entries below one bound, or between two.

The kernel, and the axis letters, are in `tpu_attention_backward`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tpu_attention_backward as backward
from pallas_kernels.attention_gradients import Gradients
from pallas_kernels.dense_attention.inputs import PrefillInputs
from pallas_kernels.tpu_attention_pull import Visibility, any_row_sees

_QUERIES = 128


def prefill_backward(
    grad_BTHK: Float[Array, "B T H K"],
    out_BTHK: Float[Array, "B T H K"],
    inputs: PrefillInputs,
    *,
    window: int,
    scale: float,
) -> Gradients:
    """Gradients of queries, window, pool and sink."""
    queries, heads = inputs.q_BTHK.shape[1:3]
    visible_BT, hidden_BT = inputs.visible_BT, inputs.hidden_BT
    block = backward.queries_per_block(queries, heads, _QUERIES)
    visibility = None
    if inputs.pool_LBSK is not None:
        in_rows = lambda x_BT: jnp.repeat(
            backward.blocks_of(x_BT.astype(jnp.int32), block, fill=0), heads, axis=2
        )
        if hidden_BT is None:
            visibility = Visibility(in_rows(visible_BT)[:, :, None], (), _end, _below)
        else:
            both_BN2R = jnp.stack([in_rows(visible_BT), in_rows(hidden_BT)], axis=2)
            visibility = Visibility(both_BN2R, (), _end_of_both, _between, _first_of_both)
    return backward.gradients(
        grad_BTHK,
        out_BTHK,
        inputs,
        visibility,
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


def _end_of_both(both_ref: Any, scratch: Any) -> Int[Array, ""]:
    return jnp.max(both_ref[:1])


def _first_of_both(both_ref: Any) -> Int[Array, ""]:
    visible_1R, hidden_1R = both_ref[:1], both_ref[1:]
    return jnp.min(jnp.where(hidden_1R < visible_1R, hidden_1R, jnp.max(visible_1R)))


def _between(both_ref: Any, scratch: Any, query_1R: Any, first: Any, count: int) -> Any:
    index_E1 = first + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    mask_ER = (index_E1 < both_ref[:1]) & (index_E1 >= both_ref[1:])
    return any_row_sees(mask_ER), mask_ER
