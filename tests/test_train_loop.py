"""Runs of the command: they learn, stop, are killed, and resume as if nothing had happened."""

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from v4jax import presets
from v4jax.checkpoints import random_release
from v4jax_train import journal

STEPS = 30
GUIDE = (Path(__file__).parent.parent / "docs" / "finetune.md").read_text()
TINY = presets.get("tiny")
SMALL = dataclasses.replace(TINY, layers=TINY.layers[:2], num_nextn_predict_layers=0)
WORDS = [
    *("the", "cat", "sat", "on", "the", "mat", "and", "looked", "at", "the", "moon"),
    *("while", "the", "wind", "went", "over", "the", "hill"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    random_release.make_checkpoint(directory, SMALL, 0)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows: list[dict[str, Any]] = []
    for i in range(24):
        words = WORDS[i % 7 :] * (1 + i % 3)
        messages = [
            {"role": "user", "content": " ".join(words[:3])},
            {"role": "assistant", "content": " ".join(words)},
        ]
        rows.append({"messages": messages} if i % 2 else {"text": " ".join(words)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def lora_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "lora.toml"
    file.write_text(
        f"""
        [model]
        dtype = "float32"
        [data]
        seq_len = 256
        thinking_mode = "chat"
        [adapter]
        targets = "attn+shared"
        rank = 4
        dropout = 0.1
        [optimizer]
        rate = 1e-2
        warmup = 2
        [steps]
        steps = {STEPS}
        batch = 2
        parts = 2
        [checkpoints]
        every = 2
        """
    )
    return file


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "v4jax_train", *map(str, args)]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One device, as on a laptop, and a compilation cache that the runs share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        yield


def run(*args: Any, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command(*args), capture_output=True, text=True)
    assert result.returncode == status, result.stderr[-3000:]
    return result


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in journal.read(directory, "step")]


@pytest.fixture(scope="module")
def uninterrupted(model: Path, data: Path, lora_recipe: Path, tmp_path_factory: Any) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = run(lora_recipe, "--model", model, "--data", data, "--out", out)
    assert f"Ended after step {STEPS}" in result.stdout
    return out


@pytest.mark.slow
def test_a_run_records_every_step_and_learns(uninterrupted: Path) -> None:
    lines = journal.read(uninterrupted, "step")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    for line in lines:
        assert line["gradient_norm"] > 0
        assert line["tokens_seen"] >= line["tokens_trained"] > 0
        assert line["tokens_per_second_per_device"] > 0
        assert not line["skipped"]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(
    uninterrupted: Path, model: Path, data: Path, lora_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    args = (lora_recipe, "--model", model, "--data", data, "--out", out)
    process = subprocess.Popen(command(*args), stderr=subprocess.DEVNULL)
    # Kill it after a state is saved and before the end.
    while process.poll() is None and not (out / "states" / "2").is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # At least the next twenty steps are compared.
    assert len(losses(out)) <= STEPS - 20
    run("resume", out)
    assert losses(out) == losses(uninterrupted)


@pytest.mark.slow
def test_a_run_saves_its_state_on_sigterm_and_resumes(
    uninterrupted: Path, model: Path, data: Path, lora_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ended"
    args = (lora_recipe, "--model", model, "--data", data, "--out", out)
    process = subprocess.Popen(command(*args), stdout=subprocess.PIPE)
    while process.poll() is None and not (out / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143
    assert b"'v4jax-train resume' continues it" in output
    assert 0 < len(losses(out)) < STEPS
    run("resume", out)
    assert losses(out) == losses(uninterrupted)


@pytest.mark.slow
def test_the_guides_commands_run(
    model: Path, data: Path, lora_recipe: Path, tmp_path: Path
) -> None:
    """In order, on a small model and with a small recipe of that name."""
    (tmp_path / "configs").mkdir()
    short = lora_recipe.read_text().replace(f"steps = {STEPS}", "steps = 4")
    (tmp_path / "configs" / "train_lora.toml").write_text(short)
    (tmp_path / "DIR").symlink_to(model)
    for name in ("chats.jsonl", "held_out.jsonl"):
        shutil.copy(data, tmp_path / name)
    commands = re.findall(r"^(v4jax(?:-train)?) (.*)$", GUIDE, re.MULTILINE)
    assert len(commands) == 8
    for program, args in commands:
        module = {"v4jax": "v4jax", "v4jax-train": "v4jax_train"}[program]
        argv = [sys.executable, "-m", module, *shlex.split(args)]
        result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{program} {args}: {result.stderr[-3000:]}"
    assert list((tmp_path / "PEFT_DIR").glob("*.safetensors"))
    assert list((tmp_path / "HF_DIR").glob("*.safetensors"))
