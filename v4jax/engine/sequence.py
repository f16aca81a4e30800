"""A request in progress: what has been computed, sampled and sent. Integers, without JAX.

Axis letters: T tokens, L layers, A experts per token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Int16

from v4jax.engine.request import Constraint, Event, Request, Token, Usage, Watcher
from v4jax.model.cache import BLOCK

# Priority of work that only runs while nothing else does.
IDLE = 1 << 30
State = Literal["waiting", "prefill", "decode", "ended"]


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request with its tokens, row and pages.

    Attributes:
      request: what was asked.
      notify: called with each event.
      settings: of its draws, as `v4jax.decoding.sampling.settings` returns them.
      tokens: the prompt, then the sampled tokens; the newest is not in the cache.
      order: number of the request, in order of arrival.
      watcher, constraint: those of the request.
      length: tokens in the cache.
      state: what happens to it next.
      row: its slot on the device; None while it waits.
      group: the group of rows that it has, or had last.
      pages: its pages.
      drafts: drafts of the tokens after the newest.
      keys: of the prompt's reusable blocks.
      known: leading blocks that other requests have computed too, without a snapshot at their end.
      scores: the prompt's tokens with their log-probabilities, if they were asked for.
      experts: the experts chosen for the tokens in the cache, if they were asked for, in parts.
      saved: rings and pages of a row that made way for another.
      cancelled: whether nobody waits for the answer any more.
      failed: whether its watcher, its constraint or `notify` has raised an error.
      acceptance: share of its drafts that were right, recent ones counting more.
      rest: steps for which it takes no drafts, because too few were right.
      submitted: when it was submitted, in the engine's clock.
      usage: what it has cost so far.
    """

    request: Request
    notify: Callable[[Event], object]
    settings: dict[str, Any]
    tokens: list[int]
    order: int = 0
    watcher: Watcher | None = None
    constraint: Constraint | None = None
    length: int = 0
    state: State = "waiting"
    row: int | None = None
    group: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    drafts: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    known: int = 0
    scores: list[Token] = dataclasses.field(default_factory=list)
    experts: list[Int16[np.ndarray, "T L A"]] = dataclasses.field(default_factory=list)
    saved: Any = None
    cancelled: bool = False
    failed: bool = False
    acceptance: float = 1.0
    rest: int = 0
    submitted: float = 0.0
    usage: Usage = dataclasses.field(default_factory=Usage)

    @classmethod
    def of(
        cls, request: Request, notify: Callable[[Event], object], settings: dict[str, Any]
    ) -> "Sequence":
        """A sequence that has not begun."""
        return cls(
            request=request,
            notify=notify,
            settings=settings,
            tokens=[*request.tokens],
            watcher=request.watcher() if request.watcher else None,
            constraint=request.constraint() if request.constraint else None,
            usage=Usage(prompt_tokens=len(request.tokens)),
        )

    @property
    def is_idle(self) -> bool:
        """Whether it only runs while nothing else does."""
        return self.request.priority >= IDLE

    @property
    def penalised(self) -> bool:
        """Whether the counts of its tokens matter."""
        sampling = self.request.sampling
        penalties = sampling.presence_penalty, sampling.frequency_penalty
        return sampling.repetition_penalty != 1 or any(penalties)

    @property
    def prompt(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.request.tokens)

    @property
    def reusable(self) -> int:
        """Leading tokens of the prompt in whole blocks, leaving at least one to compute."""
        return (self.prompt - 1) // BLOCK * BLOCK

    @property
    def limit(self) -> int:
        """Most tokens of the prompt and the answer together."""
        return self.prompt + self.request.max_tokens

    @property
    def sampled(self) -> int:
        """Number of tokens sampled so far."""
        return len(self.tokens) - self.prompt

    @property
    def left(self) -> int:
        """Number of tokens that may still be sampled."""
        return self.limit - len(self.tokens)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the queue: lower is served first."""
        return self.request.priority, self.order
