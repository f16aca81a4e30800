"""`LanguageModel`, which `v4jax.load` returns: a model with its tokenizer.

Axis letters: B batch, T tokens, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from v4jax import arguments, waiting
from v4jax.adapters import updates
from v4jax.arguments import shown
from v4jax.checkpoints import tensor_values
from v4jax.checkpoints.disk import CheckpointError
from v4jax.decoding import loop, sampling, steps
from v4jax.decoding.loop import Engine, FinishReason, Timings, Token
from v4jax.decoding.sampling import SamplingParams
from v4jax.model.config import ModelConfig
from v4jax.text.stopping import STOP, StopStrings
from v4jax.text.tokenizer import StreamDecoder, Tokenizer

# Arguments of both `generate` and `stream`.
_KINDS = {"prompt": arguments.PROMPT, "max_tokens": arguments.integer(1), "stop": STOP}
_KINDS |= sampling.KINDS


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
      text: the new text, without a stop string or special tokens at its end.
      tokens: the new tokens, including an end-of-sequence token.
      logprobs: log-probability of each token under the raw logits.
      top_logprobs: for each token, the requested number of most probable tokens with their
        log-probabilities.
      finish_reason: 'stop' after an end-of-sequence token or a stop string, else 'length'.
      timings: wall-clock times.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    finish_reason: FinishReason
    timings: Timings


@arguments.checked(
    engine=arguments.instance("a v4jax.decoding.loop.Engine", Engine),
    tokenizer=arguments.optional(arguments.instance("a v4jax.text.tokenizer.Tokenizer", Tokenizer)),
)
@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
    """A model ready to run.

    Attributes:
      engine: weights, configuration and compiled steps.
      tokenizer: the tokenizer; None if the checkpoint has none.
    """

    engine: Engine
    tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        return f"LanguageModel({self.engine}, {'with' if self.tokenizer else 'without'} tokenizer)"

    @property
    def config(self) -> ModelConfig:
        return self.engine.cfg

    @arguments.checked(path=arguments.optional(arguments.PATH))
    def with_adapter(self, path: str | Path | None) -> "LanguageModel":
        """The same model with another adapter; the arrays of the base model are shared.

        Args:
          path: a PEFT adapter (a directory or a Hub id) or the directory of a training run; None
            for no adapter.

        Raises:
          CheckpointError: the path is neither, is damaged, is for another model, or is a run that
            trained no adapter.
        """
        engine = self.engine
        if path is None:
            changed = updates.detach(engine.model, engine.cfg)
        else:
            update = updates.read(updates.resolve(path), engine.cfg)
            if isinstance(update, updates.Replaced):
                raise CheckpointError(
                    f"{path}: trained the weights in full, so there is no base to share; "
                    "pass it to 'v4jax.load'."
                )
            changed = updates.attach(engine.model, engine.cfg, update, engine.dtype)
        return LanguageModel(dataclasses.replace(engine, model=changed), self.tokenizer)

    @arguments.checked(tokens=arguments.TOKEN_ROWS)
    def logits(self, tokens: Any) -> Float32[np.ndarray, "B T V"]:
        """Logits at every position.

        Args:
          tokens: token ids [B, T], not empty.

        Raises:
          ValueError: `tokens` is not of shape [B, T], is empty, is too long for the model, or has
            an id outside the vocabulary.
          NotFiniteError: the logits are not finite.
        """
        for row in tokens:
            self._check_tokens(row)
        engine, (batch, length) = self.engine, np.shape(tokens)
        self._check_length(length, 0)
        rows = [*tokens, *[[0] * length] * (engine.rows(batch) - batch)]
        chunks = engine.chunks(steps.logits, rows, sum(loop.chunk_sizes(length)))
        with waiting.compilation("Computing logits"):
            parts = [np.asarray(logits)[:batch, : count_B[0]] for logits, count_B, _ in chunks]
        if not all(tensor_values.are_finite(part) for part in parts):
            raise loop.NotFiniteError
        return np.concatenate(parts, axis=1)

    @arguments.checked(**_KINDS, top_logprobs=arguments.integer(0))
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        top_logprobs: int = 0,
        **sampling: Any,
    ) -> Generation:
        """Continue a prompt.

        Args:
          prompt: text or token ids. Text is tokenized unchanged; see `encode_chat` for chats.
          max_tokens: maximum number of new tokens.
          stop: strings that end the text and are not part of it.
          top_logprobs: number of most probable tokens to report for each token.
          sampling: fields of `SamplingParams`: temperature, top_k, top_p, min_p, seed, penalties.

        Raises:
          ValueError: an argument is invalid, the prompt is too long for the model, or it is text
            and there is no tokenizer.
          NotFiniteError: the model's logits are not finite.
        """
        return self._run(prompt, max_tokens, stop, top_logprobs, sampling).finish()

    @arguments.checked(**_KINDS)
    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """The text of `generate` in pieces of whole characters, without parts of stop strings."""
        if self.tokenizer is None:
            raise ValueError(
                "This checkpoint has no tokenizer.json, so there is no text to stream."
            )
        return self._run(prompt, max_tokens, stop, 0, sampling).pieces()

    def _run(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        stop: str | Sequence[str],
        top_logprobs: int,
        sampling: dict[str, Any],
    ) -> "_Run":
        tokens = self._encode(prompt)
        self._check_tokens(tokens)
        if top_logprobs > self.config.vocab_size:
            raise ValueError(
                f"top_logprobs is {shown(top_logprobs)}; it must be 0 to the vocabulary's size."
            )
        room = self._check_length(len(tokens), 1)
        if stop and self.tokenizer is None:
            raise ValueError("This checkpoint has no tokenizer.json, so there is no text to stop.")
        stops = StopStrings(stop)
        params = SamplingParams(**sampling)
        return _Run(self, tokens, min(max_tokens, room), stops, top_logprobs, params)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("This checkpoint has no tokenizer.json; pass the prompt as token ids.")
        return self.tokenizer.encode(prompt)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("The prompt is empty; pass at least one token.")
        for at, token in enumerate(tokens):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"Token {shown(token)} at position {at} is outside the vocabulary of "
                    f"{self.config.vocab_size}."
                )

    def _check_length(self, length: int, new: int) -> int:
        """The room for new tokens after `length`; raises if it is less than `new`."""
        limit = self.config.max_position_embeddings
        if length + new > limit:
            raise ValueError(
                f"The prompt has {length} tokens; the model's context holds {limit}, "
                "including the answer. Shorten the prompt."
            )
        return limit - length


class _Run:
    """A generation in progress: tokens from the engine, text from the tokenizer."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: list[int],
        max_tokens: int,
        stops: StopStrings,
        top_logprobs: int,
        params: SamplingParams,
    ) -> None:
        self._start = time.perf_counter()
        self._model, self._stops = model, stops
        self._decoder = StreamDecoder(model.tokenizer) if model.tokenizer else None
        self._blocks = model.engine.run([prompt], [params], [max_tokens], top_logprobs=top_logprobs)
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason = "length"
        self._first = 0.0

    def pieces(self) -> Iterator[str]:
        """Pieces of text as they are generated."""
        for tokens in self._tokens():
            self._first = self._first or time.perf_counter()
            for token in tokens:
                self.tokens.append(token)
                if token.id in self._model.config.eos_token_ids:
                    self.finish_reason = "stop"
                    break
                piece, stopped = self._stops.push(
                    self._decoder.push(token.id) if self._decoder else ""
                )
                if piece:
                    yield piece
                if stopped:
                    self.finish_reason = "stop"
                    return
        piece, stopped = self._stops.push(self._decoder.flush() if self._decoder else "")
        if stopped:
            self.finish_reason = "stop"
        else:
            piece += self._stops.flush()
        if piece:
            yield piece

    def _tokens(self) -> Iterator[list[Token]]:
        """New tokens as they are generated; terminals and notebooks show the wait for them."""
        task: str | None = "Reading the prompt"
        while True:
            with waiting.compilation(task):
                block = next(self._blocks, None)
            if block is None:
                return
            yield block[0]
            task = None

    def finish(self) -> Generation:
        """Run to the end."""
        text = "".join(self.pieces())
        decode_seconds = time.perf_counter() - self._first
        decoded = len(self.tokens) - 1
        return Generation(
            text=text,
            tokens=[token.id for token in self.tokens],
            logprobs=[token.logprob for token in self.tokens],
            top_logprobs=[token.top for token in self.tokens],
            finish_reason=self.finish_reason,
            timings=Timings(
                prefill_seconds=self._first - self._start,
                decode_seconds=decode_seconds,
                tokens_per_second=decoded / decode_seconds if decoded else 0.0,
            ),
        )
