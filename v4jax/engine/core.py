"""The engine's step: schedule, run, commit."""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from v4jax.decoding import sampling
from v4jax.engine.arrays import Drafting, Sampled, Scores
from v4jax.engine.device import Device
from v4jax.engine.memory import Memory
from v4jax.engine.programs import STEPS
from v4jax.engine.request import Event, FinishReason, Request, Token
from v4jax.engine.scheduler import Chunk, Scheduler
from v4jax.engine.sequence import IDLE, Sequence
from v4jax.model.cache import SPARE

_log = logging.getLogger("v4jax.engine")
# Seconds that a call of the device should take while no prompt waits: tokens come at this pace.
_CALL_SECONDS = 0.03
# Answers that wait to be sealed, at most: while there is always other work, the oldest are dropped.
_SEALS = 64


@dataclasses.dataclass
class Counters:
    """Work done since the start.

    Attributes:
      prompt_tokens, cached_tokens, generated_tokens: of all requests that have ended.
      drafted_tokens, accepted_tokens: drafts, and those that were right.
      steps, chunks: steps of rows, and chunks of prompts.
      corrupted: requests that ended because their logits were not finite.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    chunks: int = 0
    corrupted: int = 0


class Core:
    """Runs sequences to their ends, step by step, on the caller's thread."""

    def __init__(self, scheduler: Scheduler, memory: Memory, device: Device) -> None:
        self.counters = Counters()
        self.scheduler, self.memory, self.device = scheduler, memory, device
        self._orders = itertools.count()
        self._pace = 1

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running or self.scheduler.idle)

    @property
    def answering(self) -> bool:
        """Whether a request waits or runs; else there is at most the prefix cache to fill."""
        scheduler = self.scheduler
        return bool(scheduler.waiting) or any(not s.is_idle for s in scheduler.running)

    def sequence(self, request: Request, notify: Callable[[Event], object]) -> Sequence:
        """A sequence for a request that is submitted now; see `Engine.submit`. On any thread."""
        vocab = self.device.static.cfg.vocab_size
        sequence = Sequence.of(request, notify, sampling.settings([request.sampling], vocab))
        sequence.submitted = time.perf_counter()
        sequence.keys = self.memory.keys(request)
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.order = next(self._orders)
        self.scheduler.add(sequence)

    def step(self) -> None:
        """Read chunks of prompts, advance the rows, and report what they sampled."""
        for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
            if sequence.cancelled or sequence.failed or _is_sealed(sequence):
                self.end(sequence, "error" if sequence.failed else "abort")
        plan = self.scheduler.plan(self._pace)
        for sequence in plan.admitted:
            self._enter(sequence)
        began, read = time.perf_counter(), None
        if plan.chunks:
            ends = [chunk.sequence for chunk in plan.chunks if chunk.last]
            masks = {s.group: mask_W for s in ends if (mask_W := _mask(s)) is not None}
            read = self.device.read_chunks(plan.chunks, masks)
        # The device reads chunks while masks are computed here.
        calls = [(alike, self._advance(alike, plan.steps)) for alike in _by_adapter(plan.rows)]
        if read is not None:
            outputs = self.device.fetch(read)
            for chunk in plan.chunks:
                self._commit_chunk(chunk, *outputs)
        for alike, outputs in calls:
            sampled, drafting, steps, expert_BTLA = self.device.fetch(outputs)
            self.counters.steps += int(steps)
            for sequence in alike:
                self._commit_row(sequence, sampled, drafting, expert_BTLA)
            if not plan.chunks and len(calls) == 1:
                self._set_pace((time.perf_counter() - began) / int(steps))

    def end(self, sequence: Sequence, finish: FinishReason, tokens: tuple[Token, ...] = ()) -> None:
        """End a sequence and report it."""
        self.scheduler.end(sequence)
        usage, counters = sequence.usage, self.counters
        usage.seconds = time.perf_counter() - sequence.submitted
        if not sequence.is_idle:
            counters.prompt_tokens += usage.prompt_tokens
            counters.cached_tokens += usage.cached_tokens
            counters.generated_tokens += usage.completion_tokens
        if finish in ("stop", "length"):
            self._seal(sequence)
        _report(sequence, tokens, finish)

    def _enter(self, sequence: Sequence) -> None:
        """Prepare a row for a sequence that has been admitted."""
        usage = sequence.usage
        usage.queued_seconds = usage.queued_seconds or time.perf_counter() - sequence.submitted
        if sequence.penalised:
            self.device.set_counts(sequence)

    def _advance(self, rows: list[Sequence], steps: int) -> Any:
        """Start a call that advances rows of one adapter; its outputs."""
        masks: dict[int, Any] = {}
        for sequence in rows:
            if (mask_W := _mask(sequence)) is not None:
                masks[sequence.row or 0] = mask_W
        if any(sequence.constraint for sequence in rows):
            # What follows the token that wakes a constraint is taken back.
            steps = 1 if masks else min(steps, SPARE // self.device.width)
        return self.device.advance(rows, masks, steps)

    def _commit_chunk(
        self,
        chunk: Chunk,
        sampled: Sampled,
        draft_Gk: Any,
        scores: Scores | None,
        expert_GTLA: Any,
    ) -> None:
        """Record a chunk, and the first token if it ended the prompt."""
        sequence = chunk.sequence
        self.counters.chunks += 1
        self.scheduler.finish_chunk(chunk)
        if chunk.start == 0:
            # Of a row that made way while its prompt was read.
            sequence.scores.clear()
            sequence.experts.clear()
        if scores is not None and sequence.request.prompt_logprobs:
            sequence.scores += _scored(sequence, chunk, scores)
        if sequence.request.routed_experts:
            sequence.experts.append(expert_GTLA[sequence.group, : chunk.count].copy())
        if not chunk.last:
            return
        sequence.usage.first_token_seconds = time.perf_counter() - sequence.submitted
        if sequence.scores:
            _report(sequence, (), prompt=tuple(sequence.scores))
        if sequence.left:
            group = sequence.group
            tokens = [*_tokens(sampled, group, sequence.request)]
            self._accept(sequence, tokens, draft_Gk[group].tolist(), expert_GTLA[group, :0])
        else:
            self.end(sequence, "length")

    def _commit_row(
        self, sequence: Sequence, sampled: Sampled, drafting: Drafting, expert_BTLA: Any
    ) -> None:
        """Record what a call sampled for a row."""
        row = sequence.row or 0
        for usage in (sequence.usage, self.counters):
            usage.drafted_tokens += int(drafting.drafted_B[row])
            usage.accepted_tokens += int(drafting.right_B[row])
        sequence.acceptance = float(drafting.share_B[row])
        sequence.rest = int(drafting.rest_B[row])
        drafts = drafting.draft_Bk[row].tolist() if drafting.count_B[row] else []
        tokens = [*_tokens(sampled, row, sequence.request)]
        self._accept(sequence, tokens, drafts, expert_BTLA[row, sampled.real_BT[row]])

    def _accept(
        self, sequence: Sequence, tokens: list[Token], drafts: list[int], expert_TLA: Any
    ) -> None:
        """Add sampled tokens to a sequence, up to its end or to what wakes its constraint.

        `expert_TLA` are the experts chosen for those of the tokens before them that were read now.
        """
        finish: FinishReason | None = None
        accepted: list[Token] = []
        with _guarded(sequence):
            for token in tokens if not sequence.failed else ():
                if math.isnan(token.logprob):
                    self.counters.corrupted += 1
                    finish = "error"
                    break
                sequence.tokens.append(token.id)
                accepted.append(token)
                if finish := _finish(sequence, token.id):
                    break
                if sequence.constraint:
                    sequence.constraint.push(token.id)
                    if len(accepted) < len(tokens) and sequence.constraint.mask() is not None:
                        break
        finish = "error" if sequence.failed else finish
        taken_back = len(accepted) < len(tokens) and not finish
        sequence.length = len(sequence.tokens) - 1
        if sequence.request.routed_experts:
            sequence.experts.append(expert_TLA[: len(accepted)])
        sequence.drafts = [] if taken_back else drafts
        if taken_back and sequence.penalised:
            self.device.set_counts(sequence)
        sequence.usage.completion_tokens = sequence.sampled
        if finish:
            self.end(sequence, finish, tuple(accepted))
        else:
            _report(sequence, tuple(accepted))

    def _set_pace(self, seconds: float) -> None:
        """Choose the steps of the next call from the seconds of a step."""
        self._pace = max(1, min(int(_CALL_SECONDS / seconds), 2 * self._pace, STEPS))

    def _seal(self, sequence: Sequence) -> None:
        """Compute an answer's blocks by prefill while nothing else runs, so that they are known."""
        request = sequence.request
        if sequence.is_idle:
            return
        sealed = dataclasses.replace(
            request,
            tokens=sequence.tokens,
            max_tokens=0,
            watcher=None,
            constraint=None,
            prompt_logprobs=False,
            routed_experts=False,
            priority=IDLE,
        )
        following = Sequence.of(sealed, lambda _: None, sequence.settings)
        if following.reusable > sequence.reusable:
            following.keys = self.memory.keys(sealed, sequence.keys)
            self.add(following)
            for oldest in self.scheduler.idle[:-_SEALS]:
                self.end(oldest, "overload")


@contextlib.contextmanager
def _guarded(sequence: Sequence) -> Iterator[None]:
    """Lets an error in what came with a request end that request only."""
    try:
        yield
    except Exception as error:
        sequence.failed = True
        _log.warning("Request %d ends, because of %r.", sequence.order, error)


def _report(
    sequence: Sequence,
    tokens: tuple[Token, ...],
    finish: FinishReason | None = None,
    prompt: tuple[Token, ...] = (),
) -> None:
    usage, expert_TLA = dataclasses.replace(sequence.usage), None
    if finish and sequence.experts:
        expert_TLA = np.concatenate(sequence.experts)
    with _guarded(sequence):
        sequence.notify(Event(tokens, finish, usage, prompt, expert_TLA))


def _mask(sequence: Sequence) -> Any:
    """Bitmask of the tokens that a sequence may sample next; None if it may sample any."""
    with _guarded(sequence):
        return sequence.constraint.mask() if sequence.constraint else None


def _is_sealed(sequence: Sequence) -> bool:
    """Whether a sequence that only fills the prefix cache has done so."""
    return sequence.is_idle and sequence.state == "prefill" and sequence.length >= sequence.reusable


def _by_adapter(sequences: list[Sequence]) -> list[list[Sequence]]:
    key = lambda sequence: sequence.request.adapter or ""
    return [[*group] for _, group in itertools.groupby(sorted(sequences, key=key), key)]


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    """Why a sequence ends with this token, if it does."""
    if token in sequence.request.stop_tokens:
        return "stop"
    if sequence.watcher and sequence.watcher.push(token):
        return "stop"
    return None if sequence.left > 0 else "length"


def _tokens(sampled: Sampled, row: int, request: Request) -> Iterator[Token]:
    """The tokens that were sampled for a row."""
    for at in sampled.real_BT[row].nonzero()[0]:
        ids = sampled.top_id_BTN[row, at, : request.top_logprobs].tolist()
        logprobs = sampled.top_logprob_BTN[row, at, : request.top_logprobs].tolist()
        token, logprob = int(sampled.token_BT[row, at]), float(sampled.logprob_BT[row, at])
        yield Token(token, logprob, tuple(zip(ids, logprobs, strict=True)))


def _scored(sequence: Sequence, chunk: Chunk, scores: Scores) -> list[Token]:
    """The prompt's tokens after each of a chunk, and before them its very first."""
    group, top = sequence.group, sequence.request.top_logprobs
    tokens = [] if chunk.start else [Token(sequence.tokens[0], math.nan)]
    for i in range(chunk.count - chunk.last):
        ids = scores.top_id_GTN[group, i, :top].tolist()
        alternatives = zip(ids, scores.top_logprob_GTN[group, i, :top].tolist(), strict=True)
        token = sequence.tokens[chunk.start + i + 1]
        tokens.append(Token(token, float(scores.logprob_GT[group, i]), tuple(alternatives)))
    return tokens
