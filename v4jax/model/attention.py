"""Sliding, compressed sparse (CSA) and heavily compressed (HCA) attention (report, section 2.3).

One key/value head serves all query heads, and keys are values. A query sees the window of tokens
that ends with itself and compressed entries: all complete ones (HCA) or the indexer's top k (CSA).

Axis letters: L layers of a stack, B batch, T tokens, D hidden, H heads, K head dim, R q_lora rank,
G output groups, O rank per group, I index heads, J index head dim, S pool entries, X window keys.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import dense_attention, indexer_topk, rotary, sparse_attention
from pallas_kernels.residuals import kept
from v4jax.model import cache, compress, indexer_divergence, layers, sharding
from v4jax.model.cache import LayerCache
from v4jax.model.compress import Compressor
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.context import Context
from v4jax.model.params import Declare

# How the arguments of the attention ops are split over devices.
_QUERIES = ("batch", None, "heads", None)
_POOL = (None, "batch")


class Indexer(nnx.Module):
    """The lightning indexer: scores entries for each query (report, eqs. 13-17)."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, weight: Declare) -> None:
        width = cfg.index_n_heads * cfg.index_head_dim
        self.q_b_PR = weight((width, cfg.q_lora_rank), ("index_heads", "q_lora"), "fp8")
        self.weights_ID = weight((cfg.index_n_heads, cfg.hidden_size), ("index_heads", "embed"))
        self.compressor = Compressor(cfg, kind, cfg.index_head_dim, weight)


class Attention(nnx.Module):
    """Weights of one attention layer; `compressor` and `indexer` where its kind has them."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, weight: Declare) -> None:
        width = cfg.num_attention_heads * cfg.head_dim
        ranks = cfg.o_groups * cfg.o_lora_rank
        self.q_a_RD = weight((cfg.q_lora_rank, cfg.hidden_size), ("q_lora", "embed"), "fp8")
        self.q_norm_R = weight((cfg.q_lora_rank,), (None,), constant=1.0)
        self.q_b_PR = weight((width, cfg.q_lora_rank), ("heads", "q_lora"), "fp8")
        self.kv_KD = weight((cfg.head_dim, cfg.hidden_size), (None, "embed"), "fp8")
        self.kv_norm_K = weight((cfg.head_dim,), (None,), constant=1.0)
        self.sink_H = weight((cfg.num_attention_heads,), ("heads",), "f32", constant=0.0)
        self.o_a_QP = weight((ranks, width // cfg.o_groups), ("heads", None), "fp8")
        self.o_b_DQ = weight((cfg.hidden_size, ranks), ("embed", "heads"), "fp8")
        if kind.attention != "sliding":
            self.compressor = Compressor(cfg, kind, cfg.head_dim, weight)
        if kind.attention == "csa":
            self.indexer = Indexer(cfg, kind, weight)


def attend(
    p: Attention,
    x_BTD: Float[Array, "B T D"],
    state: LayerCache,
    layer: Int[Array, ""],
    kind: LayerKind,
    context: Context,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, Float32[Array, "B T"] | None]]:
    """One attention layer over a chunk.

    Returns:
      Its output; the cache with the chunk in it, and the indexer's divergence where it is watched.
    """
    cfg, numerics, table = context.cfg, context.numerics, context.rope(kind)
    latent_BTR = layers.rms_norm(layers.linear(x_BTD, p.q_a_RD), p.q_norm_R, cfg.rms_norm_eps)
    q_BTHK = _heads(layers.linear(latent_BTR, p.q_b_PR), cfg.num_attention_heads)
    norm = rotary.Norm(cfg.rms_norm_eps, float32=not numerics.float32_islands)
    q_BTHK = layers.rotate(q_BTHK, table, norm=norm)
    kv_BTK = layers.rms_norm(layers.linear(x_BTD, p.kv_KD), p.kv_norm_K, cfg.rms_norm_eps)
    kv_BTK = layers.rotate(kv_BTK[:, :, None], table, heads=None)[:, :, 0]
    if numerics.rounded_cache:
        kv_BTK = layers.round_kv(kv_BTK, cfg.qk_rope_head_dim)

    state = _compress(p, x_BTD, state, layer, kind, context)
    window = _window(kv_BTK, state, layer, context)
    ring_LBRK = cache.ring_write(state.window_LBRK, layer, kv_BTK, context.start_B, context.count_B)
    state = dataclasses.replace(state, window_LBRK=ring_LBRK)
    of_chunk = state, layer, kind, context
    watched = None
    if window is None:
        mixed_BTHK = _decode(p, x_BTD, latent_BTR, q_BTHK, *of_chunk)
    else:
        mixed_BTHK = _prefill(p, x_BTD, latent_BTR, q_BTHK, window, *of_chunk)
        watched = _watched(p, x_BTD, latent_BTR, q_BTHK, window, *of_chunk)
    output_BTD = _output(p, layers.rotate(mixed_BTHK, table, inverse=True), cfg)
    return output_BTD, (state, watched)


def _heads(x_BTP: Float[Array, "B T P"], heads: int) -> Float[Array, "B T H K"]:
    return x_BTP.reshape(*x_BTP.shape[:2], heads, -1)


def _output(
    p: Attention, mixed_BTHK: Float[Array, "B T H K"], cfg: ModelConfig
) -> Float[Array, "B T D"]:
    """Each group of heads to its own low rank, all ranks to the hidden size."""
    grouped_BTGP = mixed_BTHK.reshape(*mixed_BTHK.shape[:2], cfg.o_groups, -1)
    ranks_BTQ = layers.grouped_linear(grouped_BTGP, p.o_a_QP)
    return layers.linear(ranks_BTQ, p.o_b_DQ)


def _compress(
    p: Attention,
    x_BTD: Float[Array, "B T D"],
    state: LayerCache,
    layer: Int[Array, ""],
    kind: LayerKind,
    context: Context,
) -> LayerCache:
    """Bring the compressed pools of the layer, if it has any, up to the end of the chunk."""
    if kind.attention == "sliding":
        return state
    tail_LBRK, pool_LBSK = compress.update(
        p.compressor, state.tail_LBRK, state.pool_LBSK, layer, x_BTD, kind, context, "fp8"
    )
    state = dataclasses.replace(state, tail_LBRK=tail_LBRK, pool_LBSK=pool_LBSK)
    if kind.attention == "hca":
        return state
    index_tail_LBRK, index_LBSK = compress.update(
        p.indexer.compressor,
        state.index_tail_LBRK,
        state.index_LBSK,
        layer,
        # What trains the indexer trains nothing else.
        jax.lax.stop_gradient(x_BTD),
        kind,
        context,
        "fp4",
    )
    return dataclasses.replace(state, index_tail_LBRK=index_tail_LBRK, index_LBSK=index_LBSK)


def _window(
    kv_BTK: Float[Array, "B T K"], state: LayerCache, layer: Int[Array, ""], context: Context
) -> Float[Array, "B X K"] | None:
    """Keys of positions start - window .. start + T - 1; None for chunks that the ring can hold."""
    if kv_BTK.shape[1] <= cache.SPARE:
        return None
    before_W = jnp.arange(-context.cfg.sliding_window, 0, dtype=jnp.int32)
    position_BW = context.start_B[:, None] + before_W[None]
    earlier_BWK = cache.ring_read(state.window_LBRK, layer, position_BW)
    return jnp.concatenate([earlier_BWK, kv_BTK.astype(earlier_BWK.dtype)], axis=1)


def _query(
    p: Indexer, x_BTD: Float[Array, "B T D"], latent_BTR: Float[Array, "B T R"], context: Context
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"]]:
    """The indexer's queries, and its weight for each head with all scales in it."""
    cfg = context.cfg
    q_BTIJ = _heads(layers.linear(latent_BTR, p.q_b_PR), cfg.index_n_heads)
    q_BTIJ = layers.rotate(q_BTIJ, context.rope_compressed, heads="index_heads")
    if context.numerics.rounded_cache:
        q_BTIJ = layers.round_index(q_BTIJ)
    scale = cfg.index_head_dim**-0.5 * cfg.index_n_heads**-0.5
    return q_BTIJ, layers.linear(x_BTD, p.weights_ID).astype(jnp.float32) * scale


def _visible(kind: LayerKind, context: Context) -> Int[Array, "B T"]:
    """Complete entries at each query's position, its own window's included; none for padding."""
    if kind.attention == "sliding":
        return jnp.zeros_like(context.position_BT)
    return jnp.where(context.real_BT, (context.position_BT + 1) // kind.ratio, 0)


def _hidden(kind: LayerKind, context: Context) -> Int[Array, "B T"] | None:
    """Entries at the front that are other documents'."""
    if context.first_BT is None or kind.attention == "sliding":
        return None
    return context.first_BT // kind.ratio


def _chooses(kind: LayerKind, state: LayerCache, cfg: ModelConfig) -> bool:
    """Whether there is room for more entries than CSA takes: else it takes all there are."""
    return kind.attention == "csa" and state.pool_LBSK.shape[2] > cfg.index_topk


def _choose(
    p: Indexer,
    x_BTD: Float[Array, "B T D"],
    latent_BTR: Float[Array, "B T R"],
    state: LayerCache,
    layer: Int[Array, ""],
    kind: LayerKind,
    context: Context,
) -> Int[Array, "B T k"]:
    """The entries that CSA attends to. Every device scores with all index heads."""
    q_BTIJ, weights_BTI = _query(p, x_BTD, latent_BTR, context)
    rows = ("batch",)
    select = lambda *args: indexer_topk.select(
        *args[:-1], hidden_BT=args[-1], k=context.cfg.index_topk
    )
    indices_BTk = sharding.per_device(
        select,
        *(q_BTIJ, weights_BTI, state.index_LBSK, layer, _visible(kind, context)),
        _hidden(kind, context),
        axes=(rows, rows, _POOL, (), rows, rows),
        out=rows,
    )
    return kept(indices_BTk)


def _watched(
    p: Attention,
    x_BTD: Float[Array, "B T D"],
    latent_BTR: Float[Array, "B T R"],
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    state: LayerCache,
    layer: Int[Array, ""],
    kind: LayerKind,
    context: Context,
) -> Float32[Array, "B T"] | None:
    """How far the indexer is from the attention that it serves; None where nobody asks."""
    if not context.watch_indexer or kind.attention != "csa":
        return None
    inputs = jax.lax.stop_gradient((x_BTD, latent_BTR))
    index_keys_BSJ = cache.layer_of(state.index_LBSK, layer)
    pool_BSK = cache.layer_of(state.pool_LBSK, layer)
    return indexer_divergence.divergence(
        (*_query(p.indexer, *inputs, context), index_keys_BSJ),
        (q_BTHK, window_BXK, pool_BSK, layers.value(p.sink_H)),
        _visible(kind, context),
        _hidden(kind, context),
        context.first_BT,
        scale=context.cfg.head_dim**-0.5,
    )


def _decode(
    p: Attention,
    x_BTD: Float[Array, "B T D"],
    latent_BTR: Float[Array, "B T R"],
    q_BTHK: Float[Array, "B T H K"],
    state: LayerCache,
    layer: Int[Array, ""],
    kind: LayerKind,
    context: Context,
) -> Float[Array, "B T H K"]:
    """Attention of a few tokens, all of whose window is in the ring."""
    cfg, sink_H = context.cfg, layers.value(p.sink_H)
    ring_LBRK = state.window_LBRK
    ring_BRK = cache.layer_of(ring_LBRK, layer)
    mask_BTR = cache.ring_mask(
        context.end_B, ring_LBRK.shape[2], context.position_BT, cfg.sliding_window
    )
    scale = cfg.head_dim**-0.5
    if _chooses(kind, state, cfg):
        indices_BTk = _choose(p.indexer, x_BTD, latent_BTR, state, layer, kind, context)
        run, seen = sparse_attention.decode, indices_BTk
    else:
        run, seen = dense_attention.decode, _visible(kind, context)
    return sharding.per_device(
        functools.partial(run, scale=scale),
        *(q_BTHK, ring_BRK, mask_BTR, state.pool_LBSK, layer, seen, sink_H),
        axes=(_QUERIES, ("batch",), ("batch",), _POOL, (), ("batch",), ("heads",)),
        out=_QUERIES,
    )


def _prefill(
    p: Attention,
    x_BTD: Float[Array, "B T D"],
    latent_BTR: Float[Array, "B T R"],
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    state: LayerCache,
    layer: Int[Array, ""],
    kind: LayerKind,
    context: Context,
) -> Float[Array, "B T H K"]:
    """Attention of a long chunk."""
    cfg, sink_H = context.cfg, layers.value(p.sink_H)
    settings: dict[str, Any] = {"window": cfg.sliding_window, "scale": cfg.head_dim**-0.5}
    rows = ("batch",)
    first_BT, hidden_BT = context.first_BT, None
    if _chooses(kind, state, cfg):
        indices_BTk = _choose(p.indexer, x_BTD, latent_BTR, state, layer, kind, context)
        run, seen = sparse_attention.prefill, indices_BTk
    else:
        run, seen = dense_attention.prefill, _visible(kind, context)
        hidden_BT = _hidden(kind, context)

    def attend(q, keys, start, pool, layer, seen, sink, first, hidden):
        documents = {"first_BT": first, "hidden_BT": hidden}
        given = {name: x for name, x in documents.items() if x is not None}
        return run(q, keys, start, pool, layer, seen, sink, **settings, **given)

    return sharding.per_device(
        attend,
        *(q_BTHK, window_BXK, context.start_B, state.pool_LBSK, layer, seen, sink_H),
        *(first_BT, hidden_BT),
        axes=(_QUERIES, rows, rows, _POOL, (), rows, ("heads",), rows, rows),
        out=_QUERIES,
    )
