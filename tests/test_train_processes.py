"""Runs on several processes: the same losses, a checkpoint, an exact resume on as many or more."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import quick
from v4jax import presets
from v4jax.checkpoints import random_release
from v4jax_train import journal

STEPS, DEVICES = 6, 8
TINY = presets.get("tiny")
SMALL = dataclasses.replace(TINY, layers=TINY.layers[1:2], num_nextn_predict_layers=0)
RECIPE = """
[model]
dtype = "float32"
[data]
seq_len = 128
[full]
[optimizer]
rule = "muon"
rate = 3e-4
[losses]
balance = 1e-4
bias_speed = 1e-3
[steps]
steps = 6
batch = 8
[checkpoints]
every = 2
[mesh]
expert = 4
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command's arguments except the run's directory; compiled programs are cached."""
    place = tmp_path_factory.mktemp("inputs")
    random_release.make_checkpoint(place / "model", SMALL, 0)
    rows = [{"text": "the cat sat on the mat " * (1 + i % 9)} for i in range(40)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.toml").write_text(RECIPE)
    options = {"--model": place / "model", "--data": place / "data.jsonl"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "programs"))
        yield [str(place / "recipe.toml"), *(str(x) for pair in options.items() for x in pair)]


def start(processes: int, *arguments: Any) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    flags = f"{quick.FLAGS} {each}"
    environment = os.environ | quick.ENVIRONMENT | {"XLA_FLAGS": flags}
    where = ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
    command = [sys.executable, "-m", "v4jax_train", *map(str, arguments)]
    return [
        subprocess.Popen(
            [*command, *where, "--process", str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    warned = []
    for process in processes:
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
        warned.append("is not used: several processes on CPUs" in stderr)
    # Several processes neither store a program nor run a stored one: that would crash them.
    assert sum(warned) == (len(processes) > 1)
    if len(processes) > 1:
        assert not list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*step*"))


def losses(directory: Path) -> np.ndarray:
    lines = journal.read(directory, "step")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["balance_loss"]] for line in lines])


@pytest.mark.slow
def test_two_killed_processes_resume_and_match_one_process(
    arguments: list[str], tmp_path: Path
) -> None:
    out, wider, alone = (tmp_path / name for name in ("two", "four", "one"))
    processes = start(2, *arguments, "--out", out)
    # Kill them after a state is saved.
    while all(p.poll() is None for p in processes) and not (out / "states" / "2").is_dir():
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    before = losses(out)
    assert 0 < len(before) < STEPS
    shutil.copytree(out, wider)
    finish(start(2, "resume", out))
    resumed = losses(out)
    assert len(resumed) == STEPS
    assert resumed[-1, 0] < resumed[0, 0]
    every = json.loads((out / "recipe.json").read_text())["checkpoints"]["every"]
    np.testing.assert_array_equal(resumed[:every], before[:every])

    finish(start(4, "resume", wider))
    finish(start(1, *arguments, "--out", alone))
    # Others add up in a different order: rounding differs in a step from the same state. It grows
    # because Muon's steps have the same length for any gradient.
    for other, steps in ((losses(wider), every + 1), (losses(alone), every)):
        np.testing.assert_allclose(other[:steps], resumed[:steps], rtol=1e-5)
        np.testing.assert_allclose(other, resumed, rtol=1e-3)
