"""The choice without temporaries of heads x entries; time follows what is visible.

Scores are made block by block of keys into one row per query, the best of which are taken.

Axis letters: as in the package; Q queries of a block, X keys of a block, R = I * Q.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.indexer_topk.reference import best, comparable

# Keys of a block: with so few query rows a CPU runs short products in place, 2.5 times as fast as
# long ones, which it splits over threads.
_KEYS, _KEYS_OF_FEW, _FEW_ROWS = 512, 256, 64
# Among very many keys two threads pay off again.
_MANY_ENTRIES, _KEYS_OF_MANY = 16384, 2048
# Bytes of scores at a time: with 32 MiB, blank rows cost twice as much where little is visible.
_SCORE_BYTES = 8 * 2**20
# Rows (heads x queries) of a block: enough for fast products, whose result stays in the cache.
_ROWS = 1024


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
) -> Int32[Array, "B T k"]:
    batch, queries = visible_BT.shape
    fits = max(1, _SCORE_BYTES // (4 * keys_LBSJ.shape[2]))
    block = min(queries, max(1, _ROWS // q_BTIJ.shape[2]), fits)
    blocks = -(-queries // block)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * block - queries), *((0, 0),) * (x.ndim - 2)))
    inputs = pad(q_BTIJ), pad(weights_BTI), pad(visible_BT)

    def one(index: Any) -> Any:
        row, start = index // blocks, index % blocks * block
        take = lambda x: jax.lax.dynamic_slice_in_dim(x[row], start, block)
        q_QIJ, weights_QI, visible_Q = map(take, inputs)
        score_QS = _scores(q_QIJ, weights_QI, keys_LBSJ, layer, row, visible_Q)
        return _best_visible(score_QS, visible_Q, k)

    chosen = jax.lax.map(one, jnp.arange(batch * blocks, dtype=jnp.int32))
    return chosen.reshape(batch, blocks * block, k)[:, :queries]


def _best_visible(
    score_QS: Float32[Array, "Q S"], visible_Q: Int[Array, " Q"], k: int
) -> Int32[Array, "Q k"]:
    """The best of the least eighth, quarter or half of the entries that holds all visible ones."""
    entries = score_QS.shape[1]
    widths = sorted({-(-entries // part) for part in (8, 4, 2, 1)})
    branches = [
        lambda score_QS, width=width: best(score_QS[:, :width], visible_Q, k) for width in widths
    ]
    too_small = (jnp.max(visible_Q) > jnp.array(widths[:-1], jnp.int32)).astype(jnp.int32)
    return jax.lax.switch(jnp.sum(too_small), branches, score_QS)


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
    few = _KEYS_OF_MANY if entries > _MANY_ENTRIES else _KEYS_OF_FEW
    width = min(few if heads * queries <= _FEW_ROWS else _KEYS, entries)
    # Heads first, so that their products are planes.
    q_RJ = q_QIJ.swapaxes(0, 1).reshape(heads * queries, dim)
    weights_IQ1 = weights_QI.astype(jnp.float32).T[..., None]

    def score(block: Any, score_QS: Any) -> Any:
        start = jnp.minimum(block * width, entries - width)
        zero = jnp.zeros_like(start)
        at = (layer, row, start, zero)
        keys_XJ = jax.lax.dynamic_slice(keys_LBSJ, at, (1, 1, width, dim))[0, 0]
        dots_RX = jax.lax.dot_general(
            q_RJ, keys_XJ, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        dots_IQX = jax.nn.relu(dots_RX).reshape(heads, queries, width)
        # Plane by plane: XLA makes one pass of it, where a sum over heads takes half as long again.
        score_QX = dots_IQX[0] * weights_IQ1[0]
        for i in range(1, heads):
            score_QX += dots_IQX[i] * weights_IQ1[i]
        exists_QX = start + jnp.arange(width, dtype=jnp.int32)[None] < visible_Q[:, None]
        score_QX = jnp.where(exists_QX, comparable(score_QX), -jnp.inf)
        return jax.lax.dynamic_update_slice(score_QS, score_QX, (zero, start))

    blocks = (jnp.max(visible_Q) + width - 1) // width
    return jax.lax.fori_loop(0, blocks, score, jnp.full((queries, entries), -jnp.inf))
