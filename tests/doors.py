"""A small model, and stubs of what public calls run, for the tests of arguments."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from tests import models
from v4jax import open_model
from v4jax.checkpoints import safetensors_directory
from v4jax.engine.request import Event, Request, Usage
from v4jax.generation import Answer
from v4jax.language_model import LanguageModel
from v4jax.model.numerics import HF
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer

VOCAB = 300
CFG = models.config(models.SLIDING, vocab_size=VOCAB, max_position_embeddings=64)
USER = {"role": "user", "content": "hi"}


def small_model() -> LanguageModel:
    tokenizer = Tokenizer(build_demo_tokenizer(VOCAB))
    return LanguageModel(models.weights(CFG), CFG, HF, jnp.dtype("float32"), tokenizer)


def stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record what `load` and `generate` pass on; nothing is loaded, run or written."""
    passed: dict[str, Any] = {}

    def load(path: Any, dtype: Any, numerics: Any, **rest: Any) -> None:
        passed.update(path=path, dtype=dtype, numerics=numerics, **rest)

    def events(_: Any, requests: list[Request], *rest: Any) -> Iterator[tuple[int, Event]]:
        request = requests[0]
        answer = request.watcher and request.watcher()
        passed.update(prompt=request.tokens, max_tokens=request.max_tokens, params=request.sampling)
        passed.update(stop=isinstance(answer, Answer) and answer._stops)
        passed.update(top_logprobs=request.top_logprobs, rest=rest)
        return ((i, Event((), "length", Usage())) for i in range(len(requests)))

    monkeypatch.setattr(open_model, "load", load)
    monkeypatch.setattr(LanguageModel, "_events", events)
    monkeypatch.setattr(safetensors_directory, "write_checkpoint", lambda *_, **__: None)
    return passed
