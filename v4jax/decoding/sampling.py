"""Sampling of the next token inside a compiled step; settings are arrays with an entry per row.

The order is that of transformers 5.23 (`GenerationMixin._get_logits_processor`): penalties,
temperature, top-k, top-p, min-p, draw. Temperature 0 takes the largest penalised logit instead.

Filters, penalties and noise each run only if a row needs them.

Axis letters: B batch, T prompt tokens, V vocabulary, N alternatives reported per token.
"""

import dataclasses
import secrets
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Shaped, UInt32

from v4jax.arguments import checked, integer, number, optional
from v4jax.decoding import filters
from v4jax.model import sharding
from v4jax.model.pytree import pytree
from v4jax.model.sharding import ROWS

# Below this a float32 quotient can overflow; far above it, the draw is already the largest logit.
_MIN_TEMPERATURE = 1e-30
_MIN, _MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# Kinds of the fields of `SamplingParams`.
KINDS = {
    "temperature": number("a finite number of 0 or more", lambda x: 0 <= x <= _MAX),
    "top_k": integer(0),
    "top_p": number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": number("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": number("a finite number above 0", lambda x: _MIN <= x <= _MAX),
    "presence_penalty": number("a number from -2 to 2", lambda x: -2 <= x <= 2),
    "frequency_penalty": number("a number from -2 to 2", lambda x: -2 <= x <= 2),
    "seed": optional(integer(-(2**63), 2**64 - 1, "an integer from -2**63 to 2**64 - 1")),
}


@checked(**KINDS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request; the defaults sample from the model's own distribution.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep this many of the most probable tokens, and ties with the last; 0 is off.
      top_p: keep the most probable tokens whose probabilities reach this sum; 1 is off.
      min_p: keep tokens at least this fraction as probable as the most probable; 0 is off.
      repetition_penalty: divides positive logits of tokens in the prompt or output, and multiplies
        negative ones; 1 is off.
      presence_penalty: subtracted from the logits of tokens in the output, -2 to 2.
      frequency_penalty: subtracted for each time a token occurs in the output, -2 to 2.
      seed: 64 bits that determine all draws; None takes them from the operating system.

    Raises:
      ArgumentError: a value is out of range, NaN or not a number, or a field is unknown.
    """

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    seed: int | None = None


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Settings of each row and the state of its draws; the first axis of every leaf is B.

    Attributes:
      temperature_B, top_k_B, min_p_B: as in SamplingParams; 0 is greedy, off and off. float32,
        int32 and float32.
      tail_B: 1 - top_p, the probability mass that top-p may cut off; 0 is off. float32.
      repetition_B, presence_B, frequency_B: the penalties, float32.
      seed_B2: upper and lower word of the seed, uint32. Token n of a row is drawn with (seed, n).
      drawn_B: n, the number of tokens drawn so far, int32.
      in_prompt_BV: whether each token occurs in the prompt, bool; the repetition penalty needs no
        counts.
      count_BV: how often each token was generated. int32 (4 V bytes per row, small next to a row's
        cache), so that the penalty of a long text does not saturate at 255 or 65535.
    """

    temperature_B: Float32[Array, " B"]
    top_k_B: Int[Array, " B"]
    tail_B: Float32[Array, " B"]
    min_p_B: Float32[Array, " B"]
    repetition_B: Float32[Array, " B"]
    presence_B: Float32[Array, " B"]
    frequency_B: Float32[Array, " B"]
    seed_B2: UInt32[Array, "B 2"]
    drawn_B: Int[Array, " B"]
    in_prompt_BV: Bool[Array, "B V"]
    count_BV: Int[Array, "B V"]


def init(
    params: Sequence[SamplingParams],
    vocab: int,
    prompt_tokens_BT: Int[np.ndarray, "B T"],
    prompt_lengths_B: Int[np.ndarray, " B"],
) -> SamplingState:
    """The state before the first draw. Runs on the host.

    Args:
      params: settings of each row.
      vocab: size of the vocabulary.
      prompt_tokens_BT: prompt of each row; tokens beyond its length are ignored.
      prompt_lengths_B: length of each prompt, 0 to T.

    Raises:
      ValueError: the numbers of rows differ, a length exceeds T, or a token is outside the
        vocabulary.
    """
    B = len(prompt_tokens_BT)
    if len(params) != B or len(prompt_lengths_B) != B:
        raise ValueError(
            f"{B} rows of prompt tokens need {B} params and lengths; "
            f"got {len(params)} and {len(prompt_lengths_B)}."
        )
    return SamplingState(
        **{name: jnp.asarray(values) for name, values in settings(params, vocab).items()},
        drawn_B=jnp.zeros(B, jnp.int32),
        in_prompt_BV=jnp.asarray(_occurs(prompt_tokens_BT, prompt_lengths_B, vocab)),
        count_BV=jnp.zeros((B, vocab), jnp.int32),
    )


def settings(
    params: Sequence[SamplingParams], vocab: int
) -> dict[str, Shaped[np.ndarray, "B ..."]]:
    """The fields of `SamplingState` that do not change while rows are sampled."""
    reals = lambda name: np.array([getattr(p, name) for p in params], np.float32)
    return {
        "temperature_B": reals("temperature"),
        "top_k_B": np.array([min(p.top_k, vocab) for p in params], np.int32),
        # In double precision, as 1 - float32(0.95) loses four bits.
        "tail_B": np.array([1.0 - p.top_p for p in params], np.float32),
        "min_p_B": reals("min_p"),
        "repetition_B": reals("repetition_penalty"),
        "presence_B": reals("presence_penalty"),
        "frequency_B": reals("frequency_penalty"),
        "seed_B2": np.array([_seed_words(p.seed) for p in params], np.uint32),
    }


def _occurs(
    tokens_BT: Int[np.ndarray, "B T"], lengths_B: Int[np.ndarray, " B"], vocab: int
) -> Bool[np.ndarray, "B V"]:
    """Which tokens occur in each row's prompt."""
    B, T = tokens_BT.shape
    occurs_BV = np.zeros((B, vocab), bool)
    for row, (tokens_T, length) in enumerate(zip(tokens_BT, lengths_B, strict=True)):
        if not 0 <= length <= T:
            raise ValueError(f"Prompt {row} has length {length}; it must be 0 to {T}.")
        prompt = tokens_T[:length]
        bad = prompt[(prompt < 0) | (prompt >= vocab)]
        if bad.size:
            raise ValueError(f"Prompt {row} has token {bad[0]}; the vocabulary is {vocab}.")
        occurs_BV[row, prompt] = True
    return occurs_BV


def _seed_words(seed: int | None) -> tuple[int, int]:
    bits = secrets.randbits(64) if seed is None else seed % 2**64
    return bits >> 32, bits & 0xFFFFFFFF


def sample(
    logits_BV: Float32[Array, "B V"],
    state: SamplingState,
    *,
    top_logprobs: int = 0,
    allowed_BW: UInt32[Array, "B W"] | None = None,
) -> tuple[
    Int32[Array, " B"],
    Float32[Array, " B"],
    tuple[Int32[Array, "B N"], Float32[Array, "B N"]],
    SamplingState,
]:
    """Sample each row's next token.

    A row's token depends on its own logits, settings, tokens and (seed, n), not on other rows; only
    the rounding of top-p's sums may differ between compiled programs.

    Logprobs are of the raw logits, before penalties, temperature and filters, as OpenAI and
    DeepSeek report them. If a row has a NaN, a +inf or only -inf, its logprob is NaN and its token
    is an arbitrary valid id; other rows are not affected.

    Args:
      logits_BV: logits; -inf forbids a token.
      state: the state from `init` or the previous call.
      top_logprobs: N, static; number of most probable tokens to report.
      allowed_BW: the tokens that may be sampled, bit t % 32 of word t // 32; None for all.

    Returns:
      The tokens, their logprobs, the most probable tokens (ids and logprobs in descending order,
      ties by ascending id), and the state with the new tokens counted.

    Raises:
      ValueError: N is not 0 to V.
    """
    V = logits_BV.shape[1]
    if not 0 <= top_logprobs <= V:
        raise ValueError(f"top_logprobs is {top_logprobs}; it must be 0 to {V}, the vocabulary.")
    keep_logits = lambda x_BV, _: x_BV
    penalise = (state.repetition_B != 1) | (state.presence_B != 0) | (state.frequency_B != 0)
    x_BV = jax.lax.cond(jnp.any(penalise), penalised_logits, keep_logits, logits_BV, state)
    if allowed_BW is not None:
        restrict = jnp.any(allowed_BW != jnp.uint32(0xFFFFFFFF))
        x_BV = jax.lax.cond(restrict, _restricted, keep_logits, x_BV, allowed_BW)
    x_BV = jax.lax.cond(jnp.any(state.temperature_B > 0), _scores, keep_logits, x_BV, state)
    token_B = _first_argmax(x_BV)

    logsum_B = jax.nn.logsumexp(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - logsum_B
    top_BN, top_id_BN = jax.lax.top_k(logits_BV, top_logprobs)
    state = dataclasses.replace(
        state,
        drawn_B=state.drawn_B + 1,
        count_BV=state.count_BV + _one_hot(token_B, state.count_BV.shape[1]),
    )
    return token_B, logprob_B, (top_id_BN, top_BN - logsum_B[:, None]), state


def _restricted(
    x_BV: Float32[Array, "B V"], allowed_BW: UInt32[Array, "B W"]
) -> Float32[Array, "B V"]:
    """Logits with -inf at tokens whose bits are not set."""
    at_32 = jnp.arange(32, dtype=jnp.uint32)
    bits = lambda word_W: (word_W[:, None] >> at_32[None] & 1 == 1).reshape(-1)
    # Of all rows at once, a TPU would pad the bits of each word to 128 lanes.
    unpack = lambda allowed_BW: jax.lax.map(bits, allowed_BW, batch_size=8)
    bit_BV = sharding.per_device(unpack, allowed_BW, axes=(ROWS,), out=ROWS, kernels=False)
    return jnp.where(bit_BV[:, : x_BV.shape[1]], x_BV, -jnp.inf)


def _one_hot(token_B: Int32[Array, " B"], vocab: int) -> Int32[Array, "B V"]:
    """One-hot rows; a scatter would make XLA gather the rows of a sharded vocabulary."""
    id_V = jnp.arange(vocab, dtype=jnp.int32)
    return (id_V[None] == token_B[:, None]).astype(jnp.int32)


def penalised_logits(x_BV: Float32[Array, "B V"], state: SamplingState) -> Float32[Array, "B V"]:
    """Apply repetition as in CTRL and transformers, then presence and frequency as in OpenAI's API.

    A row whose penalties are off is returned bit for bit.
    """
    repetition_B1 = state.repetition_B[:, None]
    seen_BV = state.in_prompt_BV | (state.count_BV > 0)
    x_BV = jnp.where(seen_BV, jnp.where(x_BV < 0, x_BV * repetition_B1, x_BV / repetition_B1), x_BV)
    count_BV = state.count_BV.astype(jnp.float32)
    presence_BV = state.presence_B[:, None] * (count_BV > 0).astype(jnp.float32)
    return x_BV - state.frequency_B[:, None] * count_BV - presence_BV


def filtered_logits(x_BV: Float32[Array, "B V"], state: SamplingState) -> Float32[Array, "B V"]:
    """Divide logits by temperature, then set those cut by top-k, top-p or min-p to -inf, in order.

    Rows of temperature above 0 are drawn from the softmax of the result.

    Args:
      x_BV: penalised logits.
      state: temperature and filters.
    """
    x_BV = x_BV / jnp.maximum(state.temperature_B, _MIN_TEMPERATURE)[:, None]
    # Greedy rows need no filters.
    top_k_B = jnp.where(state.temperature_B > 0, state.top_k_B, 0)
    tail_B = jnp.where(state.temperature_B > 0, state.tail_B, 0.0)
    keep_all = lambda x_BV, *_: x_BV
    needed = jnp.any((top_k_B > 0) | (tail_B > 0))
    x_BV = jax.lax.cond(needed, filters.top_k_top_p, keep_all, x_BV, top_k_B, tail_B)
    floor_B = jnp.max(x_BV, axis=-1) + jnp.log(state.min_p_B)
    # For a largest logit of +inf, the sum with log 0 would be NaN.
    floor_B = jnp.where(state.min_p_B > 0, floor_B, -jnp.inf)
    return jnp.where(x_BV >= floor_B[:, None], x_BV, -jnp.inf)


def _scores(x_BV: Float32[Array, "B V"], state: SamplingState) -> Float32[Array, "B V"]:
    """Scores whose argmax is the draw: filtered logits plus Gumbel noise; greedy rows unchanged."""
    noise_BV = _gumbel(state.seed_B2, state.drawn_B, x_BV.shape[1])
    greedy_B1 = state.temperature_B[:, None] == 0
    return jnp.where(greedy_B1, x_BV, filtered_logits(x_BV, state) + noise_BV)


def _gumbel(
    seed_B2: UInt32[Array, "B 2"], drawn_B: Int32[Array, " B"], vocab: int
) -> Float32[Array, "B V"]:
    """Standard Gumbel noise that depends only on a row's (seed, n) and the vocabulary size.

    `jax.random.gumbel` has 23 random bits per value: the largest of 129280 values ties in 1.5% of
    draws, always in favour of the lower id. Its exact mode needs twice the bits. Here all 32 count.
    """

    def row_bits(seed_2, drawn):
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, drawn), (vocab,))

    bits_BV = jax.vmap(row_bits)(seed_B2, drawn_B).astype(jnp.float32)
    uniform_BV = jnp.minimum((bits_BV + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform_BV))


def _first_argmax(x_BV: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """The lowest id of each row's largest value; V - 1 if there is a NaN.

    These two reductions take a fifth of the time of `jnp.argmax` on CPU.
    """
    V = x_BV.shape[1]
    is_top_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    ids_V = jnp.arange(V, dtype=jnp.int32)
    return jnp.min(jnp.where(is_top_BV, ids_V[None], V - 1), axis=-1)
