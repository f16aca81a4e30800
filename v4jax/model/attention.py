"""Sliding, compressed sparse (CSA) and heavily compressed (HCA) attention (report, section 2.3).

One key/value head serves all query heads, and keys are values. A query sees the window of tokens
that ends with itself, and compressed entries: all complete ones (HCA) or the indexer's top k (CSA).

Axis letters: L layers of a stack, B batch, T tokens, D hidden, H heads, K head dim, R q_lora rank,
G output groups, O rank per group, I index heads, J index head dim, S pool entries, X window keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import dense_attention, indexer_topk, rotary, sparse_attention
from pallas_kernels.paged import Paged
from pallas_kernels.residuals import saveable
from v4jax.model import cache, compress, indexer_divergence, layers, paging, sharding
from v4jax.model.cache import LayerCache
from v4jax.model.compress import Compressor
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.context import Context
from v4jax.model.params import Declare
from v4jax.model.sharding import ROWS, STACKED_ROWS
from v4jax.model.storage import InStack

_QUERIES = ("batch", None, "heads", None)  # logical axes


class Indexer(nnx.Module):
    """The lightning indexer, which scores entries for each query (report, eqs. 13-17)."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, weight: Declare) -> None:
        width = cfg.index_n_heads * cfg.index_head_dim
        self.q_b_PR = weight((width, cfg.q_lora_rank), ("index_heads", None), "fp8")
        self.weights_ID = weight((cfg.index_n_heads, cfg.hidden_size), ("index_heads", None))
        self.compressor = Compressor(cfg, kind, cfg.index_head_dim, weight)


class Attention(nnx.Module):
    """Weights of an attention layer; `compressor` and `indexer` only if its kind has them."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, weight: Declare) -> None:
        width = cfg.num_attention_heads * cfg.head_dim
        ranks = cfg.o_groups * cfg.o_lora_rank
        self.q_a_RD = weight((cfg.q_lora_rank, cfg.hidden_size), (None, None), "fp8")
        self.q_norm_R = weight((cfg.q_lora_rank,), (None,), constant=1.0)
        self.q_b_PR = weight((width, cfg.q_lora_rank), ("heads", None), "fp8")
        self.kv_KD = weight((cfg.head_dim, cfg.hidden_size), (None, None), "fp8")
        self.kv_norm_K = weight((cfg.head_dim,), (None,), constant=1.0)
        self.sink_H = weight((cfg.num_attention_heads,), ("heads",), "f32", constant=0.0)
        self.o_a_QP = weight((ranks, width // cfg.o_groups), ("heads", None), "fp8")
        self.o_b_DQ = weight((cfg.hidden_size, ranks), (None, "heads"), "fp8")
        if kind.attention != "sliding":
            self.compressor = Compressor(cfg, kind, cfg.head_dim, weight)
        if kind.attention == "csa":
            self.indexer = Indexer(cfg, kind, weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Values that the steps of one layer's attention share.

    Attributes:
      x_BTD: the layer's input.
      latent_BTR: low-rank latent of the queries.
      q_BTHK: queries, after RoPE.
      window_BXK: keys of positions start - window .. start + T - 1; None if the ring has them.
      state: the layer's state, including the chunk.
      kind: kind of the layer.
      context: context of the pass.
    """

    x_BTD: Float[Array, "B T D"]
    latent_BTR: Float[Array, "B T R"]
    q_BTHK: Float[Array, "B T H K"]
    window_BXK: Float[Array, "B X K"] | None
    state: InStack
    kind: LayerKind
    context: Context

    @property
    def selects(self) -> bool:
        """Whether CSA must select entries: its pool has room for more than the top k."""
        if self.kind.attention != "csa":
            return False
        pool, table_BM = self.state.stack.pool_LBSK, self.context.table_BM
        pages = 1 if table_BM is None else table_BM.shape[1]
        return pages * pool.shape[2] > self.context.cfg.index_topk

    @property
    def visible_BT(self) -> Int[Array, "B T"]:
        """Number of complete entries at each query's position; 0 for padding."""
        if self.kind.attention == "sliding":
            return jnp.zeros_like(self.context.position_BT)
        entries_BT = (self.context.position_BT + 1) // self.kind.ratio
        return jnp.where(self.context.real_BT, entries_BT, 0)

    @property
    def hidden_BT(self) -> Int[Array, "B T"] | None:
        """Number of leading entries that belong to other documents; None if there are none."""
        if self.context.first_BT is None or self.kind.attention == "sliding":
            return None
        return self.context.first_BT // self.kind.ratio


def attend(
    p: Attention, x_BTD: Float[Array, "B T D"], state: InStack, kind: LayerKind, context: Context
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, Float32[Array, "B T"] | None]]:
    """One attention layer over a chunk.

    Args:
      p: the weights.
      x_BTD: the input.
      state: the `LayerCache` of a stack, and the layer's index in it.
      kind: kind of the layer.
      context: context of the pass.

    Returns:
      The output; the cache including the chunk, and the indexer's divergence if it is watched.
    """
    cfg, numerics, table = context.cfg, context.numerics, context.rope(kind)
    latent_BTR = layers.rms_norm(layers.linear(x_BTD, p.q_a_RD), p.q_norm_R, cfg.rms_norm_eps)
    q_BTHK = _heads(layers.linear(latent_BTR, p.q_b_PR, ("heads", None)), cfg.num_attention_heads)
    norm = rotary.Norm(cfg.rms_norm_eps, float32=not numerics.float32_islands)
    q_BTHK = layers.rotate(q_BTHK, table, norm=norm)
    kv_BTK = layers.rms_norm(layers.linear(x_BTD, p.kv_KD), p.kv_norm_K, cfg.rms_norm_eps)
    kv_BTK = layers.rotate(kv_BTK[:, :, None], table, heads=None)[:, :, 0]
    if numerics.rounded_cache:
        kv_BTK = layers.round_kv(kv_BTK, cfg.qk_rope_head_dim)

    state = _compress(p, x_BTD, state, kind, context)
    window_BXK = _window(kv_BTK, state, context)
    ring_LBRK = cache.ring_write(
        state.stack.window_LBRK, state.layer, kv_BTK, context.start_B, context.count_B
    )
    chunk = _Chunk(
        x_BTD=x_BTD,
        latent_BTR=latent_BTR,
        q_BTHK=q_BTHK,
        window_BXK=window_BXK,
        state=_replace(state, window_LBRK=ring_LBRK),
        kind=kind,
        context=context,
    )
    mixed_BTHK = (_decode if window_BXK is None else _prefill)(p, chunk)
    output_BTD = _output(p, layers.rotate(mixed_BTHK, table, inverse=True), cfg)
    return output_BTD, (chunk.state.stack, _divergence(p, chunk))


def _replace(state: InStack, **arrays: Any) -> InStack:
    """The state with some arrays replaced."""
    return dataclasses.replace(state, stack=dataclasses.replace(state.stack, **arrays))


def _heads(x_BTP: Float[Array, "B T P"], heads: int) -> Float[Array, "B T H K"]:
    return x_BTP.reshape(*x_BTP.shape[:2], heads, -1)


def _output(
    p: Attention, mixed_BTHK: Float[Array, "B T H K"], cfg: ModelConfig
) -> Float[Array, "B T D"]:
    """Project each group of heads to its low rank, then all ranks to the hidden size."""
    grouped_BTGP = mixed_BTHK.reshape(*mixed_BTHK.shape[:2], cfg.o_groups, -1)
    ranks_BTQ = layers.grouped_linear(grouped_BTGP, p.o_a_QP)
    return layers.linear(ranks_BTQ, p.o_b_DQ, (None, "heads"))


def _compress(
    p: Attention, x_BTD: Float[Array, "B T D"], state: InStack, kind: LayerKind, context: Context
) -> InStack:
    """Update the layer's compressed pools, if it has any, with the chunk."""
    if kind.attention == "sliding":
        return state
    stack, layer = state.stack, state.layer
    tail_LBRK, pool_LBSK = compress.update(
        p.compressor, (stack.tail_LBRK, stack.pool_LBSK, layer), x_BTD, kind, context, "fp8"
    )
    state = _replace(state, tail_LBRK=tail_LBRK, pool_LBSK=pool_LBSK)
    if kind.attention == "hca":
        return state
    # The indexer's loss must train nothing else.
    x_BTD = jax.lax.stop_gradient(x_BTD)
    index = (stack.index_tail_LBRK, stack.index_LBSK, layer)
    index_tail_LBRK, index_LBSK = compress.update(
        p.indexer.compressor, index, x_BTD, kind, context, "fp4"
    )
    return _replace(state, index_tail_LBRK=index_tail_LBRK, index_LBSK=index_LBSK)


def _window(
    kv_BTK: Float[Array, "B T K"], state: InStack, context: Context
) -> Float[Array, "B X K"] | None:
    """Keys of positions start - window .. start + T - 1; None if the ring has them."""
    if cache.is_decode(kv_BTK.shape[1]):
        return None
    earlier_BWK = cache.ring_read(
        state.stack.window_LBRK, state.layer, context.start_B, context.cfg.sliding_window
    )
    return jnp.concatenate([earlier_BWK, kv_BTK.astype(earlier_BWK.dtype)], axis=1)


def _query(
    p: Indexer, x_BTD: Float[Array, "B T D"], latent_BTR: Float[Array, "B T R"], context: Context
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"]]:
    """The indexer's queries, and the weight of each head with all scales folded in."""
    cfg = context.cfg
    q_BTIJ = _heads(layers.linear(latent_BTR, p.q_b_PR, ("index_heads", None)), cfg.index_n_heads)
    q_BTIJ = layers.rotate(q_BTIJ, context.rope_compressed, heads="index_heads")
    if context.numerics.rounded_cache:
        q_BTIJ = layers.round_index(q_BTIJ)
    scale = cfg.index_head_dim**-0.5 * cfg.index_n_heads**-0.5
    return q_BTIJ, layers.linear(x_BTD, p.weights_ID, ("index_heads", None)).astype(
        jnp.float32
    ) * scale


def _select(p: Indexer, chunk: _Chunk) -> Int[Array, "B T k"]:
    """The entries that CSA attends to. Every device scores with all index heads."""
    q_BTIJ, weights_BTI = _query(p, chunk.x_BTD, chunk.latent_BTR, chunk.context)
    k = chunk.context.cfg.index_topk
    select = lambda q_BTIJ, weights_BTI, keys, table_BM, *rest: indexer_topk.select(
        *(q_BTIJ, weights_BTI, _in_pages(keys, table_BM, chunk.context.cfg, index=True), *rest),
        k=k,
    )
    indices_BTk = sharding.per_device(
        select,
        *(q_BTIJ, weights_BTI, chunk.state.stack.index_LBSK, chunk.context.table_BM),
        *(chunk.state.layer, chunk.visible_BT, chunk.hidden_BT),
        axes=(ROWS, ROWS, STACKED_ROWS, ROWS, (), ROWS, ROWS),
        out=ROWS,
    )
    return saveable(indices_BTk)


def _in_pages(
    pool: Any, table_BM: Int[Array, "B M"] | None, cfg: ModelConfig, *, index: bool = False
) -> Any:
    """The pool, or the indexer's, as the ops take it: an array, None, or pages with their table."""
    if pool is None or table_BM is None:
        return pool
    return Paged(pool, table_BM, paging.codec_of(pool, cfg, index=index))


def _divergence(p: Attention, chunk: _Chunk) -> Float32[Array, "B T"] | None:
    """The indexer's divergence from the layer's attention; None if it is not watched."""
    context, state = chunk.context, chunk.state
    if not context.watch_indexer or chunk.kind.attention != "csa" or chunk.window_BXK is None:
        return None
    inputs = jax.lax.stop_gradient((chunk.x_BTD, chunk.latent_BTR))
    index_keys_BSJ = cache.layer_of(state.stack.index_LBSK, state.layer)
    pool_BSK = cache.layer_of(state.stack.pool_LBSK, state.layer)
    return indexer_divergence.divergence(
        (*_query(p.indexer, *inputs, context), index_keys_BSJ),
        (chunk.q_BTHK, chunk.window_BXK, pool_BSK, layers.value(p.sink_H)),
        chunk.visible_BT,
        chunk.hidden_BT,
        context.first_BT,
        scale=context.cfg.head_dim**-0.5,
    )


def _decode(p: Attention, chunk: _Chunk) -> Float[Array, "B T H K"]:
    """Attention of a few tokens, whose entire windows are in the ring."""
    context, state = chunk.context, chunk.state
    ring_LBRK, window = state.stack.window_LBRK, context.cfg.sliding_window
    inputs: dict[str, Any] = {
        "window_BRK": cache.layer_of(ring_LBRK, state.layer),
        "window_mask_BTR": cache.ring_mask(
            context.end_B, ring_LBRK.shape[2], context.position_BT, window
        ),
    }
    if chunk.selects:
        inputs["indices_BTk"] = _select(p.indexer, chunk)
        return _mix(sparse_attention.decode, p, chunk, inputs)
    inputs["visible_BT"] = chunk.visible_BT
    return _mix(dense_attention.decode, p, chunk, inputs)


def _prefill(p: Attention, chunk: _Chunk) -> Float[Array, "B T H K"]:
    """Attention of a long chunk."""
    context, window = chunk.context, chunk.context.cfg.sliding_window
    inputs: dict[str, Any] = {
        "window_BXK": chunk.window_BXK,
        "start_B": context.start_B,
        "first_BT": context.first_BT,
    }
    if chunk.selects:
        inputs["indices_BTk"] = _select(p.indexer, chunk)
        return _mix(sparse_attention.prefill, p, chunk, inputs, window=window)
    inputs |= {"visible_BT": chunk.visible_BT, "hidden_BT": chunk.hidden_BT}
    return _mix(dense_attention.prefill, p, chunk, inputs, window=window)


def _mix(
    run: Callable[..., Any], p: Attention, chunk: _Chunk, inputs: dict[str, Any], **static: Any
) -> Float[Array, "B T H K"]:
    """Run an attention op, on each device for its rows and heads."""
    state = chunk.state
    inputs |= {"q_BTHK": chunk.q_BTHK, "sink_H": layers.value(p.sink_H)}
    inputs |= {"pool_LBSK": state.stack.pool_LBSK, "layer": state.layer}
    scale = chunk.context.cfg.head_dim**-0.5
    axes = {"q_BTHK": _QUERIES, "sink_H": ("heads",), "pool_LBSK": STACKED_ROWS, "layer": ()}

    def run_here(table_BM, *arrays):
        of_device = dict(zip(inputs, arrays, strict=True))
        of_device["pool_LBSK"] = _in_pages(of_device["pool_LBSK"], table_BM, chunk.context.cfg)
        return run(**of_device, scale=scale, **static)

    return sharding.per_device(
        run_here,
        *(chunk.context.table_BM, *inputs.values()),
        axes=(ROWS, *(axes.get(name, ROWS) for name in inputs)),
        out=_QUERIES,
    )
