"""Adapters on modules named as in PEFT: trained from a recipe, exported and loaded."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import v4jax
from tests import models
from v4jax.adapters import peft, updates
from v4jax.checkpoints import random_release
from v4jax_train import loop, recipe

# The vocabulary has room for the special tokens; rows of 128 tokens are longer than the window.
CFG = dataclasses.replace(models.config(models.CSA), vocab_size=300)
TARGETS = ["q_b_proj", "kv_proj", "weights_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "release"
    random_release.make_checkpoint(directory, CFG, 0)
    return directory


@pytest.fixture(scope="module")
def run(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": letter * 100}) + "\n" for letter in "abcdefgh"))
    settings = recipe.from_table(
        {
            "out": str(folder / "run"),
            "model": {"path": str(release), "dtype": "float32"},
            "data": {"files": [str(data)], "seq_len": 128, "too_long": "truncate"},
            "adapter": {"targets": TARGETS, "rank": 2},
            "optimizer": {"rate": 1e-2},
            "steps": {"steps": 2, "batch": 8},
        }
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
        loop.begin(settings, show=lambda _: None)
    return folder / "run"


def test_a_run_trains_the_named_modules(run: Path) -> None:
    update = updates.read(run, CFG)
    assert isinstance(update, updates.Adapted)
    block = "stacks.0.blocks.0.attention."
    learned = {name: bool(np.any(pair["b"])) for name, pair in update.factors.items()}
    assert learned == {
        **{f"{block}{name}": True for name in ("q_b_PR", "kv_KD", "compressor.kv_CD")},
        # As in transformers, no gradient of the next token's loss reaches an indexer.
        **{f"{block}indexer.{name}": False for name in ("q_b_PR", "weights_ID")},
        f"{block}indexer.compressor.kv_CD": False,
        "stacks.0.experts.0.down_EDF": True,
    }


def test_an_exported_adapter_gives_the_logits_of_the_run(
    run: Path, release: Path, tmp_path: Path
) -> None:
    updates.export_adapter(run, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert set(config["target_modules"]) == {
        *("self_attn.q_b_proj", "self_attn.kv_proj", "self_attn.compressor.kv_proj"),
        *(f"self_attn.compressor.indexer.{m}" for m in ("q_b_proj", "kv_proj")),
        "self_attn.compressor.indexer.scorer.weights_proj",
    }
    assert config["target_parameters"] == ["mlp.experts.down_proj"]
    tokens_BT = models.tokens(CFG, 1, 40)
    logits: list[Any] = [
        v4jax.load(release, dtype="float32", adapter=path).logits(tokens_BT)
        for path in (run, tmp_path / "adapter")
    ]
    np.testing.assert_array_equal(*logits)
