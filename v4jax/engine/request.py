"""What an engine is asked, and what it answers: plain data, without JAX.

Axis letters: T tokens, L layers, A experts per token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int16, UInt32

from v4jax.decoding.sampling import SamplingParams

# 'abort': cancelled. 'error': the row's logits were not finite. 'overload': memory or time ran out.
FinishReason = Literal["stop", "length", "abort", "error", "overload"]


@runtime_checkable
class Watcher(Protocol):
    """Reads a request's tokens and may end it, as stop strings do. Runs on the engine's thread."""

    def push(self, token: int) -> bool:
        """Whether the text ends with this token."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """Restricts a request's next token, as a grammar does. Masks are computed off the event loop.

    A constraint may be dormant: then `mask` is None and any token may follow. A row takes drafts
    only while its constraint is dormant; tokens that follow, within one step, the one that woke the
    constraint are taken back and sampled again under its mask.
    """

    def mask(self) -> UInt32[np.ndarray, " words"] | None:
        """Allowed tokens, bit t % 32 of word t // 32; None if all are."""
        ...

    def push(self, token: int) -> None:
        """Advance by a token that was sampled."""
        ...


class QueueFull(RuntimeError):
    """The engine's queue is full; the request may be sent again later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
      tokens: ids of the prompt, at least one.
      max_tokens: most new tokens; 0 only reads the prompt into the prefix cache.
      sampling: settings of the draws.
      stop_tokens: ids that end the answer and are its last token.
      watcher: creates what may end the answer by its text; None if nothing does.
      constraint: creates what restricts the tokens; None if nothing does.
      top_logprobs: number of most probable tokens to report with each token.
      prompt_logprobs: report log-probabilities of the prompt's tokens; no prefix is then reused.
      routed_experts: report the experts chosen for each token; no prefix is then reused.
      adapter: name of an adapter of the engine; None for the base model.
      salt: prefixes are shared only between requests of the same salt.
      priority: lower ones are served first.
    """

    tokens: Sequence[int]
    max_tokens: int = 256
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stop_tokens: Sequence[int] = ()
    watcher: Callable[[], Watcher] | None = None
    constraint: Callable[[], Constraint] | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    routed_experts: bool = False
    adapter: str | None = None
    salt: str = ""
    priority: int = 0

    @property
    def needs_all(self) -> bool:
        """Whether the whole prompt is read, even if the cache has a prefix of it."""
        return self.prompt_logprobs or self.routed_experts


@dataclasses.dataclass(frozen=True)
class Token:
    """A token with log-probabilities under the raw logits.

    Attributes:
      id: id of the token.
      logprob: its log-probability; NaN for the first token of a prompt.
      top: the most probable tokens there, with their log-probabilities.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass
class Usage:
    """What a request has cost.

    Attributes:
      prompt_tokens: tokens of the prompt.
      cached_tokens: those of them that the prefix cache had.
      completion_tokens: new tokens.
      drafted_tokens, accepted_tokens: drafts that were verified, and those that were right.
      queued_seconds: from submission to admission.
      first_token_seconds: from submission to the first token.
      seconds: from submission to the end.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queued_seconds: float = 0.0
    first_token_seconds: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a request: new tokens, or its end, or both.

    Attributes:
      tokens: new tokens.
      finish: why the request has ended; None while it runs.
      usage: what it has cost so far.
      prompt: the prompt's tokens, once, if their log-probabilities were asked for.
      expert_TLA: at the end, if they were asked for, ids of the experts chosen in each layer for
        each token that the model has read, which are all but the answer's last.
    """

    tokens: tuple[Token, ...]
    finish: FinishReason | None
    usage: Usage
    prompt: tuple[Token, ...] = ()
    expert_TLA: Int16[np.ndarray, "T L A"] | None = None
