"""The choice in plain maths: all scores, then a sort. See the package for the contract."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32


def scores(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
) -> Float32[Array, "B T S"]:
    """All scores; differentiable, for the indexer's own loss."""
    dots_BTIS = jnp.einsum("btij,bsj->btis", q_BTIJ, keys_BSJ, preferred_element_type=jnp.float32)
    weights_BTI = weights_BTI.astype(jnp.float32)
    return jnp.einsum("btis,bti->bts", jax.nn.relu(dots_BTIS), weights_BTI)


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
) -> Int32[Array, "B T k"]:
    entries = keys_LBSJ.shape[2]
    score_BTS = comparable(scores(q_BTIJ, weights_BTI, keys_LBSJ[layer]))
    exists_BTS = jnp.arange(entries)[None, None] < visible_BT[..., None]
    score_BTS = jnp.where(exists_BTS, score_BTS, -jnp.inf)
    return best(score_BTS, visible_BT, k)


def comparable(score: Float32[Array, "*rows S"]) -> Float32[Array, "*rows S"]:
    """Scores without a negative zero or a NaN that sorts below numbers."""
    return jnp.where(jnp.isnan(score), jnp.nan, jnp.where(score == 0, 0.0, score))


def best(
    score: Float32[Array, "*rows S"], visible: Int[Array, "*rows"], k: int
) -> Int32[Array, "*rows k"]:
    """The k largest, of equal ones the first, ascending; then -1 for each that is missing.

    On CPU the ascending order is free, while `top_k` of integers would take many times as long.
    """
    entries = score.shape[-1]
    chosen = jax.lax.top_k(score, min(k, entries))[1].astype(jnp.int32)
    chosen = jnp.sort(jnp.where(chosen < visible[..., None], chosen, entries), axis=-1)
    chosen = jnp.where(chosen < entries, chosen, -1)
    missing = [(0, 0)] * (score.ndim - 1) + [(0, k - chosen.shape[-1])]
    return jnp.pad(chosen, missing, constant_values=-1)
