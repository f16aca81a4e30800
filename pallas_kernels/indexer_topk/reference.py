"""The choice in plain maths: all scores, then a sort. See the package for the contract."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32


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
    score_BTS = scores(q_BTIJ, weights_BTI, keys_LBSJ[layer])
    entries = score_BTS.shape[-1]
    exists_BTS = jnp.arange(entries)[None, None] < visible_BT[..., None]
    order_BTS = jnp.where(exists_BTS, ordered(score_BTS), jnp.iinfo(jnp.int32).min)
    best_BTk = jax.lax.top_k(order_BTS, min(k, entries))[1].astype(jnp.int32)
    best_BTk = jnp.pad(
        best_BTk, ((0, 0), (0, 0), (0, k - best_BTk.shape[-1])), constant_values=entries
    )
    return ascending(jnp.where(best_BTk < visible_BT[..., None], best_BTk, entries), entries)


def mask(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
) -> Bool[Array, "B T S"]:
    chosen_BTk = select(q_BTIJ, weights_BTI, keys_LBSJ, layer, visible_BT, k=k)
    entry_S = jnp.arange(keys_LBSJ.shape[2])
    return jnp.any(chosen_BTk[..., None] == entry_S[None, None, None], axis=2)


def ordered(score: Float32[Array, "*rows S"]) -> Int32[Array, "*rows S"]:
    """Integers in the scores' order: equal for both zeros, largest for NaN, never the smallest."""
    score = jnp.where(jnp.isnan(score), jnp.nan, jnp.where(score == 0, 0.0, score))
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def ascending(chosen: Int32[Array, "*rows k"], entries: int) -> Int32[Array, "*rows k"]:
    """Sorted, with `entries` (no entry) turned to -1."""
    chosen = jnp.sort(chosen, axis=-1)
    return jnp.where(chosen < entries, chosen, -1)
