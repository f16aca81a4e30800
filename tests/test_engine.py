"""The engine on a small model: a request is answered as if it were alone."""

import asyncio
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models
from v4jax.decoding.loaded import Loaded
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine.engine import Engine, Ticket
from v4jax.engine.request import Event, QueueFull, Request, Token, Usage
from v4jax.model import numerics, params, transformer
from v4jax.model.transformer import Model

CFG = models.config(models.SLIDING, models.CSA, models.HCA, num_nextn_predict_layers=1)
# Pages for one long sequence and two short ones, so that rows have to make way.
SIZES: dict[str, Any] = {"max_seqs": 4, "context": 768, "page": 256, "pages": 7, "chunk": 256}
TEXT = models.tokens(CFG, 1, 1000, seed=3)[0].tolist()


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(models.weights(CFG), CFG, numerics.HF, jnp.float32)


@pytest.fixture(scope="module", params=[None, "mtp:2"])
def engine(loaded: Loaded, request: Any) -> Iterator[Engine]:
    with Engine(loaded, **SIZES, speculate=request.param, routed_experts=True) as engine:
        yield engine
        assert engine.stats().recompilations == 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """All that an engine reported of a request."""

    tokens: tuple[Token, ...]
    finish: str | None
    usage: Usage
    prompt: tuple[Token, ...]
    expert_TLA: Any = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


async def answer(engine: Engine, request: Request, delay: float = 0) -> Answer:
    await asyncio.sleep(delay)
    tokens, prompt, event = [], [], None
    async for event in engine.generate(request):
        tokens += event.tokens
        prompt += event.prompt
    assert event is not None
    return Answer(tuple(tokens), event.finish, event.usage, tuple(prompt), event.expert_TLA)


def ask(engine: Engine, *requests: Request) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return [*await asyncio.gather(*(answer(engine, request) for request in requests))]

    return asyncio.run(all_of_them())


def fresh(request: Request, number: int) -> Request:
    """The same request without cached prefixes."""
    return dataclasses.replace(request, salt=f"{request.salt} {number}")


def random_request(rng: random.Random) -> Request:
    start, length = rng.choice([0, 0, 100]), rng.choice([5, 127, 128, 129, 200, 300, 385, 500])
    greedy = SamplingParams(temperature=0, seed=1)
    drawn = SamplingParams(seed=rng.randrange(100), top_p=0.9, frequency_penalty=0.5)
    return Request(
        tokens=TEXT[start : start + length],
        max_tokens=rng.choice([1, 20, 60]),
        sampling=rng.choice([greedy, drawn]),
        stop_tokens=rng.choice([(), (7, 50)]),
        top_logprobs=2,
    )


def test_a_request_is_answered_alike_alone_and_in_any_mix(engine):
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(24)]
    alone = [ask(engine, fresh(request, i))[0] for i, request in enumerate(requests)]

    async def mix() -> list[Answer]:
        async def cancelled(request: Request) -> None:
            async for _ in engine.generate(request):
                return

        delays = [rng.uniform(0, 0.5) for _ in requests]
        mixed = [answer(engine, *pair) for pair in zip(requests, delays, strict=True)]
        leaving = asyncio.gather(*map(cancelled, requests[:8]))
        answers = await asyncio.gather(*mixed)
        await leaving
        return [*answers]

    for expected, mixed in zip(alone, asyncio.run(mix()), strict=True):
        assert mixed.tokens == expected.tokens
        assert mixed.finish == expected.finish
    stats = engine.stats()
    assert stats.cached_tokens > 0
    assert stats.preemptions > 0


def test_tokens_are_the_most_probable_under_the_logits_of_the_text(engine, loaded):
    request = Request(tokens=TEXT[:300], max_tokens=40, sampling=SamplingParams(temperature=0))
    (got,) = ask(engine, fresh(request, 0))
    logits_TV = loaded.logits_of([TEXT[:300] + got.ids])[0, 299:-1]
    assert got.ids == logits_TV.argmax(axis=-1).tolist()
    expected_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    logprobs = [token.logprob for token in got.tokens]
    np.testing.assert_allclose(logprobs, expected_TV[np.arange(40), got.ids], atol=1e-4)
    assert got.usage.completion_tokens == 40


@pytest.mark.parametrize("length", [129, 256, 257, 385, 600])
def test_a_cached_prefix_gives_the_same_bits(engine, length):
    settings = SamplingParams(seed=5)
    request = Request(tokens=TEXT[:length], max_tokens=8, sampling=settings, salt=f"hit {length}")
    cold, warm = (ask(engine, request)[0] for _ in range(2))
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == (length - 1) // 128 * 128
    assert warm.tokens == cold.tokens


def test_prompts_that_part_share_what_they_have_in_common(engine):
    sampling = SamplingParams(temperature=0)
    requests = [
        Request(tokens=[*TEXT[:400], *TEXT[i : i + 100]], max_tokens=4, sampling=sampling, salt="b")
        for i in (500, 600, 700)
    ]
    first, second, third = (ask(engine, request)[0] for request in requests)
    assert first.usage.cached_tokens == 0
    # The second finds the blocks but no state at their end, and leaves one for the third.
    assert third.usage.cached_tokens == 384
    for request, got in zip(requests, (first, second, third), strict=True):
        assert got.tokens == ask(engine, fresh(request, 1))[0].tokens


def test_an_answer_is_reused_by_the_next_turn(engine):
    settings = SamplingParams(temperature=0)
    request = Request(tokens=TEXT[:200], max_tokens=200, sampling=settings, salt="turn")
    (first,) = ask(engine, request)
    tokens = [*TEXT[:200], *first.ids, *TEXT[:10]]
    following = dataclasses.replace(request, tokens=tokens, max_tokens=4)
    while engine._core.busy:  # answers are added to the prefix cache when nothing else runs
        time.sleep(0.01)
    (got,) = ask(engine, following)
    assert got.usage.cached_tokens == 384
    assert got.tokens == ask(engine, fresh(following, 0))[0].tokens


def test_nothing_is_read_that_was_not_written(loaded):
    with Engine(loaded, **SIZES, speculate="mtp:2") as engine:
        device = engine._core.device
        requests = [random_request(random.Random(i)) for i in range(4)]
        expected = [ask(engine, fresh(request, 0))[0].tokens for request in requests]
        poison = lambda array: jnp.full_like(array, jnp.nan if array.dtype.kind == "f" else 0)
        device._cache = jax.tree.map(poison, device._cache)
        got = ask(engine, *(fresh(request, 1) for request in requests))
        assert [answer.tokens for answer in got] == expected
        assert engine.stats().corrupted == 0


def test_a_cache_of_bytes_gives_the_same_answers(tmp_path: Path):
    how = numerics.OFFICIAL, jnp.dtype("bfloat16")
    weights = params.init(Model(CFG), jax.random.key(0), jnp.bfloat16)
    model, answers = Loaded(weights, CFG, *how), []
    settings = SamplingParams(seed=1)
    # Two requests that do not fit together, of which one has to make way.
    requests = [
        Request(tokens=TEXT[i : i + 240], max_tokens=300, sampling=settings) for i in range(2)
    ]
    for cache_dtype in (None, "fp8"):
        sizes: dict[str, Any] = SIZES | {"cache_dtype": cache_dtype, "pages": 5}
        with Engine(model, **sizes, cache_dir=tmp_path / str(cache_dtype)) as engine:
            answers.append([[answer.tokens for answer in ask(engine, *requests)] for _ in range(2)])
            assert engine.stats().preemptions > 0
    with Engine(model, **sizes, cache_dir=tmp_path / "fp8") as engine:
        again = ask(engine, *requests)
        assert sum(answer.usage.cached_tokens for answer in again) > 0
        answers.append([[answer.tokens for answer in again]] * 2)
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(ValueError, match="numerics"):
        Engine(dataclasses.replace(model, numerics=numerics.HF), **sizes)


def test_prefixes_leave_the_device_and_come_back(loaded, tmp_path: Path):
    settings = SamplingParams(temperature=0)
    requests = [
        Request(tokens=TEXT[i : i + 500], max_tokens=4, sampling=settings)
        for i in range(0, 400, 50)
    ]
    with Engine(loaded, **SIZES, cache_ram=2**26, cache_dir=tmp_path, snapshots=2) as engine:
        cold = [ask(engine, request)[0] for request in requests]
        warm = [ask(engine, request)[0] for request in requests]
        assert [answer.usage.cached_tokens for answer in cold] == [0] * len(requests)
        assert [answer.usage.cached_tokens for answer in warm] == [384] * len(requests)
        assert [answer.tokens for answer in warm] == [answer.tokens for answer in cold]
        assert engine.stats().ram_bytes > 0
        assert engine.stats().recompilations == 0
    with Engine(loaded, **SIZES, cache_dir=tmp_path) as engine:
        again = [ask(engine, request)[0] for request in requests]
        assert [answer.usage.cached_tokens for answer in again] == [384] * len(requests)
        assert [answer.tokens for answer in again] == [answer.tokens for answer in cold]


class Waker:
    """Allows two tokens only, once token 3 or the tenth token was sampled."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def mask(self) -> np.ndarray | None:
        if 3 not in self.seen and len(self.seen) < 10:
            return None
        words = np.zeros(3, np.uint32)
        words[0], words[2] = 1 << 5, 1 << 6
        return words

    def push(self, token: int) -> None:
        self.seen.append(token)


def test_a_constraint_restricts_tokens_as_soon_as_it_wakes(engine):
    settings = SamplingParams(seed=2)
    request = Request(tokens=TEXT[:50], max_tokens=30, sampling=settings, constraint=Waker)
    free, held = ask(engine, dataclasses.replace(request, constraint=None), request)
    wakes = 1 + next((i for i, token in enumerate(free.ids[:10]) if token == 3), 9)
    assert held.ids[:wakes] == free.ids[:wakes]
    assert set(held.ids[wakes:]) == {5, 70}
    assert len(held.ids) == 30


def test_a_watcher_ends_the_answer(engine):
    class Third:
        def __init__(self) -> None:
            self.count = 0

        def push(self, token: int) -> bool:
            self.count += 1
            return self.count == 3

    (got,) = ask(engine, Request(tokens=TEXT[:20], max_tokens=30, watcher=Third))
    assert (len(got.tokens), got.finish) == (3, "stop")


def test_the_prompt_can_be_scored(engine):
    request = Request(tokens=TEXT[:300], max_tokens=0, prompt_logprobs=True, top_logprobs=3)
    (got,) = ask(engine, request)
    logits_TV = models.full_logits(CFG, np.array([TEXT[:300]], np.int32))[0]
    logprob_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    expected = [logprob_TV[i, token] for i, token in enumerate(TEXT[1:300])]
    assert [token.id for token in got.prompt] == TEXT[:300]
    assert np.isnan(got.prompt[0].logprob)
    np.testing.assert_allclose([t.logprob for t in got.prompt[1:]], expected, atol=1e-4)
    best = np.argmax(logprob_TV[:-1], axis=1).tolist()
    assert [token.top[0][0] for token in got.prompt[1:]] == best
    assert (got.tokens, got.finish) == ((), "length")


def test_the_chosen_experts_are_those_of_a_pass_over_the_text(engine, loaded):
    request = Request(tokens=TEXT[:300], max_tokens=30, sampling=SamplingParams(seed=2))
    requests = [request, dataclasses.replace(request, routed_experts=True)]
    _, *answers = (ask(engine, request)[0] for request in [*requests, requests[1]])
    for got in answers:
        text_BT = jnp.asarray([TEXT[:300] + got.ids])
        choice = lambda _kind, trace, _context: trace.routing.expert_BTA
        *_, watched = transformer.forward_rows(
            loaded.weights, CFG, numerics.HF, text_BT[:, :-1], watch=choice
        )
        expected_TLA = np.moveaxis(np.asarray(transformer.by_layer(watched))[:, 0], 0, 1)
        np.testing.assert_array_equal(got.expert_TLA, expected_TLA)
        assert got.usage.cached_tokens == 0


def test_a_row_that_is_not_finite_ends_alone(loaded):
    weights = loaded.weights
    nan = jax.tree.map(lambda x: x, weights)
    nan.embed_VD.set_value(nan.embed_VD[...].at[9].set(jnp.nan))
    with Engine(dataclasses.replace(loaded, weights=nan), **SIZES) as engine:
        good = Request(tokens=[1, 2, 3], max_tokens=20, sampling=SamplingParams(temperature=0))
        bad = dataclasses.replace(good, tokens=[1, 9, 3])
        with pytest.raises(ValueError, match="routed_experts=True"):
            engine.submit(dataclasses.replace(good, routed_experts=True), lambda _: None)
        (alone,) = ask(engine, good)
        assert 9 not in alone.ids
        beside, failed = ask(engine, good, bad)
        assert (failed.finish, failed.tokens) == ("error", ())
        assert beside.tokens == alone.tokens
        assert engine.stats().corrupted == 1


def test_what_can_never_run_is_refused(engine):
    settings = SamplingParams()
    for problem, changes in {
        "empty": {"tokens": []},
        "outside the vocabulary of 96": {"tokens": [96]},
        "together they may have 768": {"max_tokens": 768},
        "no adapter 'x'": {"adapter": "x"},
        "priority is 1073741824": {"priority": 1 << 30},
        "top_logprobs: 21": {"top_logprobs": 21},
        "stop_tokens: 9": {"stop_tokens": tuple(range(9))},
    }.items():
        request = dataclasses.replace(Request(tokens=[1], sampling=settings), **changes)
        with pytest.raises(ValueError, match=problem):
            engine.submit(request, print)


def test_a_full_queue_refuses_and_cancelled_requests_leave(loaded):
    with Engine(loaded, **SIZES, queue=3) as engine:
        request = Request(tokens=TEXT[:300], max_tokens=400)
        events: list[Event] = []
        tickets: list[Ticket] = []
        submit = lambda: tickets.append(engine.submit(request, events.append))
        with pytest.raises(QueueFull, match="3 requests are waiting"):
            any(submit() for _ in range(50))
        for ticket in tickets:
            ticket.cancel()
        while engine.stats().waiting:
            time.sleep(0.01)
        ask(engine, dataclasses.replace(request, tokens=[1], max_tokens=1))
        assert sum(event.finish == "abort" for event in events) == len(tickets)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, stats.pages_cached)
    assert not engine.ready
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request, print)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"context": 70000}, "context is 70000; the model's own is 65536"),
        ({"chunk": 100}, "chunk is 100; use a multiple of 128"),
        ({"pages": 3}, "has 3 pages of 256 tokens, but a sequence of 768 tokens needs 3"),
        ({"pages": None, "memory": 150_000}, "raise memory or lower context"),
        ({"speculate": "mtp:9"}, "'mtp:9'"),
        ({"speculate": "ngram"}, "'ngram'"),
        ({"max_seqs": 0}, "max_seqs is 0"),
    ],
)
def test_wrong_sizes_are_refused(loaded, changes, problem):
    with pytest.raises(ValueError, match=problem):
        Engine(loaded, **(SIZES | changes))
