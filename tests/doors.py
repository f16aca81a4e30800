"""A small model, and stubs of what public calls run, for the tests of arguments."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from tests import models
from v4jax import language_model, open_model
from v4jax.checkpoints import safetensors_directory
from v4jax.decoding.loop import Engine, Timings
from v4jax.language_model import Generation, LanguageModel
from v4jax.model.numerics import HF
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer

VOCAB = 300
CFG = models.config(models.SLIDING, vocab_size=VOCAB, max_position_embeddings=64)
USER = {"role": "user", "content": "hi"}


def small_model() -> LanguageModel:
    engine = Engine(models.weights(CFG), CFG, HF, jnp.dtype("float32"))
    return LanguageModel(engine, Tokenizer(build_demo_tokenizer(VOCAB)))


def stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record what `load` and `generate` pass on; nothing is loaded, run or written."""
    passed: dict[str, Any] = {}

    def load(path: Any, dtype: Any, numerics: Any, **rest: Any) -> None:
        passed.update(path=path, dtype=dtype, numerics=numerics, **rest)

    class Run:
        def __init__(self, model: Any, prompt: Any, limit: Any, stops: Any, top: Any, params: Any):
            passed.update(prompt=prompt, max_tokens=limit, stop=stops, top_logprobs=top)
            passed.update(params=params)

        def finish(self) -> Generation:
            return Generation("", [], [], [], "length", Timings(0.0, 0.0, 0.0))

        def pieces(self) -> Iterator[str]:
            return iter(())

    monkeypatch.setattr(open_model, "load", load)
    monkeypatch.setattr(language_model, "_Run", Run)
    monkeypatch.setattr(safetensors_directory, "write_checkpoint", lambda *_, **__: None)
    return passed
