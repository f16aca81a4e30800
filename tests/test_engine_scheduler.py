"""The engine's step, on a device that knows which tokens each entry was computed from.

An entry is a hash of all tokens up to its own, of the adapter and of the salt; it is negative where
a step has computed it, and positive where prefill has. What a row reads must be exactly that.
"""

import array
import collections
import dataclasses
import functools
import itertools
import math
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import core
from v4jax.engine.core import Core
from v4jax.engine.memory import Memory
from v4jax.engine.pages import Pages
from v4jax.engine.prefix import Prefix
from v4jax.engine.programs import STEPS
from v4jax.engine.request import Constraint, Event, Request
from v4jax.engine.scheduler import Chunk, Scheduler
from v4jax.engine.sequence import BLOCK, IDLE, Sequence
from v4jax.engine.store import Store
from v4jax.model.cache import SPARE

VOCAB, TOP, CONTEXT = 64, 2, 6 * BLOCK


def follow(entry: int, token: int) -> int:
    return hash((entry, token)) & (2**62 - 1) | 1


@functools.cache
def prompt_entries(tokens: tuple[int, ...], adapter: str | None, salt: str) -> list[int]:
    root = zlib.crc32(repr((adapter, salt)).encode())
    return [*itertools.accumulate(tokens, follow, initial=root)][1:]


def entries_of(request: Request, tokens: list[int]) -> list[int]:
    """Entries of a prompt and the tokens after it."""
    entries = prompt_entries(tuple(request.tokens), request.adapter, request.salt)
    answer = itertools.accumulate(tokens[len(entries) :], follow, initial=entries[-1])
    return entries + [-entry for entry in answer][1:]


def draw(entry: int, mask_W: np.ndarray | None = None) -> int:
    """The token after an entry."""
    entry = abs(entry)
    allowed = range(VOCAB)
    if mask_W is not None:
        allowed = [token for token in allowed if mask_W[token // 32] >> (token % 32) & 1]
    return allowed[entry % len(allowed)]


def is_fault(request: Request, entry: int) -> bool:
    """Whether the logits after an entry are not finite."""
    return request.salt == "faults" and entry % 50 == 0


def logprob(entry: int, token: int) -> float:
    return -(follow(abs(entry), token) % 1024) / 64


def answer_of(request: Request) -> tuple[list[int], str]:
    """The tokens of a request that runs alone, and why it ends."""
    tokens = [*request.tokens]
    watcher = request.watcher and request.watcher()
    constraint = request.constraint and request.constraint()
    for _ in range(request.max_tokens):
        try:
            entry = entries_of(request, tokens)[-1]
            if is_fault(request, entry):
                return tokens[len(request.tokens) :], "error"
            tokens.append(draw(entry, constraint.mask() if constraint else None))
            if tokens[-1] in request.stop_tokens or (watcher and watcher.push(tokens[-1])):
                return tokens[len(request.tokens) :], "stop"
            if constraint:
                constraint.push(tokens[-1])
        except ArithmeticError:
            return tokens[len(request.tokens) :], "error"
    return tokens[len(request.tokens) :], "length"


class Pair:
    """Ends the text after two equal tokens."""

    last: int | None = None

    def push(self, token: int) -> bool:
        self.last, before = token, self.last
        return token == before


class Wakes:
    """After a multiple of 8, three tokens have to be odd ones below 16."""

    rest = 0

    def mask(self) -> np.ndarray | None:
        return np.array([0xAAAA, 0], np.uint32) if self.rest else None

    def push(self, token: int) -> None:
        assert not self.rest or (token < 16 and token % 2)
        self.rest = 3 if token % 8 == 0 else max(0, self.rest - 1)


class Breaks(Wakes):
    """Raises an error after its 20th token."""

    count = 0

    def mask(self) -> np.ndarray | None:
        return super().mask() if self.count < 20 else np.full(1, 1 // 0)

    def push(self, token: int) -> None:
        super().push(token)
        self.count += 1


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stops": {"stop_tokens": (3, 4)},
    "watched": {"watcher": Pair},
    "held": {"constraint": Wakes},
    "broken": {"constraint": Breaks},
    "penalised": {"sampling": SamplingParams(presence_penalty=1)},
    "penalised and held": {
        "sampling": SamplingParams(repetition_penalty=2),
        "constraint": Wakes,
        "stop_tokens": (7,),
    },
    "scored": {"prompt_logprobs": True, "top_logprobs": 1},
}


@dataclasses.dataclass
class Row:
    """A row in a call: its tokens, the drafts that follow them, and how many tokens may follow."""

    sequence: Sequence
    tokens: list[int]
    drafts: list[int]
    left: int


class Device:
    """What `core` and `memory` call, with lists of entries for pages and rings.

    Attributes:
      chunks, advanced: chunks read, and rows advanced, since `begin` was called.
      drafted, accepted: drafts that were verified and that were right, by sequence.
    """

    def __init__(self, rows: int, pages: Pages, page: int, width: int, accuracy: int) -> None:
        self.width, self.accuracy, self.page, self.pages = width, accuracy, page, pages
        self.entries = [[0] * page for _ in range(pages.count)]
        self.rings: list[list[int]] = [[] for _ in range(rows)]
        self.counts: list[list[int]] = [[] for _ in range(rows)]
        self.drafted = collections.Counter[Sequence]()
        self.accepted = collections.Counter[Sequence]()

    def begin(self, scheduler: Scheduler, chunk: int, interval: int) -> None:
        """Expect a step: its chunk has at most `chunk` tokens and crosses no interval."""
        self.scheduler, self.most, self.interval = scheduler, chunk, interval
        self.chunks, self.advanced = 0, 0

    def read(self, sequence: Sequence) -> list[int]:
        """The entries of a row's tokens, which are in its pages and rings."""
        for page in range(1, self.pages.count):
            if not self.pages.references(page):
                self.entries[page] = [0] * self.page
        expected = entries_of(sequence.request, sequence.tokens)
        pages = itertools.chain(*(self.entries[page] for page in sequence.pages))
        assert [*itertools.islice(pages, sequence.length)] == expected[: sequence.length]
        if sequence.length:
            ring = self.rings[sequence.row]
            assert ring[: sequence.length] == expected[: sequence.length]
            assert len(ring) - sequence.length <= (SPARE if sequence.sampled else 0)
        if sequence.penalised:
            assert self.counts[sequence.row] == sequence.tokens
        return expected

    def write(self, sequence: Sequence, start: int, entries: list[int]) -> None:
        """Write entries to pages that no other row has, or to scratch, and to the rings."""
        for position, entry in enumerate(entries, start):
            index = position // self.page
            page = sequence.pages[index] if index < len(sequence.pages) else 0
            self.entries[page][position % self.page] = entry
        pages = sequence.pages[start // self.page :]
        assert not any({*pages} & {*s.pages} for s in self.scheduler.running if s is not sequence)
        self.rings[sequence.row] = self.rings[sequence.row][:start] + entries

    def read_chunk(self, chunk: Chunk, mask_W: np.ndarray | None) -> Any:
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        self.check(chunk)
        self.chunks += 1
        entries = self.read(sequence)
        self.write(sequence, start, entries[start:end])
        sampled, draft_1k = outputs(1, 1), np.zeros((1, self.width - 1), np.int32)
        if chunk.last and sequence.left:
            row = Row(sequence, [*sequence.tokens], [], sequence.left)
            sample(row, entries[-1], mask_W, (sampled, 0, 0))
            draft_1k[0] = self.propose(row, self.width - 1)
            self.counts[sequence.row] = row.tokens
        scores = None
        if sequence.request.prompt_logprobs:
            pairs = zip(entries[start:end], [*sequence.tokens[start + 1 :], 0], strict=False)
            logprob_T = np.array([logprob(*pair) for pair in pairs])
            top_TN = np.stack([logprob_T] * TOP, axis=1)
            scores = SimpleNamespace(logprob_T=logprob_T, top_id_TN=top_TN, top_logprob_TN=top_TN)
        return sampled, draft_1k, scores

    def check(self, chunk: Chunk) -> None:
        """Check that a chunk is the step's first, of the sizes that it may have, and in order."""
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        assert not self.chunks
        assert sequence.length == start
        assert start % BLOCK == 0
        if chunk.narrow:
            assert (start, end) == (sequence.reusable, sequence.prompt)
        else:
            assert chunk.count % BLOCK == 0
            assert chunk.count <= self.most
            assert end <= sequence.reusable
        assert not start < sequence.known * BLOCK < end
        assert (end - 1) // self.interval == start // self.interval
        others = [s for s in self.scheduler.running if s is not sequence]
        assert all(s.rank > sequence.rank for s in others if s.state == "prefill")
        assert not (sequence.is_idle and (others or self.scheduler.waiting))

    def propose(self, row: Row, count: int) -> list[int]:
        """Drafts after a row's tokens, of which some are right."""
        drafts: list[int] = []
        for _ in range(count):
            entry = abs(entries_of(row.sequence.request, row.tokens + drafts)[-1])
            wrong = entry // VOCAB % 4 >= self.accuracy
            drafts.append((draw(entry) + wrong) % VOCAB)
        return drafts

    def advance(
        self, sequences: list[Sequence], masks: dict[int, Any], steps: int, *, drafting: bool
    ) -> Any:
        assert len({sequence.request.adapter for sequence in sequences}) == 1
        k = self.width - 1 if drafting else 0
        self.advanced += len(sequences)
        takes_drafts = lambda s: k > 0 and not s.rest and s.row not in masks
        rows: dict[int, Row] = {}
        for s in sequences:
            self.read(s)
            rows[s.row] = Row(s, [*s.tokens], s.drafts if takes_drafts(s) else [], s.left)
        sampled, draft_Bk = outputs(len(self.rings), STEPS * (1 + k)), {}
        n = 0
        while n < min(steps, STEPS) and all(row.left > 0 for row in rows.values()):
            for slot, row in rows.items():
                self.step(row, masks.get(slot), (sampled, slot, n * (1 + k)))
                draft_Bk[slot] = self.propose(row, k)
                row.drafts = draft_Bk[slot] if takes_drafts(row.sequence) else []
            n += 1
        for slot, row in rows.items():
            self.counts[slot] = row.tokens
        blank = [0] * k
        drafts = [draft_Bk.get(slot, blank) for slot in range(len(self.rings))]
        return sampled, np.array(drafts, np.int32).reshape(len(self.rings), k), n

    def step(self, row: Row, mask_W: np.ndarray | None, place: tuple[Any, int, int]) -> None:
        """Run a row's newest token and its drafts, and sample while they are right."""
        sequence, start = row.sequence, len(row.tokens) - 1
        entries = entries_of(sequence.request, row.tokens + row.drafts)[start:]
        self.write(sequence, start, entries)
        sampled, slot, at = place
        for i, entry in enumerate(entries):
            sample(row, entry, mask_W, (sampled, slot, at + i))
            if row.left <= 0 or row.tokens[-1:] != row.drafts[i : i + 1]:
                break
        # What was accepted is in the row's own pages.
        assert len(row.tokens) - 1 <= len(sequence.pages) * self.page
        if row.drafts:
            self.drafted[sequence] += len(row.drafts)
            self.accepted[sequence] += len(row.tokens) - 2 - start

    def fetch(self, outputs: Any) -> Any:
        return outputs

    def set_counts(self, sequence: Sequence) -> None:
        self.counts[sequence.row] = [*sequence.tokens]

    def copy_page(self, source: int, target: int) -> None:
        self.entries[target] = [*self.entries[source]]

    def read_page(self, page: int, blocks: int) -> list[bytes]:
        starts = range(0, blocks * BLOCK, BLOCK)
        return [array.array("q", self.entries[page][i : i + BLOCK]).tobytes() for i in starts]

    def write_block(self, page: int, position: int, block: bytes) -> None:
        self.entries[page][position * BLOCK : (position + 1) * BLOCK] = self.unpack(block)

    def snapshot(self, row: int, length: int) -> list[int]:
        assert len(self.rings[row]) == length
        return [*self.rings[row]]

    def restore(self, row: int, length: int, snapshot: list[int]) -> None:
        assert len(snapshot) == length
        self.rings[row] = [*snapshot]

    def pack(self, snapshot: list[int]) -> bytes:
        return array.array("q", snapshot).tobytes()

    def unpack(self, content: bytes) -> list[int]:
        return array.array("q", content).tolist()

    def save(self, sequence: Sequence) -> Any:
        pages = [[*self.entries[page]] for page in sequence.pages]
        return self.rings[sequence.row][: sequence.length], pages

    def resume(self, row: int, sequence: Sequence) -> None:
        self.rings[row], pages = sequence.saved
        for page, entries in zip(sequence.pages, pages, strict=False):
            assert self.pages.references(page) == 1
            self.entries[page] = entries


def outputs(rows: int, tokens: int) -> Any:
    """A call's tokens, none of them real."""
    zeros = lambda dtype, *more: np.zeros((rows, tokens, *more), dtype)
    return SimpleNamespace(
        real_BT=zeros(bool),
        token_BT=zeros(np.int32),
        logprob_BT=zeros(np.float32),
        top_id_BTN=zeros(np.int32, TOP),
        top_logprob_BTN=zeros(np.float32, TOP),
    )


def sample(row: Row, entry: int, mask_W: np.ndarray | None, place: tuple[Any, int, int]) -> None:
    """Sample the token after an entry, report it at a place of a call's outputs, and add it."""
    sampled, *at = place
    token, request = draw(entry, mask_W), row.sequence.request
    failed = is_fault(request, entry)
    sampled.real_BT[*at], sampled.token_BT[*at] = True, token
    sampled.logprob_BT[*at] = math.nan if failed else logprob(entry, token)
    sampled.top_id_BTN[*at] = token
    row.tokens.append(token)
    row.left = 0 if failed or token in request.stop_tokens else row.left - 1


class Engine:
    """A core, its device, and all that was asked of it."""

    def __init__(
        self,
        *,
        rows=2,
        n=2,
        extra=0,
        width=1,
        accuracy=2,
        chunk=256,
        interval=512,
        snapshots=8,
        ram=0,
    ) -> None:
        """`n` blocks a page; `extra` pages beyond those of one sequence; bytes of RAM, if any."""
        self.pages = Pages(2 + (CONTEXT // BLOCK - 1) // n + extra)
        self.prefix, self.n = Prefix(self.pages, n, snapshots, "model"), n
        self.device: Any = Device(rows, self.pages, n * BLOCK, width, accuracy)
        self.memory = Memory(
            self.device,
            self.pages,
            self.prefix,
            Store(ram, "model") if ram else None,
            {None: "base", "a": "adapted"},
            interval=interval,
        )
        self.limits = chunk, interval
        self.scheduler = Scheduler(self.memory, rows=rows, chunk=chunk, width=width)
        self.core = Core(self.scheduler, self.memory, self.device)
        self.events: dict[Sequence, list[Event]] = {}

    def submit(self, request: Request, notify: Any = None) -> Sequence:
        events: list[Event] = []
        sequence = Sequence.of(request, notify or events.append, {})
        sequence.keys = self.memory.keys(request)
        self.events[sequence] = events
        self.core.add(sequence)
        return sequence

    def step(self, pace: int = 1) -> None:
        """Step, and check what holds of every step."""
        ready = [s for s in self.scheduler.running if s.state == "decode" and not s.cancelled]
        before = [len(sequence.tokens) for sequence in ready]
        self.device.begin(self.scheduler, *self.limits)
        self.core._pace = pace
        self.core.step()
        for sequence, tokens in zip(ready, before, strict=True):
            has_left = sequence.state in ("waiting", "ended")
            assert has_left or len(sequence.tokens) > tokens, "a row has not advanced"
        has_work = any(sequence.state != "ended" for sequence in self.events)
        assert self.device.chunks or self.device.advanced or not has_work, "nothing happens"

    def drain(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(3000):
            if not self.core.busy:
                return
            self.step()
        pytest.fail("a sequence does not end")

    def ask(self, *requests: Request) -> list[Sequence]:
        """Run requests together to their ends, and all that they leave to do."""
        sequences = [self.submit(request) for request in requests]
        self.drain()
        for sequence in sequences:
            self.check(sequence)
        return sequences

    def check(self, sequence: Sequence) -> None:
        """Check all that was reported of a sequence that has ended."""
        events, request, usage = self.events[sequence], sequence.request, sequence.usage
        tokens = [token for event in events for token in event.tokens]
        expected, finish = answer_of(request)
        ids = [token.id for token in tokens]
        assert [bool(event.finish) for event in events] == [False] * (len(events) - 1) + [True]
        if events[-1].finish == "abort":
            assert sequence.cancelled
            assert ids == expected[: len(ids)]
        else:
            assert (ids, events[-1].finish) == (expected, finish)
        entries = entries_of(request, [*request.tokens, *ids])[sequence.prompt - 1 :]
        for token, entry in zip(tokens, entries, strict=False):
            assert token.logprob == logprob(entry, token.id)
            assert token.top == ((token.id, 0.0),) * request.top_logprobs
        prompt = [token for event in events for token in event.prompt]
        if request.prompt_logprobs and finish and (ids or not events[-1].finish == "abort"):
            entries = entries_of(request, [*request.tokens])
            assert [token.id for token in prompt] == [*request.tokens]
            scores = [logprob(*pair) for pair in zip(entries, request.tokens[1:], strict=False)]
            assert [token.logprob for token in prompt[1:]] == scores
        counted = sequence.prompt, len(ids)
        assert (usage.prompt_tokens, usage.completion_tokens) == counted
        assert events[-1].usage == usage
        drafts = self.device.drafted[sequence], self.device.accepted[sequence]
        assert (usage.drafted_tokens, usage.accepted_tokens) == drafts
        assert usage.cached_tokens % BLOCK == 0
        assert usage.cached_tokens <= (0 if request.prompt_logprobs else sequence.reusable)


class Machine(RuleBasedStateMachine):
    """Requests of all kinds come, run, make way, are cancelled and end."""

    @initialize(
        sizes=st.fixed_dictionaries(
            {
                "rows": st.integers(1, 3),
                "n": st.sampled_from([1, 2, 4]),
                "extra": st.integers(0, 4),
                "width": st.integers(1, 3),
                "accuracy": st.integers(0, 4),
                "chunk": st.sampled_from([BLOCK, 2 * BLOCK]),
                "interval": st.sampled_from([2 * BLOCK, 3 * BLOCK, 8 * BLOCK]),
                "snapshots": st.sampled_from([1, 3, 9]),
                "ram": st.sampled_from([0, 10_000, 10**7]),
            }
        )
    )
    def create(self, sizes):
        self.engine = Engine(**sizes)

    @rule(
        blocks=st.lists(st.sampled_from([0, 0, 1]), max_size=4),
        tail=st.sampled_from([1, 2, 100, 128]),
        limit=st.sampled_from([0, 1, 5, 40, 150, CONTEXT]),
        kind=st.sampled_from(sorted(KINDS)),
        root=st.sampled_from([*[(None, "")] * 4, ("a", ""), (None, "b"), (None, "faults")]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def submit(self, blocks, tail, limit, kind, root, priority):
        tokens = [*itertools.chain(*([block] * BLOCK for block in blocks)), *[2] * tail]
        request = Request(
            tokens=tuple(tokens),
            max_tokens=min(limit, CONTEXT - len(tokens)),
            adapter=root[0],
            salt=root[1],
            priority=priority,
            **KINDS[kind],
        )
        self.engine.submit(request)

    @precondition(lambda self: self.engine.events)
    @rule(place=st.integers(0, 99), tail=st.sampled_from([1, 100]))
    def follow_up(self, place, tail):
        """Continue a conversation."""
        before = [*self.engine.events][place % len(self.engine.events)]
        tokens = (*before.tokens, *[3] * tail)
        if before.state == "ended" and len(tokens) < CONTEXT:
            self.engine.submit(dataclasses.replace(before.request, tokens=tokens, max_tokens=1))

    @precondition(lambda self: self.engine.events)
    @rule(place=st.integers(0, 99))
    def cancel(self, place):
        [*self.engine.events][place % len(self.engine.events)].cancelled = True

    @rule(count=st.sampled_from([1, 2, 10, 50]), pace=st.sampled_from([1, 3, STEPS]))
    def run(self, count, pace):
        for _ in range(count):
            self.engine.step(pace)

    @invariant()
    def rows_and_pages_have_their_owners(self):
        if not hasattr(self, "engine"):
            return
        engine, running = self.engine, self.engine.scheduler.running
        assert len({sequence.row for sequence in running}) == len(running)
        for page in range(1, engine.pages.count):
            owners = sum(page in sequence.pages for sequence in running)
            assert engine.pages.references(page) - owners in (0, 1)
        waiting = engine.scheduler.waiting
        users = [s for s in running if not s.is_idle]

    @invariant()
    def published_blocks_are_those_of_their_prompts(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for sequence in engine.events:
            entries = entries_of(sequence.request, [*sequence.request.tokens])
            for i, key in enumerate(sequence.keys):
                if (page := engine.prefix.page_of(key)) is not None:
                    start = i % engine.n * BLOCK
                    block = engine.device.entries[page][start : start + BLOCK]
                    assert block == entries[i * BLOCK : (i + 1) * BLOCK]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.drain()
        for sequence in engine.events:
            engine.check(sequence)
        usage = engine.memory.usage()
        assert usage["pages_used"] == usage["pages_cached"]
        engine.prefix.evict(engine.pages.count)
        assert engine.pages.free == engine.pages.count - 1


Machine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestRequestsShareAnEngine = Machine.TestCase
