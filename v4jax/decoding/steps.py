"""The compiled entry points: static and donated arguments are declared only here.

Axis letters: B batch, T tokens, V vocabulary, N alternatives reported per token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingState
from v4jax.model import transformer
from v4jax.model.cache import Cache
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.pytree import pytree
from v4jax.model.transformer import Model

# Maximum number of decode steps in one call of `advance`.
LOOP = 64


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
    x_BTM, cache = transformer.forward(model, cfg, numerics, tokens_BT, cache, count_B)
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
    x_BTM, cache = transformer.forward(model, cfg, numerics, tokens_BT, cache, count_B)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    x_B1M = jnp.take_along_axis(x_BTM, last_B11, axis=1)
    return transformer.head(model, transformer.hidden(model, cfg, x_B1M))[:, 0], cache


def _decode(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    token_B: Int[Array, " B"],
    cache: Cache,
    count_B: Int[Array, " B"],
) -> tuple[Float32[Array, "B V"], Cache]:
    x_B1M, cache = transformer.forward(model, cfg, numerics, token_B[:, None], cache, count_B)
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
    return _decode(model, cfg, numerics, token_B, cache, jnp.ones_like(token_B))


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


@pytree
@dataclasses.dataclass(frozen=True)
class Loop:
    """State of generation between two calls.

    Attributes:
      cache: cache of all tokens but the newest.
      sampling: settings and counts of each row.
      token_B: newest token of each row, not yet in the cache.
      left_B: number of tokens that each row may still generate.
      done_B: whether each row has ended, by an end-of-sequence token, its limit or bad logits.
    """

    cache: Cache
    sampling: SamplingState
    token_B: Int[Array, " B"]
    left_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]


@pytree
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """Tokens of several steps of the loop; `real_BT` is false for padding.

    `logprob_BT` is NaN if a row's logits were not all finite, which ends the row.
    """

    real_BT: Bool[Array, "B T"]
    token_BT: Int[Array, "B T"]
    logprob_BT: Float32[Array, "B T"]
    top_id_BTN: Int[Array, "B T N"]
    top_logprob_BTN: Float32[Array, "B T N"]


def _choose(
    logits_BV: Array, loop: Loop, cfg: ModelConfig, top_logprobs: int
) -> tuple[Loop, StepOutputs]:
    """Sample each row's next token; those of rows that are done are not real."""
    token_B, logprob_B, (top_id_BN, top_logprob_BN), state = sampling.sample(
        logits_BV, loop.sampling, top_logprobs=top_logprobs
    )
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
    logprob_B = jnp.where(finite_B, logprob_B, jnp.nan)
    left_B = loop.left_B - 1
    ended_B = (left_B <= 0) | ~finite_B
    for eos in cfg.eos_token_ids:
        ended_B = ended_B | (token_B == eos)
    chosen = (~loop.done_B, token_B, logprob_B, top_id_BN, top_logprob_BN)
    outputs = StepOutputs(*(part[:, None] for part in chosen))
    return Loop(loop.cache, state, token_B, left_B, loop.done_B | ended_B), outputs


@functools.partial(jax.jit, static_argnames=("cfg", "top_logprobs"), donate_argnames="cache")
def begin(
    logits_BV: Float32[Array, "B V"],
    cache: Cache,
    state: SamplingState,
    limit_B: Int[Array, " B"],
    *,
    cfg: ModelConfig,
    top_logprobs: int = 0,
) -> tuple[Loop, StepOutputs]:
    """Sample the first token after the prompt."""
    zeros_B = jnp.zeros_like(limit_B)
    loop = Loop(cache, state, zeros_B, limit_B, zeros_B > 0)
    return _choose(logits_BV, loop, cfg, top_logprobs)


@functools.partial(
    jax.jit, static_argnames=("cfg", "numerics", "top_logprobs"), donate_argnames="loop"
)
def advance(
    model: Model,
    loop: Loop,
    steps: Int[Array, ""],
    *,
    cfg: ModelConfig,
    numerics: Numerics,
    top_logprobs: int = 0,
) -> tuple[Loop, StepOutputs]:
    """Run up to `steps` (at most LOOP) decode steps, fewer if every row ends earlier.

    Longer texts need no new program: lengths, limits and sampling settings are all data.
    """

    def step(carry):
        at, loop, block = carry
        count_B = jnp.where(loop.done_B, 0, 1).astype(jnp.int32)
        logits_BV, cache = _decode(model, cfg, numerics, loop.token_B, loop.cache, count_B)
        loop, outputs = _choose(
            logits_BV, dataclasses.replace(loop, cache=cache), cfg, top_logprobs
        )
        put = lambda block, new: jax.lax.dynamic_update_slice_in_dim(block, new, at, 1)
        return at + 1, loop, jax.tree.map(put, block, outputs)

    def unfinished(carry):
        at, loop, _ = carry
        return (at < jnp.minimum(steps, LOOP)) & ~jnp.all(loop.done_B)

    B = loop.token_B.shape[0]
    empty = lambda dtype, *more: jnp.zeros((B, LOOP, *more), dtype)
    block = StepOutputs(
        real_BT=empty(bool),
        token_BT=empty(jnp.int32),
        logprob_BT=empty(jnp.float32),
        top_id_BTN=empty(jnp.int32, top_logprobs),
        top_logprob_BTN=empty(jnp.float32, top_logprobs),
    )
    _, loop, block = jax.lax.while_loop(unfinished, step, (jnp.int32(0), loop, block))
    return loop, block
