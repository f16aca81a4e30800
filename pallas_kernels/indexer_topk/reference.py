"""Reference top k: all scores, then a sort.

Axis letters: as in the package.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.indexer_topk.keys import Keys, dense, entries


def scores(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
) -> Float32[Array, "B T S"]:
    """All scores; differentiable, for the indexer's own loss."""
    q_BTIJ, keys_BSJ = same_dtype(q_BTIJ, keys_BSJ)
    dots_BTIS = jnp.einsum("btij,bsj->btis", q_BTIJ, keys_BSJ, preferred_element_type=jnp.float32)
    weights_BTI = weights_BTI.astype(jnp.float32)
    return jnp.einsum("btis,bti->bts", jax.nn.relu(dots_BTIS), weights_BTI)


def scores_backward(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
    cotangent_BTS: Float32[Array, "B T S"],
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"], Float[Array, "B S J"]]:
    """Gradients of the inputs."""
    return jax.vjp(scores, q_BTIJ, weights_BTI, keys_BSJ)[1](cotangent_BTS)


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys: Keys,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    hidden_BT: Int[Array, "B T"] | None = None,
    *,
    k: int,
) -> Int32[Array, "B T k"]:
    capacity = entries(keys)
    score_BTS = comparable(scores(q_BTIJ, weights_BTI, dense(keys, layer)))
    exists_BTS = exists(jnp.arange(capacity)[None, None], visible_BT, hidden_BT)
    score_BTS = jnp.where(exists_BTS, score_BTS, -jnp.inf)
    if hidden_BT is None:
        return best(score_BTS, visible_BT, k)
    shifted_BTS = skip_hidden(score_BTS, hidden_BT, capacity)
    return add_hidden(best(shifted_BTS, visible_BT - hidden_BT, k), hidden_BT)


def exists(
    entry: Int[Array, "*ones S"], visible: Int[Array, "*rows"], hidden: Int[Array, "*rows"] | None
) -> Bool[Array, "*rows S"]:
    """Whether a query sees an entry."""
    below = entry < visible[..., None]
    return below if hidden is None else below & (entry >= hidden[..., None])


def skip_hidden(
    score: Float32[Array, "*rows S"], hidden: Int[Array, "*rows"], width: int
) -> Float32[Array, "*rows width"]:
    """Rotate scores so that the first visible entry comes first.

    Otherwise a visible score of -inf would tie with hidden entries of lower index, and lose.
    """
    at = jax.lax.broadcasted_iota(jnp.int32, (*hidden.shape, width), hidden.ndim)
    return jnp.take_along_axis(score, (at + hidden[..., None]) % score.shape[-1], axis=-1)


def add_hidden(chosen: Int32[Array, "*rows k"], hidden: Int[Array, "*rows"]) -> Any:
    """Undo `skip_hidden` in the chosen indices; -1 stays."""
    return jnp.where(chosen < 0, -1, chosen + hidden[..., None])


def same_dtype(q: Float[Array, "*a J"], keys: Float[Array, "*b J"]) -> tuple[Any, Any]:
    """Cast both to float32, unless they share a dtype of 16 bits or more."""
    if q.dtype == keys.dtype and q.dtype.itemsize > 1:
        return q, keys
    return q.astype(jnp.float32), keys.astype(jnp.float32)


def comparable(score: Float32[Array, "*rows S"]) -> Float32[Array, "*rows S"]:
    """Scores without negative zeros and negative NaNs, which would sort wrongly."""
    return jnp.where(jnp.isnan(score), jnp.nan, jnp.where(score == 0, 0.0, score))


def ordered(score: Float32[Array, "*dims"]) -> Int32[Array, "*dims"]:
    """Integers that sort like the scores; both zeros are equal, NaN is the largest."""
    largest = 2**31 - 1
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.int32)
    key = jnp.where(bits < 0, bits ^ largest, bits)
    return jnp.where(score != score, largest, key)


def best(
    score: Float32[Array, "*rows S"], visible: Int[Array, "*rows"], k: int
) -> Int32[Array, "*rows k"]:
    """Indices of the k largest, ascending, padded with -1; ties go to the lowest index.

    On CPUs the ascending order is free, but `top_k` of integers would be many times slower.
    """
    size = score.shape[-1]
    chosen = jax.lax.top_k(score, min(k, size))[1].astype(jnp.int32)
    chosen = jnp.sort(jnp.where(chosen < visible[..., None], chosen, size), axis=-1)
    chosen = jnp.where(chosen < size, chosen, -1)
    missing = [(0, 0)] * (score.ndim - 1) + [(0, k - chosen.shape[-1])]
    return jnp.pad(chosen, missing, constant_values=-1)
