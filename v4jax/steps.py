"""The compiled entry points: what is static and what is donated is said here and nowhere else.

Axis letters: B batch, T tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from v4jax import model as m
from v4jax.cache import Cache
from v4jax.config import ModelConfig
from v4jax.model import Model
from v4jax.numerics import Numerics


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
    """Take a chunk in and give the logits at each of its positions."""
    x_BTM, cache = m.forward(model, cfg, numerics, tokens_BT, cache, count_B)
    return m.head(model, m.hidden(model, cfg, x_BTM)), cache


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
    """Take a chunk in and give the logits of each row's last real token."""
    x_BTM, cache = m.forward(model, cfg, numerics, tokens_BT, cache, count_B)
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None, None]
    x_B1M = jnp.take_along_axis(x_BTM, last_B1, axis=1)
    return m.head(model, m.hidden(model, cfg, x_B1M))[:, 0], cache


@functools.partial(jax.jit, static_argnames=("cfg", "numerics"), donate_argnames="cache")
def decode(
    model: Model,
    tokens_B: Int[Array, " B"],
    cache: Cache,
    *,
    cfg: ModelConfig,
    numerics: Numerics,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Advance every row by one token."""
    x_B1M, cache = m.forward(
        model, cfg, numerics, tokens_B[:, None], cache, jnp.ones_like(tokens_B)
    )
    return m.head(model, m.hidden(model, cfg, x_B1M))[:, 0], cache
