"""The engine's step on a device of entries: requests get the answers that they would get alone."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.entries import FAULTS, KINDS, Breaks, Device, answer_of, entries_of, logprob, routed
from v4jax.engine import core
from v4jax.engine.core import Core
from v4jax.engine.memory import Memory
from v4jax.engine.pages import Pages
from v4jax.engine.prefix import Prefix
from v4jax.engine.programs import STEPS
from v4jax.engine.request import Event, Request
from v4jax.engine.scheduler import Chunk, Scheduler
from v4jax.engine.sequence import Sequence
from v4jax.engine.store import Store
from v4jax.model.cache import BLOCK

CONTEXT = 6 * BLOCK


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
        groups=1,
    ) -> None:
        """`n` blocks a page; `extra` pages beyond those of one sequence; bytes of RAM, if any.

        There are as many rows and pages in each of the groups.
        """
        rows *= groups
        self.pages = Pages(groups * (2 + (CONTEXT // BLOCK - 1) // n + extra), groups)
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
        sizes = {"rows": rows, "chunk": chunk, "width": width, "groups": groups}
        self.scheduler = Scheduler(self.memory, **sizes)
        self.device.scheduler = self.scheduler
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
        device, scheduler = self.device, self.scheduler
        device.chunks.clear()
        calls = device.calls
        work = [s for s in self.events if s.state != "ended" and not s.cancelled and not s.failed]
        lengths = {s: len(s.tokens) for s in scheduler.running if s.state == "decode" and s in work}
        self.core._pace = pace
        self.core.step()
        assert device.chunks or device.calls > calls or not work, "a request waits for nothing"
        for sequence, length in lengths.items():
            new = len(sequence.tokens) - length
            assert new > 0 or sequence.state in ("waiting", "ended"), "a row waits"
            assert new <= device.width or not device.chunks, "a prompt waits"
        for chunk in device.chunks:
            self.check_chunk(chunk)
            assert not (chunk.sequence.is_idle and work)
        for first, second in itertools.product(scheduler.running, scheduler.waiting):
            is_alike = first.request.priority == second.request.priority
            assert not is_alike or first.order < second.order or self.pages.groups > 1
        assert len({sequence.row for sequence in scheduler.running}) == len(scheduler.running)
        each = self.pages.count // self.pages.groups
        for page in (page for page in range(self.pages.count) if page % each):
            owners = sum(page in sequence.pages for sequence in scheduler.running)
            assert self.pages.references(page) - owners in (0, 1)

    def check_chunk(self, chunk: Chunk) -> None:
        """Check where a chunk begins and ends, and that it was its prompt's turn."""
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        most, interval = self.limits
        if chunk.narrow:
            assert (start, end) == (sequence.reusable, sequence.prompt)
        else:
            assert start % BLOCK == chunk.count % BLOCK == 0
            assert chunk.count <= most
            assert end <= sequence.reusable
        assert not start < sequence.known * BLOCK < end
        assert (end - 1) // interval == start // interval
        running = [s for s in self.scheduler.running if s.group == sequence.group]
        others = [s for s in running if s.state == "prefill"]
        assert all(sequence.rank <= other.rank for other in others)

    def drain(self) -> None:
        """Step until nothing is left to do."""
        steps = 100 + 2 * sum(sequence.limit for sequence in self.events)
        while self.core.busy:
            self.step(pace=8)
            steps -= 1
            assert steps, "a sequence does not end"

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
        if request.prompt_logprobs and (prompt or events[-1].finish != "abort"):
            entries = entries_of(request, [*request.tokens])
            assert [token.id for token in prompt] == [*request.tokens]
            scores = [logprob(*pair) for pair in zip(entries, request.tokens[1:], strict=False)]
            assert [token.logprob for token in prompt[1:]] == scores
        assert (sequence.row, sequence.pages, sequence.saved) == (None, [], None)
        counted = sequence.prompt, len(ids)
        assert (usage.prompt_tokens, usage.completion_tokens) == counted
        assert events[-1].usage == usage
        drafts = self.device.drafted[sequence], self.device.right[sequence]
        assert (usage.drafted_tokens, usage.accepted_tokens) == drafts
        assert usage.cached_tokens % BLOCK == 0
        assert usage.cached_tokens <= (0 if request.needs_all else sequence.reusable)
        if request.routed_experts and events[-1].finish in ("stop", "length"):
            read = [*request.tokens, *ids][: sequence.prompt + max(0, len(ids) - 1)]
            assert routed(events[-1]) == read


class Machine(RuleBasedStateMachine):
    """Requests of all kinds come, run, make way, are cancelled and end."""

    @initialize(
        sizes=st.fixed_dictionaries(
            {
                "rows": st.integers(1, 4),
                "n": st.sampled_from([1, 2, 4]),
                "extra": st.integers(0, 2),
                "width": st.integers(1, 3),
                "accuracy": st.integers(0, 4),
                "chunk": st.sampled_from([BLOCK, 2 * BLOCK]),
                "interval": st.sampled_from([2 * BLOCK, 3 * BLOCK, 8 * BLOCK]),
                "snapshots": st.sampled_from([1, 3, 9]),
                "ram": st.sampled_from([0, 10_000, 10**7]),
                "groups": st.sampled_from([1, 1, 2, 3]),
            }
        )
    )
    def create(self, sizes):
        self.engine = Engine(**sizes)

    @rule(
        blocks=st.lists(st.sampled_from([0, 0, 1]), max_size=4),
        tail=st.sampled_from([1, 2, 100, 128]),
        limit=st.sampled_from([0, 1, 40, 200, 200, CONTEXT]),
        kind=st.sampled_from([*KINDS, "plain", "held", "penalised"]),
        root=st.sampled_from([*[(None, "")] * 4, ("a", ""), (None, "b"), (None, FAULTS)]),
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

    @rule(place=st.integers(0, 20))
    def cancel(self, place):
        for sequence in [*self.engine.events][place : place + 1]:
            sequence.cancelled = True

    @rule(count=st.sampled_from([1, 5, 20]), pace=st.sampled_from([1, 3, STEPS]))
    def run(self, count, pace):
        for _ in range(count):
            self.engine.step(pace)

    @invariant()
    def published_blocks_are_those_of_their_prompts(self):
        engine = self.engine
        for sequence in engine.events:
            entries = entries_of(sequence.request, [*sequence.request.tokens])
            for i, key in enumerate(sequence.keys):
                if (page := engine.prefix.page_of(key)) is not None:
                    block = engine.device.block(page, i % engine.n)
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
        assert engine.pages.free == engine.pages.count - engine.pages.groups


Machine.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=100, stateful_step_count=30
)
TestRequestsShareAnEngine = Machine.TestCase


def prompt(*blocks: int, tail: int = 1) -> Request:
    """A request for nothing but its prompt: blocks of one token each, and a tail."""
    tokens = [token for token in blocks for _ in range(BLOCK)]
    return Request(tokens=(*tokens, *[9] * tail), max_tokens=0)


def test_prompts_that_come_together_are_read_once():
    engine = Engine(rows=4, width=3, extra=8)
    requests = [dataclasses.replace(prompt(1, 2, 3, tail=i), max_tokens=40) for i in range(10, 15)]
    cached = [sequence.usage.cached_tokens for sequence in engine.ask(*requests)]
    assert cached == [0, *[3 * BLOCK] * 4]
    parted = [prompt(1, 2, *blocks, tail=5) for blocks in ([4], [5, 5], [6])]
    cached = [sequence.usage.cached_tokens for sequence in engine.ask(*parted)]
    # The first one finds no state where it parts, and leaves one.
    assert cached == [0, 2 * BLOCK, 2 * BLOCK]


def test_groups_read_different_prompts_at_once_and_share_prefixes():
    engine = Engine(groups=2, chunk=BLOCK, extra=4)
    first, second = (engine.submit(prompt(i, i, i)) for i in (1, 2))
    engine.step()
    assert (first.group, second.group) == (0, 1)
    assert first.length == second.length == BLOCK
    engine.drain()
    # Both rows of the group that has the prefix are taken: the third request gets a copy.
    requests = [dataclasses.replace(prompt(1, 1, 1), max_tokens=99) for _ in range(3)]
    sequences = engine.ask(*requests)
    assert [sequence.usage.cached_tokens for sequence in sequences] == [3 * BLOCK] * 3
    assert [sequence.group for sequence in sequences] == [0, 0, 1]


@pytest.mark.parametrize(("n", "length"), [(4, 650), (4, CONTEXT), (2, 400), (1, CONTEXT - 1)])
def test_a_full_context_fits_into_the_smallest_cache(n, length):
    engine = Engine(rows=1, n=n)
    request = Request(tokens=(7,) * length, max_tokens=CONTEXT - length)
    first, again = (engine.ask(request)[0] for _ in range(2))
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens == (length - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("width", [1, 3])
def test_an_answer_is_known_to_the_next_turn(width):
    engine = Engine(width=width)
    (first,) = engine.ask(Request(tokens=(5,) * 200, max_tokens=200))
    (following,) = engine.ask(Request(tokens=(*first.tokens, 1), max_tokens=1))
    assert following.usage.cached_tokens == 3 * BLOCK


def test_answers_that_wait_to_be_known_are_few_and_no_requests(monkeypatch):
    monkeypatch.setattr(core, "_SEALS", 2)
    engine = Engine(rows=2)
    requests = [Request(tokens=(i,) * 100, max_tokens=100) for i in range(5)]
    sequences = [engine.submit(request) for request in requests]
    while any(sequence.state != "ended" for sequence in sequences):
        assert not any(sequence.is_idle for sequence in engine.scheduler.running)
        engine.step(pace=STEPS)
    assert [sequence.tokens[0] for sequence in engine.scheduler.idle] == [3, 4]
    assert engine.core.busy
    engine.drain()
    usage = engine.memory.usage()
    assert usage["pages_used"] == usage["pages_cached"]


def test_prefixes_come_back_from_the_store():
    engine = Engine(rows=1, n=2, snapshots=1, ram=10**6, interval=256)
    engine.ask(prompt(1, 2, 3))
    engine.ask(prompt(4, 4, 4, 4, 4))
    assert engine.memory.usage()["pages_cached"] == 3
    # Its last block has to be computed, so that the state after it is of no use.
    exact = dataclasses.replace(prompt(1, 2, 3, tail=0), max_tokens=30)
    assert engine.ask(exact)[0].usage.cached_tokens == 2 * BLOCK
    assert engine.ask(prompt(1, 2, 3))[0].usage.cached_tokens == 3 * BLOCK


@pytest.mark.parametrize("steps", [1, 3])
def test_a_prompt_that_made_way_is_read_and_scored_again(steps):
    engine = Engine(rows=2, n=1, extra=1, chunk=BLOCK)
    grows = engine.submit(Request(tokens=(1,) * 126, max_tokens=100))
    for _ in range(steps):
        engine.step()
    engine.ask(dataclasses.replace(prompt(1, 2, 3, 4, 5), **KINDS["scored and penalised"]))
    engine.check(grows)
    assert engine.scheduler.preemptions == 1


def test_a_row_that_made_way_can_be_cancelled():
    engine = Engine(rows=2, n=1, extra=1)
    requests = [Request(tokens=(i,) * 100, max_tokens=600) for i in (1, 2)]
    first, second = map(engine.submit, requests)
    while second.saved is None:
        engine.step()
    second.cancelled = True
    engine.drain()
    engine.check(first)
    engine.check(second)


def test_who_comes_first_and_what_is_urgent_is_served_first():
    engine = Engine(rows=1, chunk=BLOCK)
    request = Request(tokens=(1,) * 300, max_tokens=50)
    priorities = [1, 0, 0, -1]
    sequences = []
    for priority in priorities:
        sequences.append(engine.submit(dataclasses.replace(request, priority=priority)))
        engine.step()
    engine.drain()
    # All of them were submitted at second 0.
    by_end = sorted(sequences, key=lambda sequence: sequence.usage.seconds)
    assert by_end == [sequences[i] for i in (3, 1, 2, 0)]


def test_answers_are_added_to_the_cache_while_nothing_else_runs():
    engine = Engine(extra=1, chunk=BLOCK)
    first = engine.submit(Request(tokens=(1,) * 100, max_tokens=500))
    while not any(sequence.is_idle for sequence in engine.scheduler.running):
        engine.step(pace=STEPS)
    engine.submit(Request(tokens=(2,) * 10, max_tokens=50))
    engine.drain()
    assert engine.scheduler.preemptions == 0
    (following,) = engine.ask(Request(tokens=(*first.tokens, 1), max_tokens=1))
    assert following.usage.cached_tokens == 4 * BLOCK


def test_rows_make_way_only_for_pages_that_others_take():
    engine = Engine(rows=2, n=1, extra=1)
    requests = [Request(tokens=(i,) * 100, max_tokens=600) for i in (1, 2)]
    engine.ask(*requests)
    assert 0 < engine.scheduler.preemptions <= CONTEXT // BLOCK


def test_an_error_of_a_request_ends_it_alone():
    def notify(event: Event) -> None:
        raise RuntimeError("the event loop is closed")

    engine = Engine(rows=3)
    request = Request(tokens=(1,) * 50, max_tokens=50)
    gone = engine.submit(dataclasses.replace(request, max_tokens=600), notify)
    broken = dataclasses.replace(request, constraint=Breaks)
    engine.ask(request, broken)
    assert gone.state == "ended"
    assert gone.sampled < 60
    assert engine.core.counters.corrupted == 0
