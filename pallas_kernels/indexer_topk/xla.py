"""Top k in XLA, without temporaries of heads x entries, in time proportional to what is visible.

Scores are computed one block of keys at a time into one row per query; then the row's best are
selected.

Axis letters: as in the package; Q queries per block, X keys per block, R = I * Q.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.indexer_topk.keys import Keys, entries
from pallas_kernels.indexer_topk.keys import block as key_block
from pallas_kernels.indexer_topk.reference import (
    add_hidden,
    best,
    comparable,
    exists,
    same_dtype,
    skip_hidden,
)
from pallas_kernels.products import contract

# Keys per block: with few query rows a CPU runs short products in place, 2.5 times as fast as long
# ones, which it splits over threads.
_KEYS, _KEYS_OF_FEW, _FEW_ROWS = 512, 256, 64
# With very many keys, threads pay off again.
_MANY_ENTRIES, _KEYS_OF_MANY = 16384, 2048
# Bytes of scores at a time: with 32 MiB, blank rows cost twice as much if little is visible.
_SCORE_BYTES = 8 * 2**20
# Rows (heads x queries) per block: enough for fast products, whose result stays in the cache.
_ROWS = 1024


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
    batch, queries = visible_BT.shape
    fits = max(1, _SCORE_BYTES // (4 * entries(keys)))
    block = min(queries, max(1, _ROWS // q_BTIJ.shape[2]), fits)
    blocks = -(-queries // block)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * block - queries), *((0, 0),) * (x.ndim - 2)))
    inputs = jax.tree.map(pad, (q_BTIJ, weights_BTI, visible_BT, hidden_BT))

    def select_block(index: Any) -> Any:
        row, start = index // blocks, index % blocks * block
        take = lambda x: jax.lax.dynamic_slice_in_dim(x[row], start, block)
        q_QIJ, weights_QI, visible_Q, hidden_Q = jax.tree.map(take, inputs)
        score_QS = _scores(q_QIJ, weights_QI, (keys, layer, row), visible_Q, hidden_Q)
        return _best_seen(score_QS, visible_Q, hidden_Q, k)

    chosen = jax.lax.map(select_block, jnp.arange(batch * blocks, dtype=jnp.int32))
    return chosen.reshape(batch, blocks * block, k)[:, :queries]


def _best_seen(
    score_QS: Float32[Array, "Q S"],
    visible_Q: Int[Array, " Q"],
    hidden_Q: Int[Array, " Q"] | None,
    k: int,
) -> Int32[Array, "Q k"]:
    """Select from the shortest prefix (1/8, 1/4, 1/2 or all) that has all visible entries."""
    capacity = score_QS.shape[1]
    widths = sorted({-(-capacity // part) for part in (8, 4, 2, 1)})
    number_Q = visible_Q if hidden_Q is None else visible_Q - hidden_Q

    def best_of(width: int, score_QS: Any) -> Any:
        if hidden_Q is None:
            return best(score_QS[:, :width], number_Q, k)
        chosen_Qk = best(skip_hidden(score_QS, hidden_Q, width), number_Q, k)
        return add_hidden(chosen_Qk, hidden_Q)

    branches = [functools.partial(best_of, width) for width in widths]
    too_small = (jnp.max(number_Q) > jnp.array(widths[:-1], jnp.int32)).astype(jnp.int32)
    return jax.lax.switch(jnp.sum(too_small), branches, score_QS)


def _scores(
    q_QIJ: Float[Array, "Q I J"],
    weights_QI: Float[Array, "Q I"],
    source: tuple[Keys, Int[Array, ""], Int[Array, ""]],
    visible_Q: Int[Array, " Q"],
    hidden_Q: Int[Array, " Q"] | None,
) -> Float32[Array, "Q S"]:
    """Comparable scores, -inf for invisible entries; `source` is keys, layer and batch row."""
    queries, heads, dim = q_QIJ.shape
    keys, layer, row = source
    capacity = entries(keys)
    few = _KEYS_OF_MANY if capacity > _MANY_ENTRIES else _KEYS_OF_FEW
    width = min(few if heads * queries <= _FEW_ROWS else _KEYS, capacity)
    # Heads first, so that their products are planes.
    q_RJ = q_QIJ.swapaxes(0, 1).reshape(heads * queries, dim)
    weights_IQ1 = weights_QI.astype(jnp.float32).T[..., None]

    def score(block: Any, score_QS: Any) -> Any:
        start = jnp.minimum(block * width, capacity - width)
        zero = jnp.zeros_like(start)
        keys_XJ = key_block(keys, layer, row, start, width)
        dots_RX = contract(*same_dtype(q_RJ, keys_XJ), 1, 1)
        dots_IQX = jax.nn.relu(dots_RX).reshape(heads, queries, width)
        # Plane by plane: XLA fuses this into one pass; a sum over heads takes half as long again.
        score_QX = dots_IQX[0] * weights_IQ1[0]
        for i in range(1, heads):
            score_QX += dots_IQX[i] * weights_IQ1[i]
        entry_1X = start + jnp.arange(width, dtype=jnp.int32)[None]
        exists_QX = exists(entry_1X, visible_Q, hidden_Q)
        score_QX = jnp.where(exists_QX, comparable(score_QX), -jnp.inf)
        return jax.lax.dynamic_update_slice(score_QS, score_QX, (zero, start))

    blocks = (jnp.max(visible_Q) + width - 1) // width
    first = 0
    if hidden_Q is not None:
        first = jnp.min(jnp.where(hidden_Q < visible_Q, hidden_Q, capacity)) // width
    return jax.lax.fori_loop(first, blocks, score, jnp.full((queries, capacity), -jnp.inf))


def scores(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
) -> Float32[Array, "B T S"]:
    """Head by head, so that only one head's products exist at a time."""
    q_BTIJ, keys_BSJ = same_dtype(q_BTIJ, keys_BSJ)

    def head(score_BTS: Any, of_head: Any) -> Any:
        q_BTJ, weight_BT = of_head
        dots_BTS = _dots(q_BTJ, keys_BSJ)
        return score_BTS + jax.nn.relu(dots_BTS) * weight_BT[..., None], None

    batch, queries = weights_BTI.shape[:2]
    zeros = jnp.zeros((batch, queries, keys_BSJ.shape[1]), jnp.float32)
    heads = jnp.moveaxis(q_BTIJ, 2, 0), jnp.moveaxis(weights_BTI.astype(jnp.float32), 2, 0)
    return jax.lax.scan(head, zeros, heads)[0]


def scores_backward(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
    cotangent_BTS: Float32[Array, "B T S"],
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"], Float[Array, "B S J"]]:
    """Gradients of the inputs; each head's products are recomputed."""
    cast_q_BTIJ, cast_keys_BSJ = same_dtype(q_BTIJ, keys_BSJ)
    dtype = cast_keys_BSJ.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def head(keys_grad_BSJ: Any, of_head: Any) -> Any:
        q_BTJ, weight_BT = of_head
        dots_BTS = _dots(q_BTJ, cast_keys_BSJ)
        weight_grad_BT = jnp.sum(jax.nn.relu(dots_BTS) * cotangent_BTS, axis=-1)
        dots_grad_BTS = jnp.where(dots_BTS > 0, cotangent_BTS * weight_BT[..., None], 0.0)
        dots_grad_BTS = dots_grad_BTS.astype(dtype)
        keys_grad_BSJ += product("bts,btj->bsj", dots_grad_BTS, q_BTJ)
        q_grad_BTJ = product("bts,bsj->btj", dots_grad_BTS, cast_keys_BSJ)
        return keys_grad_BSJ, (q_grad_BTJ.astype(q_BTIJ.dtype), weight_grad_BT)

    heads = jnp.moveaxis(cast_q_BTIJ, 2, 0), jnp.moveaxis(weights_BTI.astype(jnp.float32), 2, 0)
    zeros = jnp.zeros(keys_BSJ.shape, jnp.float32)
    keys_grad_BSJ, (q_grad_IBTJ, weights_grad_IBT) = jax.lax.scan(head, zeros, heads)
    return (
        jnp.moveaxis(q_grad_IBTJ, 0, 2),
        jnp.moveaxis(weights_grad_IBT, 0, 2).astype(weights_BTI.dtype),
        keys_grad_BSJ.astype(keys_BSJ.dtype),
    )


def _dots(q_BTJ: Float[Array, "B T J"], keys_BSJ: Float[Array, "B S J"]) -> Float32[Array, "B T S"]:
    return jnp.einsum("btj,bsj->bts", q_BTJ, keys_BSJ, preferred_element_type=jnp.float32)
