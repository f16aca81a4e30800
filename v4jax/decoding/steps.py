"""The compiled entry points: static and donated arguments are declared only here.

Axis letters: B batch, T tokens, V vocabulary, N alternatives reported per token.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from v4jax.model import transformer
from v4jax.model.cache import Cache
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.transformer import Model


@functools.partial(jax.jit, static_argnames=("cfg", "numerics"), donate_argnames="cache")
def logits(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    cache: Cache,
    count_B: Int[Array, " B"],
    *,
    cfg: ModelConfig,
    numerics: Numerics,
) -> tuple[Float32[Array, "B T V"], Cache]:
    """Run a chunk of tokens and return the logits at each position."""
    x_BTM, cache, _ = transformer.forward(model, cfg, numerics, tokens_BT, cache, count_B)
    return transformer.head(model, transformer.hidden(model, cfg, x_BTM)), cache


@functools.partial(jax.jit, static_argnames=("cfg", "numerics"), donate_argnames="cache")
def prefill(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    cache: Cache,
    count_B: Int[Array, " B"],
    *,
    cfg: ModelConfig,
    numerics: Numerics,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Run a chunk of tokens and return the logits of each row's last real token."""
    x_BTM, cache, _ = transformer.forward(model, cfg, numerics, tokens_BT, cache, count_B)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    x_B1M = jnp.take_along_axis(x_BTM, last_B11, axis=1)
    return transformer.head(model, transformer.hidden(model, cfg, x_B1M))[:, 0], cache


@functools.partial(jax.jit, static_argnames=("cfg", "numerics"), donate_argnames="cache")
def decode(
    model: Model,
    token_B: Int[Array, " B"],
    cache: Cache,
    *,
    cfg: ModelConfig,
    numerics: Numerics,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Advance every row by one token."""
    count_B = jnp.ones_like(token_B)
    x_B1M, cache, _ = transformer.forward(model, cfg, numerics, token_B[:, None], cache, count_B)
    return transformer.head(model, transformer.hidden(model, cfg, x_B1M))[:, 0], cache


@functools.partial(jax.jit, static_argnames=("cfg", "numerics", "index"), donate_argnames="cache")
def draft(
    model: Model,
    streams_BTM: Float[Array, "B T M"],
    next_tokens_BT: Int[Array, "B T"],
    cache: Cache,
    start_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
    *,
    cfg: ModelConfig,
    numerics: Numerics,
    index: int = 0,
) -> tuple[Float32[Array, "B T V"], Float[Array, "B T M"], Cache]:
    """Run an MTP block; returns logits after `next_tokens_BT`, the block's streams and a cache."""
    hidden_BTD, x_BTM, cache = transformer.draft(
        model,
        cfg,
        numerics,
        streams_BTM,
        next_tokens_BT,
        cache,
        start_B=start_B,
        count_B=count_B,
        index=index,
    )
    return transformer.head(model, hidden_BTD), x_BTM, cache
