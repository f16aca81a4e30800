"""The engine on meshes, each group of devices with its own rows and pages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models
from tests.test_engine import CFG, TEXT, ask, fresh
from v4jax.decoding.loaded import Loaded
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine.engine import Engine
from v4jax.engine.request import Request
from v4jax.model import numerics, sharding
from v4jax.model.transformer import Model

SIZES: dict[str, Any] = {"context": 512, "page": 128, "chunk": 256}
GREEDY = SamplingParams(temperature=0)


def load(mesh: Any = None) -> Loaded:
    weights = models.weights(CFG)
    if mesh is not None:
        weights = jax.device_put(weights, sharding.shardings(Model(CFG), mesh, weights))
    return Loaded(weights, CFG, numerics.HF, jnp.float32)


REQUESTS = [
    Request(tokens=TEXT[start : start + length], max_tokens=12, sampling=sampling)
    for start, length, sampling in [
        (0, 5, GREEDY),
        (7, 300, SamplingParams(seed=1, frequency_penalty=0.5)),
        (40, 129, GREEDY),
        (0, 400, SamplingParams(seed=2, top_p=0.9)),
        (90, 260, GREEDY),
    ]
]


@pytest.fixture(scope="module")
def expected():
    with Engine(load(), **SIZES, max_seqs=1) as engine:
        return [ask(engine, request)[0] for request in REQUESTS]


@pytest.mark.parametrize(
    ("mesh", "speculate"),
    [({"expert": 2, "fsdp": 2, "tensor": 2}, "mtp:2"), ({"data": 4, "expert": 2}, None)],
)
def test_requests_are_answered_as_on_one_device(mesh, speculate, expected):
    loaded = load(sharding.make_mesh(**mesh))
    pages = 8 * 5  # for one long request a group, and its prefix
    with Engine(loaded, **SIZES, max_seqs=3, pages=pages, speculate=speculate) as engine:
        alone = [ask(engine, fresh(request, i))[0] for i, request in enumerate(REQUESTS)]
        for _ in range(2):
            together = ask(engine, *REQUESTS)
            assert [got.tokens for got in together] == [got.tokens for got in alone]
        for got, want in zip(alone, expected, strict=True):
            assert got.ids == want.ids
            ours, theirs = ([t.logprob for t in answer.tokens] for answer in (got, want))
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        shared = [dataclasses.replace(REQUESTS[3], max_tokens=40) for _ in range(4)]
        answers = ask(engine, *shared)
        assert len({answer.tokens for answer in answers}) == 1
        assert [answer.usage.cached_tokens for answer in answers] == [384] * 4
        assert engine.stats().recompilations == 0
