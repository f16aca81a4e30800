"""The model: embedding, segments of scanned layers, final collapse and head.

Axis letters: B batch, T tokens, D hidden, N streams, M = N * D, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Shaped

from pallas_kernels import products
from pallas_kernels.residuals import Remat
from v4jax.model import context, hyper, layers, mtp, sharding, storage
from v4jax.model.block import Stack, Watch, run_stack, train_stack
from v4jax.model.cache import Cache, is_decode
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.params import Declare
from v4jax.model.segments import segments


class Model(nnx.Module):
    """All weights. `Model(cfg)` holds declarations, which `params.init` or a loader fills."""

    def __init__(self, cfg: ModelConfig) -> None:
        weight = Declare(std=cfg.initializer_range)
        self.embed_VD = weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
        self.stacks = nnx.List([Stack(cfg, part) for part in segments(cfg.layers)])
        self.hyper_head = hyper.HyperHead(cfg, weight)
        self.norm_D = weight((cfg.hidden_size,), (None,), constant=1.0)
        self.head_VD = weight((cfg.vocab_size, cfg.hidden_size), ("vocab", None))
        self.mtp = nnx.List([mtp.Mtp(cfg) for _ in range(cfg.num_nextn_predict_layers)])


def forward(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    tokens_BT: Int[Array, "B T"],
    cache: Cache,
    count_B: Int[Array, " B"],
    *,
    watch: Watch | None = None,
) -> tuple[Float[Array, "B T M"], Cache, list[Any]]:
    """Run the backbone over a chunk that follows what the cache holds.

    Args:
      model: the weights.
      cfg: the model's configuration.
      numerics: where rounding happens.
      tokens_BT: token ids; beyond `count_B`, any valid ids as padding.
      cache: the state, with room for T more tokens.
      count_B: number of real tokens in each row.
      watch: maps the trace of each layer to what to return of it.

    Returns:
      The residual streams before their final collapse; the cache including the chunk; and for each
      segment and position of its pattern the results of `watch`, stacked over layers.
    """
    embedded_BTD = embed(model, tokens_BT)
    shared = context.make(
        *(cfg, numerics, tokens_BT, cache.length_B, count_B, embedded_BTD.dtype),
        table_BM=cache.table_BM,
    )
    x_BTM = sharding.constrain(hyper.expand(embedded_BTD, cfg), "batch", None, None)
    updated, watched = [], []
    for stack, part, states in zip(model.stacks, segments(cfg.layers), cache.segments, strict=True):
        x_BTM, states, results = run_stack(stack, x_BTM, states, part, shared, watch)
        updated.append(states)
        watched.append(results)
    cache = dataclasses.replace(cache, length_B=shared.end_B, segments=tuple(updated))
    return x_BTM, cache, watched


def by_layer(watched: list[Any]) -> Shaped[Array, "L ..."]:
    """What a pass watched, an array of each layer, in the layers' order."""
    parts = [jnp.stack(results, axis=1) for results in watched]
    return jnp.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])


def forward_rows(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    tokens_BT: Int[Array, "B T"],
    document_BT: Int[Array, "B T"] | None = None,
    *,
    remat: Remat | Sequence[Remat] = "light",
    unroll: bool = False,
    watch: Watch | None = None,
    watch_indexer: bool = False,
) -> tuple[Float[Array, "B T M"], context.Context, list[list[Any]]]:
    """Run the backbone over entire rows without a cache, for training.

    Args:
      model: the weights.
      cfg: the model's configuration.
      numerics: where rounding happens.
      tokens_BT: token ids.
      document_BT: number of each token's document in its row, 0 at padding. Documents begin at
        multiples of 128 and see only themselves, as if alone. None: each row is one document.
      remat: what the backward pass recomputes, see `pallas_kernels.residuals.POLICIES`; a policy,
        or one for each segment.
      unroll: compile every layer separately, instead of a loop over repeats.
      watch: maps the trace of each layer to what to return of it.
      watch_indexer: compute the indexers' divergence from their attention.

    Returns:
      The residual streams before their final collapse; the context, for `draft_rows`; and for each
      segment and position of its pattern the results of `watch`, stacked over layers.
    """
    embedded_BTD = embed(model, tokens_BT)
    rows, length = tokens_BT.shape
    start_B, count_B = jnp.zeros(rows, jnp.int32), jnp.full(rows, length, jnp.int32)
    shared = context.make(
        cfg, numerics, tokens_BT, start_B, count_B, embedded_BTD.dtype, document_BT=document_BT
    )
    shared = dataclasses.replace(shared, watch_indexer=watch_indexer)
    x_BTM = sharding.constrain(hyper.expand(embedded_BTD, cfg), "batch", None, None)
    watched = []
    parts = segments(cfg.layers)
    policies = [remat] if isinstance(remat, str) else remat
    policies = [*policies] * (len(parts) if len(policies) == 1 else 1)
    for stack, part, policy in zip(model.stacks, parts, policies, strict=True):
        x_BTM, results = train_stack(
            stack, x_BTM, part, shared, remat=policy, unroll=unroll, watch=watch
        )
        watched.append(results)
    return x_BTM, shared, watched


def draft_rows(
    model: Model,
    streams_BTM: Float[Array, "B T M"],
    shared: context.Context,
    *,
    remat: Remat = "light",
    watch: Watch | None = None,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """Run the first MTP block over entire rows.

    The last token of a document has no next one, so the block treats it as padding.

    Args:
      model: the weights.
      streams_BTM: the backbone's streams, from `forward_rows`.
      shared: the context that `forward_rows` returned with them.
      remat: a policy, as for `forward_rows`.
      watch: as for `forward_rows`.

    Returns:
      Hidden states for `head`, which predict the token after the next, and the results of `watch`.
    """
    shared = context.of_next(shared)
    embedded_BTD = embed(model, shared.tokens_BT)
    return mtp.run_rows(model.mtp[0], streams_BTM, embedded_BTD, shared, remat=remat, watch=watch)


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
      Hidden states for `head`, the block's streams, and the cache with the block's updated state.
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
    return hyper.collapse(model.hyper_head, x_BTM, model.norm_D, cfg)


def head(model: Model, hidden_BTD: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
    """Logits in float32; their gradient is rounded to the weight's dtype."""
    weight_VD: Any = layers.value(model.head_VD)
    if is_decode(hidden_BTD.shape[1]):
        weight_VD = layers.read_in_place(weight_VD)
    logits_BTV = logits(hidden_BTD, storage.whole(weight_VD, ("vocab", None)))
    return sharding.constrain(logits_BTV, "batch", None, "vocab")


def logits(
    hidden_BTD: Float[Array, "B T D"], weight_VD: Float[Array, "V D"]
) -> Float32[Array, "B T V"]:
    """The head's product."""
    return products.with_transposed(hidden_BTD.astype(weight_VD.dtype), weight_VD)
