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
from v4jax.checkpoints import random_release
from v4jax.presets import preset
from v4jax_train import journal

STEPS, DEVICES = 6, 8
TINY = preset("tiny")
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
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command's words but for the run's directory; there is one for compiled programs."""
    place = tmp_path_factory.mktemp("inputs")
    random_release.make_checkpoint(place / "model", SMALL, 0)
    rows = [{"text": "the cat sat on the mat " * (1 + i % 9)} for i in range(40)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.toml").write_text(RECIPE)
    named = {"--model": place / "model", "--data": place / "data.jsonl"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "programs"))
        yield [str(place / "recipe.toml"), *(str(x) for pair in named.items() for x in pair)]


def start(processes: int, *words: Any) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    flags = f"{quick.FLAGS} {each}"
    environment = os.environ | quick.ENVIRONMENT | {"XLA_FLAGS": flags}
    where = ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
    command = [sys.executable, "-m", "v4jax_train", *map(str, words)]
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
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]
        warned.append("is not used: several processes on CPUs" in said)
    # Several neither keep a program nor run what another run has kept: they would die of it.
    assert sum(warned) == (len(processes) > 1)
    if len(processes) > 1:
        assert not list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*step*"))


def losses(directory: Path) -> np.ndarray:
    lines = journal.read(directory, "step")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["balance_loss"]] for line in lines])


@pytest.mark.slow
def test_two_processes_train_are_killed_and_go_on_as_one_does(
    words: list[str], tmp_path: Path
) -> None:
    out, wider, alone = (tmp_path / name for name in ("two", "four", "one"))
    processes = start(2, *words, "--out", out)
    # After a state is saved.
    while all(p.poll() is None for p in processes) and not (out / "states" / "2").is_dir():
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    before = losses(out)
    assert 0 < len(before) < STEPS
    shutil.copytree(out, wider)
    finish(start(2, "resume", out))
    found = losses(out)
    assert len(found) == STEPS
    assert found[-1, 0] < found[0, 0]
    kept = json.loads((out / "recipe.json").read_text())["checkpoints"]["every"]
    np.testing.assert_array_equal(found[:kept], before[:kept])

    finish(start(4, "resume", wider))
    finish(start(1, *words, "--out", alone))
    # Others add up in another order: rounding in a step from the same state. Muon's steps, of one
    # length whatever the gradient's, make it grow.
    for other, same in ((losses(wider), kept + 1), (losses(alone), kept)):
        np.testing.assert_allclose(other[:same], found[:same], rtol=1e-5)
        np.testing.assert_allclose(other, found, rtol=1e-3)
