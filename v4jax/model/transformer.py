"""The model: embedding, segments of scanned layers, final collapse and head.

Axis letters: B batch, T tokens, D hidden, N streams, M = N * D, V vocabulary.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import products
from v4jax.model import context, hyper, layers, mtp, sharding
from v4jax.model.block import Stack, Watch, run_stack, train_stack
from v4jax.model.cache import Cache
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.params import Declare
from v4jax.model.segments import segments


class Model(nnx.Module):
    """All weights. `Model(cfg)` holds declarations; `params.init` or a loader fills them."""

    def __init__(self, cfg: ModelConfig) -> None:
        weight = Declare(std=cfg.initializer_range)
        self.embed_VD = weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
        pattern = segments(cfg.layers)
        self.stacks = nnx.List([Stack(cfg, part.pattern, part.repeats) for part in pattern])
        self.hyper_head = hyper.HyperHead(cfg, weight)
        self.norm_D = weight((cfg.hidden_size,), (None,), constant=1.0)
        self.head_VD = weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
        self.mtp = nnx.List([mtp.Mtp(cfg) for _ in range(cfg.num_nextn_predict_layers)])


def forward(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    tokens_BT: Int[Array, "B T"],
    cache: Cache,
    count_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T M"], Cache]:
    """Run the backbone over a chunk that follows what the cache holds.

    Args:
      model: the weights.
      cfg: the configuration that they are of.
      numerics: where rounding happens.
      tokens_BT: token ids; beyond `count_B` they are padding, any valid id.
      cache: the state, with room for T more tokens.
      count_B: real tokens of each row.

    Returns:
      The residual streams before their final collapse, and the cache with the chunk in it.
    """
    embedded_BTD = embed(model, tokens_BT)
    shared = context.make(cfg, numerics, tokens_BT, cache.length_B, count_B, embedded_BTD.dtype)
    x_BTM = sharding.constrain(hyper.expand(embedded_BTD, cfg), "batch", None, None)
    updated = []
    for stack, part, states in zip(model.stacks, segments(cfg.layers), cache.segments, strict=True):
        x_BTM, states = run_stack(stack, x_BTM, states, part.pattern, part.repeats, shared)
        updated.append(states)
    return x_BTM, dataclasses.replace(cache, length_B=shared.end_B, segments=tuple(updated))


def forward_rows(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    tokens_BT: Int[Array, "B T"],
    document_BT: Int[Array, "B T"] | None = None,
    *,
    remat: bool = False,
    unroll: bool = False,
    watch: Watch | None = None,
    watch_indexer: bool = False,
) -> tuple[Float[Array, "B T M"], context.Context, list[list[Any]]]:
    """Run the backbone over whole rows without a cache, for training.

    Args:
      model: the weights.
      cfg: the configuration that they are of.
      numerics: where rounding happens.
      tokens_BT: token ids.
      document_BT: which document of its row a token is of, 0 at padding. Each begins at a multiple
        of 128 and sees itself only, as if it stood alone. None: each row is one document.
      remat: compute activations anew in the backward pass, but for the streams between layers;
        without it, but for what `pallas_kernels.residuals.saveable` names.
      unroll: compile each layer by itself, instead of a loop over those that are alike.
      watch: makes of each layer that has run what is to be kept of it.
      watch_indexer: compare indexers with the attention that they serve.

    Returns:
      The residual streams before their final collapse; what the MTP blocks need; and for each
      segment and position of its pattern what `watch` made, its layers stacked.
    """
    embedded_BTD = embed(model, tokens_BT)
    rows, length = tokens_BT.shape
    start_B, count_B = jnp.zeros(rows, jnp.int32), jnp.full(rows, length, jnp.int32)
    shared = context.make(
        cfg,
        numerics,
        tokens_BT,
        start_B,
        count_B,
        embedded_BTD.dtype,
        document_BT=document_BT,
    )
    shared = dataclasses.replace(shared, watch_indexer=watch_indexer)
    x_BTM = sharding.constrain(hyper.expand(embedded_BTD, cfg), "batch", None, None)
    watched = []
    for stack, part in zip(model.stacks, segments(cfg.layers), strict=True):
        x_BTM, seen = train_stack(
            stack,
            x_BTM,
            part.pattern,
            part.repeats,
            shared,
            remat=remat,
            unroll=unroll,
            watch=watch,
        )
        watched.append(seen)
    return x_BTM, shared, watched


def draft_rows(
    model: Model,
    streams_BTM: Float[Array, "B T M"],
    shared: context.Context,
    *,
    index: int = 0,
    remat: bool = False,
    watch: Watch | None = None,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """Run one MTP block over whole rows: hidden states for `head`, of the token after the next.

    The last token of a document has no next one: its place is padding to the block.

    Args:
      model: the weights.
      streams_BTM: the backbone's streams, from `forward_rows`.
      shared: what `forward_rows` gave with them.
      index: which block.
      remat: as for `forward_rows`.
      watch: as for `forward_rows`; what it made of the block is returned too.
    """
    shared = context.of_next(shared)
    embedded_BTD = embed(model, shared.tokens_BT)
    drafter = model.mtp[index]
    return mtp.run_rows(drafter, streams_BTM, embedded_BTD, shared, remat=remat, watch=watch)


def draft(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    streams_BTM: Float[Array, "B T M"],
    next_tokens_BT: Int[Array, "B T"],
    cache: Cache,
    *,
    start_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
    index: int = 0,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T M"], Cache]:
    """Run one MTP block at positions start, start + 1, ... whose backbone streams are given.

    Returns:
      Hidden states for `head`, the block's streams, and the cache with the block's own state.
    """
    embedded_BTD = embed(model, next_tokens_BT)
    shared = context.make(cfg, numerics, next_tokens_BT, start_B, count_B, embedded_BTD.dtype)
    states = list(cache.mtp)
    hidden_BTD, x_BTM, states[index] = mtp.run(
        model.mtp[index], streams_BTM, embedded_BTD, states[index], shared
    )
    return hidden_BTD, x_BTM, dataclasses.replace(cache, mtp=tuple(states))


def embed(model: Model, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Token embeddings, unscaled."""
    return layers.value(model.embed_VD)[tokens_BT]


def hidden(model: Model, cfg: ModelConfig, x_BTM: Float[Array, "B T M"]) -> Float[Array, "B T D"]:
    """Collapse the streams and apply the final norm."""
    return layers.rms_norm(
        hyper.collapse(model.hyper_head, x_BTM, cfg), model.norm_D, cfg.rms_norm_eps
    )


def head(model: Model, hidden_BTD: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
    """Logits in float32; what comes back as their gradient is rounded to the weight's dtype."""
    weight_VD: Any = layers.value(model.head_VD)
    logits_BTV = products.with_transposed(hidden_BTD.astype(weight_VD.dtype), weight_VD)
    return sharding.constrain(logits_BTV, "batch", None, "vocab")
