"""The choice without temporaries of heads x entries; time follows what is visible.

Scores are made block by block of keys into one row per query. Membership comes from the k-th
largest score, found by bisection over its 32 bits: on CPU twice as fast as sorting.

Axis letters: as in the package; Q queries of a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.indexer_topk.reference import best, comparable

_KEYS = 1024
# Bytes of scores at a time.
_SCORE_BYTES = 32 * 2**20
_MOST_QUERIES = 128
_LEAST = jnp.iinfo(jnp.int32).min


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
) -> Int32[Array, "B T k"]:
    choose = lambda score_QS, visible_Q: best(score_QS, visible_Q, k)
    return _by_block(q_BTIJ, weights_BTI, keys_LBSJ, layer, visible_BT, choose)


def mask(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
) -> Bool[Array, "B T S"]:
    entry_S = jnp.arange(keys_LBSJ.shape[2])
    if keys_LBSJ.shape[2] <= k:
        return entry_S[None, None] < visible_BT[..., None]

    def choose(score_QS: Any, visible_Q: Any) -> Any:
        return members(_ordered(score_QS), k) & (entry_S[None] < visible_Q[:, None])

    return _by_block(q_BTIJ, weights_BTI, keys_LBSJ, layer, visible_BT, choose)


def _by_block(
    q_BTIJ: Any,
    weights_BTI: Any,
    keys_LBSJ: Any,
    layer: Any,
    visible_BT: Any,
    choose: Callable[[Any, Any], Any],
) -> Any:
    """`choose` for blocks of queries of one row each, whose ordered scores fit in _SCORE_BYTES."""
    batch, queries = visible_BT.shape
    fits = max(1, _SCORE_BYTES // (4 * keys_LBSJ.shape[2]))
    block = min(queries, _MOST_QUERIES, fits)
    blocks = -(-queries // block)

    def one(index: Any) -> Any:
        b, start = index // blocks, index % blocks * block
        take = lambda x: jax.lax.dynamic_slice_in_dim(x[b], start, block)
        score_QS = _scores(take(q_BTIJ), take(weights_BTI), keys_LBSJ, layer, b, take(visible_BT))
        return choose(score_QS, take(visible_BT))

    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * block - queries), *((0, 0),) * (x.ndim - 2)))
    q_BTIJ, weights_BTI, visible_BT = pad(q_BTIJ), pad(weights_BTI), pad(visible_BT)
    chosen = jax.lax.map(one, jnp.arange(batch * blocks, dtype=jnp.int32))
    return chosen.reshape(batch, blocks * block, -1)[:, :queries]


def _scores(
    q_QIJ: Float[Array, "Q I J"],
    weights_QI: Float[Array, "Q I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    row: Int[Array, ""],
    visible_Q: Int[Array, " Q"],
) -> Float32[Array, "Q S"]:
    """Comparable scores, -inf where nothing is visible."""
    queries, heads, dim = q_QIJ.shape
    entries = keys_LBSJ.shape[2]
    width = min(_KEYS, entries)
    # Heads first, so that their sum adds whole planes.
    q_RJ = q_QIJ.swapaxes(0, 1).reshape(heads * queries, dim)
    weights_IQ1 = weights_QI.astype(jnp.float32).T[..., None]

    def score(block: Any, score_QS: Any) -> Any:
        start = jnp.minimum(block * width, entries - width)
        zero = jnp.zeros_like(start)
        keys_XJ = jax.lax.dynamic_slice(keys_LBSJ, (layer, row, start, zero), (1, 1, width, dim))[
            0, 0
        ]
        dots_RX = jax.lax.dot_general(
            q_RJ, keys_XJ, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        dots_IQX = jax.nn.relu(dots_RX).reshape(heads, queries, width)
        score_QX = jnp.sum(dots_IQX * weights_IQ1, axis=0)
        exists_QX = start + jnp.arange(width, dtype=jnp.int32)[None] < visible_Q[:, None]
        score_QX = jnp.where(exists_QX, comparable(score_QX), -jnp.inf)
        return jax.lax.dynamic_update_slice(score_QS, score_QX, (zero, start))

    blocks = (jnp.max(visible_Q) + width - 1) // width
    return jax.lax.fori_loop(0, blocks, score, jnp.full((queries, entries), -jnp.inf))


def _ordered(score_QS: Float32[Array, "Q S"]) -> Int32[Array, "Q S"]:
    """Integers in the scores' order, NaN largest; the smallest integer for -inf."""
    bits = jax.lax.bitcast_convert_type(score_QS, jnp.int32)
    order_QS = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jnp.where(score_QS == -jnp.inf, _LEAST, order_QS)


def members(order_QS: Int32[Array, "Q S"], k: int) -> Bool[Array, "Q S"]:
    """The k largest of each row, of equal ones the first. Needs k < S."""

    def undecided(state: Any) -> Any:
        bit, _, count_Q = state
        return (bit >= 0) & jnp.any(count_Q != k)

    def narrow(state: Any) -> Any:
        bit, cut_Q, count_Q = state
        # Adding 2^31 to the smallest integer wraps to 0, which is the middle.
        candidate_Q = cut_Q + jnp.left_shift(jnp.int32(1), bit)
        above_Q = jnp.sum((order_QS >= candidate_Q[:, None]).astype(jnp.int32), axis=1)
        enough_Q = above_Q >= k
        return (
            bit - 1,
            jnp.where(enough_Q, candidate_Q, cut_Q),
            jnp.where(enough_Q, above_Q, count_Q),
        )

    queries, entries = order_QS.shape
    # Rows with no more than k entries are decided: they keep all.
    few_Q = jnp.sum((order_QS > _LEAST).astype(jnp.int32), axis=1) <= k
    start = (jnp.int32(31), jnp.full(queries, _LEAST), jnp.where(few_Q, k, entries))
    _, cut_Q, count_Q = jax.lax.while_loop(undecided, narrow, start)

    def first_of_equals(kept_QS: Any) -> Any:
        larger_QS = order_QS > cut_Q[:, None]
        equal_QS = kept_QS & ~larger_QS
        wanted_Q1 = k - jnp.sum(larger_QS.astype(jnp.int32), axis=1, keepdims=True)
        return larger_QS | (
            equal_QS & (jnp.cumsum(equal_QS.astype(jnp.int32), axis=1) <= wanted_Q1)
        )

    kept_QS = order_QS >= cut_Q[:, None]
    return jax.lax.cond(jnp.any(count_Q > k), first_of_equals, lambda kept_QS: kept_QS, kept_QS)
