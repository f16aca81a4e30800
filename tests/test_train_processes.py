"""Runs on several processes: one that dies ends all, and a restart continues exactly."""

import dataclasses
import json
import os
import queue
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
from v4jax_train import journal, processes, watchdog

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


def start(count: int, *arguments: Any) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = f"--xla_force_host_platform_device_count={DEVICES // count}"
    flags = f"{quick.FLAGS} {each}"
    environment = os.environ | quick.ENVIRONMENT | {"XLA_FLAGS": flags}
    where = ["--coordinator", f"localhost:{port}", "--processes", str(count)]
    command = [sys.executable, "-m", "v4jax_train", *map(str, arguments)]
    return [
        subprocess.Popen(
            [*command, *where, "--process", str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def kill_one(running: list[subprocess.Popen[str]]) -> None:
    """Kill the second process; the first notices, says so and ends too."""
    running[1].kill()
    killed = time.monotonic()
    _, stderr = running[0].communicate(timeout=60)
    assert time.monotonic() - killed < 30
    running[1].communicate()
    assert running[0].returncode == 1
    (message,) = [line for line in stderr.splitlines() if "has ended" in line]
    assert message.startswith(f"v4jax-train: process 1 on {socket.gethostname()} has ended, so")
    assert "Traceback" not in stderr


def finish(running: list[subprocess.Popen[str]]) -> None:
    warned = []
    for process in running:
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
        warned.append("is not used: several processes on CPUs" in stderr)
    # Several processes neither store a program nor run a stored one: that would crash them.
    assert sum(warned) == (len(running) > 1)
    if len(running) > 1:
        assert not list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*step*"))


def losses(directory: Path) -> np.ndarray:
    lines = journal.read(directory, "step")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["balance_loss"]] for line in lines])


@pytest.mark.slow
def test_after_one_of_two_processes_is_killed_they_resume_and_match_others(
    arguments: list[str], tmp_path: Path
) -> None:
    out, wider, alone, whole, hosts = (
        tmp_path / name for name in ("two", "four", "one", "whole", "hosts")
    )
    local = ["--checkpoints.local", hosts, "--checkpoints.local_every", 1]
    command = [*arguments, "--out", out, *local, "--resume"]
    running = start(2, *command)
    # Kill one after a state is saved, and a later one on the hosts.
    while all(x.poll() is None for x in running) and len(list(hosts.glob("*/*/3.*s"))) < 2:
        time.sleep(0.01)
    kill_one(running)
    before = journal.read(out, "step")
    assert 3 <= len(before) < STEPS
    shutil.copytree(out, wider)
    finish(start(2, *command))
    resumed, lines = losses(out), journal.read(out, "step")
    # The step after the last saved state was not repeated.
    assert lines[:3] == before[:3]
    assert resumed[-1, 0] < resumed[0, 0]
    finish(start(2, *arguments, "--out", whole))
    np.testing.assert_array_equal(resumed, losses(whole))

    finish(start(4, "resume", wider))
    finish(start(1, *arguments, "--out", alone))
    # Others add up in a different order: rounding differs in a step from the same state. It grows
    # because Muon's steps have the same length for any gradient.
    every = json.loads((out / "recipe.json").read_text())["checkpoints"]["every"]
    for other, steps in ((losses(wider), every + 1), (losses(alone), every)):
        np.testing.assert_allclose(other[:steps], resumed[:steps], rtol=1e-5)
        np.testing.assert_allclose(other, resumed, rtol=1e-3)


def test_a_run_without_all_processes_ends_and_names_the_missing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = ["--coordinator", f"localhost:{port}", "--processes", "3", "--process", "0"]
    command = [sys.executable, "-m", "v4jax_train", "resume", str(tmp_path), *where, "--wait", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(
        "v4jax-train resume: After 1 s 2 of 3 processes are missing: 1, 2. Those that have come: 0"
    )
    assert result.stderr.count("\n") == 1


def test_the_watchdog_knows_the_usual_time_of_a_step() -> None:
    reasons: queue.Queue[str] = queue.Queue()
    with watchdog.Watchdog(3.0, 0.4, reasons.put) as dog:
        for seconds in (0.1, 0.2, 9.0):
            dog.step(seconds)
        assert dog.limit == pytest.approx(0.6)
        with dog.paused():
            time.sleep(0.8)
        assert reasons.empty()
        assert reasons.get(timeout=30).startswith("no step has ended for")


def test_a_run_without_progress_ends_with_the_stacks_of_its_threads() -> None:
    program = """
import time
from v4jax_train import processes, watchdog

def stuck():
    time.sleep(60)

with watchdog.Watchdog(2.0, 0.2, processes.end_stalled):
    stuck()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == processes.STALLED == 124
    assert "no step has ended for 0 s in process 0" in result.stderr
    assert ", line 6 in stuck\n" in result.stderr
