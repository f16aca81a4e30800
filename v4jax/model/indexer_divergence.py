"""The indexer's divergence from the attention that it selects entries for.

The report does not say what trains the indexer. Here, as for V3.2, it is the Kullback-Leibler
divergence of its softmax over entries from the heads' summed attention. The teacher's softmax is
the full one, over window, sink and entries; its part on the entries is then renormalised.

Axis letters: B batch, T queries, C queries of a chunk, I index heads, J index head dim, H heads,
K head dim, S entries, X window keys, Y window keys of a chunk, n chunks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import indexer_topk

_LOGITS = 2**24  # most logits of the teacher that exist at a time


def divergence(
    index: tuple[Float[Array, "B T I J"], Float[Array, "B T I"], Float[Array, "B S J"]],
    attention: tuple[
        Float[Array, "B T H K"], Float[Array, "B X K"], Float[Array, "B S K"], Float[Array, " H"]
    ],
    visible_BT: Int[Array, "B T"],
    hidden_BT: Int[Array, "B T"] | None,
    first_BT: Int[Array, "B T"] | None,
    *,
    scale: float,
) -> Float32[Array, "B T"]:
    """The divergence of each query in nats; 0 if it sees no entry.

    Args:
      index: the indexer's queries, head weights and keys, which get the gradient.
      attention: queries, window keys (a window's length of earlier ones, then the row's), entries
        and sinks, which get none.
      visible_BT: number of entries that exist for each query.
      hidden_BT: number of leading entries that belong to other documents; None: none.
      first_BT: position where the query's document begins; None: where the row does.
      scale: scale of the attention's logits.
    """
    q_BTHK, window_BXK, pool_BSK, sink_H = jax.lax.stop_gradient(attention)
    q_BTIJ, weights_BTI, keys_BSJ = index
    zero_BT = jnp.zeros_like(visible_BT)
    entry_bounds = (visible_BT, zero_BT if hidden_BT is None else hidden_BT)
    first_BT = zero_BT if first_BT is None else first_BT
    batch, length, heads, _ = q_BTHK.shape
    before = window_BXK.shape[1] - length
    entry_11S = jnp.arange(pool_BSK.shape[1])[None, None]
    chunk = _chunk(length, batch * heads * entry_11S.size)

    @jax.checkpoint
    def of_chunk(_: None, part: Any) -> tuple[None, Array]:
        start, query_BCHK, q_BCIJ, weights_BCI, visible_BC, hidden_BC, first_BC = part
        exists_BCS = (entry_11S < visible_BC[..., None]) & (entry_11S >= hidden_BC[..., None])
        near_BYK = jax.lax.dynamic_slice_in_dim(window_BXK, start, chunk + before, axis=1)
        near_BCY = _window_mask(start, chunk, before, first_BC)
        target_BCS = _teacher(query_BCHK * scale, near_BYK, near_BCY, pool_BSK, exists_BCS, sink_H)
        score_BCS = indexer_topk.scores(q_BCIJ, weights_BCI, keys_BSJ)
        return None, _kl(target_BCS, score_BCS, exists_BCS)

    parts = lambda x: jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)
    queries = [parts(x) for x in (q_BTHK, q_BTIJ, weights_BTI, *entry_bounds, first_BT)]
    divergence_nBC = jax.lax.scan(of_chunk, None, (jnp.arange(0, length, chunk), *queries))[1]
    return jnp.moveaxis(divergence_nBC, 0, 1).reshape(batch, length)


def _chunk(length: int, logits: int) -> int:
    """The number of queries per chunk, a divisor of their total number."""
    most = max(_LOGITS // logits, 1)
    return max(size for size in range(1, min(most, length) + 1) if length % size == 0)


def _window_mask(
    start: Int[Array, ""], chunk: int, before: int, first_BC: Int[Array, "B C"]
) -> Bool[Array, "B C Y"]:
    """Which of a chunk's window keys each query sees: `before` of them, the last its own."""
    query_C, key_Y = jnp.arange(chunk)[:, None], jnp.arange(chunk + before)[None]
    age_CY = query_C + before - key_Y
    position_1Y = start + key_Y - before
    return ((age_CY >= 0) & (age_CY < before))[None] & (position_1Y[None] >= first_BC[..., None])


def _teacher(
    query_BCHK: Float[Array, "B C H K"],
    near_BYK: Float[Array, "B Y K"],
    near_BCY: Bool[Array, "B C Y"],
    pool_BSK: Float[Array, "B S K"],
    exists_BCS: Bool[Array, "B C S"],
    sink_H: Float[Array, " H"],
) -> Float32[Array, "B C S"]:
    """The heads' attention to entries, summed and normalised; 0 if a query sees none."""

    def logits(keys: Array, mask: Array) -> Array:
        dots = jnp.einsum("bchk,bsk->bchs", query_BCHK, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask[:, :, None], dots, -jnp.inf)

    far_BCHS, near_BCHY = logits(pool_BSK, exists_BCS), logits(near_BYK, near_BCY)
    sink_BCH1 = jnp.broadcast_to(sink_H[None, None, :, None], (*far_BCHS.shape[:3], 1))
    parts = [jax.nn.logsumexp(x, axis=-1) for x in (far_BCHS, near_BCHY, sink_BCH1)]
    total_BCH = jax.nn.logsumexp(jnp.stack(parts), axis=0)
    mass_BCS = jnp.sum(jnp.exp(far_BCHS - total_BCH[..., None]), axis=2)
    return mass_BCS / jnp.maximum(jnp.sum(mass_BCS, axis=-1, keepdims=True), 1e-30)


def _kl(
    target_BCS: Float32[Array, "B C S"],
    score_BCS: Float32[Array, "B C S"],
    exists_BCS: Bool[Array, "B C S"],
) -> Float32[Array, "B C"]:
    """The divergence of the scores' softmax from the target."""
    lowest = jnp.finfo(jnp.float32).min
    log_BCS = jax.nn.log_softmax(jnp.where(exists_BCS, score_BCS, lowest), axis=-1)
    positive_BCS = exists_BCS & (target_BCS > 0)
    log_ratio_BCS = jnp.log(jnp.where(positive_BCS, target_BCS, 1.0)) - log_BCS
    return jnp.sum(jnp.where(positive_BCS, target_BCS * log_ratio_BCS, 0.0), axis=-1)
