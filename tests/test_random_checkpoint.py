"""Checkpoints with random weights in the release format."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import v4jax
from tests.checkpoints import tiny
from v4jax.checkpoints import native, random_release
from v4jax.checkpoints.convert import convert, export
from v4jax.checkpoints.safetensors_directory import Checkpoint
from v4jax.commands import inspect
from v4jax.language_model import LanguageModel
from v4jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    random_release.make_checkpoint(directory, tiny(), 0)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LanguageModel:
    return v4jax.load(checkpoint)


def test_checkpoint_has_the_files_and_formats_of_a_release(checkpoint: Path) -> None:
    assert sorted(file.name for file in checkpoint.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    with Checkpoint.open(checkpoint) as files:
        dtypes = {name: files.info(name).dtype for name in files.names}
    assert dtypes["layers.0.attn.wq_a.weight"] == "F8_E4M3"
    assert dtypes["layers.0.attn.wq_a.scale"] == "F8_E8M0"
    assert dtypes["layers.4.ffn.experts.7.w2.weight"] == "I8"
    assert dtypes["layers.0.ffn.gate.tid2eid"] == "I64"
    assert dtypes["embed.weight"] == "BF16"
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_dtype": "fp8"},
        {"quantized": False, "expert_dtype": None},
        {"num_nextn_predict_layers": 0, "vocab_size": 300},
    ],
)
def test_checkpoints_of_other_configurations_hold_what_inspect_computes(
    changes: dict, tmp_path: Path
) -> None:
    cfg = tiny(**changes)
    random_release.make_checkpoint(tmp_path / "checkpoint", cfg, 0)
    subject = inspect.find(str(tmp_path / "checkpoint"))
    assert subject.config == cfg
    assert subject.held == inspect.report(cfg).bytes_by_dtype


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    for seed in (0, 1):
        random_release.make_checkpoint(tmp_path / str(seed), tiny(), seed)
    same, other = (
        [
            (tmp_path / seed / file.name).read_bytes() == file.read_bytes()
            for file in sorted(checkpoint.glob("*.safetensors"))
        ]
        for seed in ("0", "1")
    )
    assert all(same)
    assert not any(other)


def test_conversion_and_export_restore_its_bytes(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "native")
    export(tmp_path / "native", tmp_path / "hf")
    assert native.is_native(tmp_path / "native")
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors" or file.name == "tokenizer.json":
            assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrays(*_: object) -> Iterator[tuple[str, np.ndarray]]:
        yield "one", np.zeros(3, np.float32)
        raise KeyboardInterrupt

    monkeypatch.setattr(random_release, "_arrays", arrays)
    with pytest.raises(KeyboardInterrupt):
        random_release.make_checkpoint(tmp_path / "checkpoint", tiny(), 0)
    assert list(tmp_path.iterdir()) == []


def test_most_greedy_and_sampled_tokens_are_words(model: LanguageModel, checkpoint: Path) -> None:
    words = set(random_release._words(Tokenizer.load(checkpoint)))
    for temperature in (0.0, 1.0):
        out = model.generate("Once upon a time", max_tokens=64, temperature=temperature, seed=3)
        assert sum(token in words for token in out.tokens) >= 60
        assert out.finish_reason == "length"


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="270 or more"):
        random_release.make_checkpoint(tmp_path / "checkpoint", tiny(vocab_size=100), 0)
    assert list(tmp_path.iterdir()) == []
