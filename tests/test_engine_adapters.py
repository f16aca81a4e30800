"""Adapters by the names of models: mixed in one engine, each answers as if it were alone."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import pytest

from tests import models, serving
from v4jax.adapters import lora
from v4jax.adapters.lora import Lora
from v4jax.decoding.loaded import Loaded
from v4jax.engine.engine import Engine
from v4jax.model import numerics

CFG = models.config(models.CSA, models.HCA)
PROMPT = models.tokens(CFG, 1, 150, seed=3)[0].tolist()
NAMES = ("tiny", "red", "blue")


def loaded(*modules: str) -> Loaded:
    """The model, with a random adapter of these modules if there are any."""
    model = models.weights(CFG)
    if modules:
        settings = Lora(modules, rank=2)
        filled = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
        adapter = jax.tree.map(filled, lora.init(CFG, settings, jax.random.key(0)))
        model = lora.attach(model, CFG, settings, adapter)
    return Loaded(model, CFG, numerics.HF, jnp.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    adapters = {"red": loaded("attn"), "blue": loaded("shared_experts.down_proj")}
    sizes: dict[str, Any] = {"max_seqs": 6, "context": 256, "page": 256, "pages": 6, "chunk": 128}
    with (
        Engine(loaded(), adapters=adapters, **sizes) as engine,
        serving.serve(
            lambda _: "",
            engine=engine,
            adapters=("red", "blue"),
            vocab_size=CFG.vocab_size,
            limits=serving.Limits(context=256),
        ) as running,
    ):
        yield running
        assert engine.stats().recompilations == 0


async def ask(client: httpx.AsyncClient, model: str, user: str) -> Any:
    """Token ids and log-probabilities of an answer; no user shares prefixes with another."""
    fields = {"prompt": PROMPT, "max_tokens": 20, "seed": 1, "logprobs": 3}
    asked = {"model": model, "user": user, "return_token_ids": True, **fields}
    choice = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]


def test_adapters_and_the_base_answer_alike_alone_and_mixed(server: serving.Running) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=100) as client:
            alone = [await ask(client, name, "alone") for name in NAMES]
            assert len({str(answer) for answer in alone}) == len(NAMES)
            names = [*NAMES, *reversed(NAMES)]
            mixed = [ask(client, name, f"{i}") for i, name in enumerate(names)]
            answers = await asyncio.gather(*mixed)
            assert answers == [*alone, *reversed(alone)]

    asyncio.run(run())
