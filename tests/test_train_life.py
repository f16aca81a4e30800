"""The life of a run: damaged states, changed data, two processes at once, a full disk."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests import quick
from v4jax import presets
from v4jax.__main__ import main as v4jax_main
from v4jax.adapters import updates
from v4jax.adapters.runs import BEST, STATES
from v4jax.checkpoints import random_release
from v4jax.checkpoints.disk import CheckpointError
from v4jax_train import fingerprint, journal, loop, recipe, runs
from v4jax_train.__main__ import main

TINY = presets.get("tiny")
SMALL = dataclasses.replace(TINY, layers=TINY.layers[:1], num_nextn_predict_layers=0)


def silent(_: dict[str, Any]) -> None:
    """Show nothing."""


def rows(file: Path, letters: str) -> Path:
    file.write_text("".join(json.dumps({"text": letter * 100}) + "\n" for letter in letters))
    return file


@pytest.fixture(autouse=True, scope="module")
def promotion() -> Iterator[None]:
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, training data and held-out data."""
    directory = tmp_path_factory.mktemp("life")
    random_release.make_checkpoint(directory / "model", SMALL, 0)
    rows(directory / "data.jsonl", "abcdefghijklmnop")
    rows(directory / "held_out.jsonl", "qrs")
    return directory


def settings(place: Path, out: Path, **tables: dict[str, Any]) -> recipe.Recipe:
    base: dict[str, Any] = {
        "out": str(out),
        "model": {"path": str(place / "model"), "dtype": "float32"},
        "data": {"files": [str(place / "data.jsonl")], "seq_len": 128},
        "evaluation": {"files": [str(place / "held_out.jsonl")]},
        "adapter": {"rank": 2},
        "steps": {"steps": 4, "batch": 8},
        "checkpoints": {"every": 2},
    }
    return recipe.from_table(base | tables)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run with states after 2 and 4 steps, for tests to copy."""
    assert loop.begin(settings(place, place / "finished"), show=silent).why == "finished"
    return place / "finished"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def damage(run: Path, step: int = 4) -> Path:
    """Flip a bit in the largest file of a state."""
    files = [file for file in (run / STATES / str(step)).rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    flip(file)
    return file


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in journal.read(directory, "step")]


def test_damage_to_any_file_of_a_state_is_detected(run: Path, place: Path) -> None:
    for file in sorted(file for file in (run / STATES / "4").rglob("*") if file.is_file()):
        if file.stat().st_size == 0:
            continue
        flip(file)
        with pytest.raises(CheckpointError, match=r"is damaged: .* the state of step 2 is intact"):
            runs.choose_state(run)
        flip(file)
    assert runs.choose_state(run) == 4


def error_of(capsys: pytest.CaptureFixture[str], command: Callable[..., int], *args: Any) -> str:
    """The one-line error of a command that fails."""
    assert command([str(arg) for arg in args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_every_command_names_a_damaged_state_and_an_intact_one(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = damage(run)
    model, out = place / "model", tmp_path / "out"
    for command, args in (
        (main, ("resume", run)),
        (main, ("eval", run)),
        (v4jax_main, ("export-adapter", run, out)),
        (v4jax_main, ("merge", model, run, out, "--weights", "bfloat16")),
        (v4jax_main, ("generate", model, "-p", "a", "--adapter", run)),
    ):
        error = error_of(capsys, command, *args)
        assert f"{run / STATES / '4'}: is damaged: {file.relative_to(run / STATES / '4')}" in error
        assert "--state 2" in error
        assert not out.exists()
    assert not list(tmp_path.glob("out*"))


def test_an_older_state_is_read_if_named(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = updates.read(run / STATES / "2", SMALL)
    damage(run)
    again = updates.read(run / STATES / "2", SMALL)
    for a, b in zip(jax.tree.leaves(named), jax.tree.leaves(again), strict=True):
        assert (a == b).all() if hasattr(a, "all") else a == b
    assert v4jax_main(["export-adapter", str(run), str(tmp_path / "out"), "--state", "2"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--state", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    error = error_of(capsys, main, "resume", run, "--state", "3")
    assert "has no state of step 3; it has 2, 4." in error


def test_resuming_from_an_older_state_repeats_the_same_run(run: Path, finished: Path) -> None:
    damage(run)
    assert loop.resume(run, show=silent, step=2).step == 4
    assert losses(run) == losses(finished)
    assert runs.choose_state(run) == runs.choose_state(run, best=True) == 4


def test_a_run_without_an_intact_state_says_so(run: Path) -> None:
    damage(run, 2)
    damage(run, 4)
    with pytest.raises(CheckpointError, match="no other state is intact"):
        runs.choose_state(run)
    shutil.rmtree(run / STATES / "2")
    with pytest.raises(CheckpointError, match="no other state is intact"):
        runs.choose_state(run)


def test_the_best_state_has_checksums_too(run: Path) -> None:
    assert runs.choose_state(run, best=True) == 4
    file = next((run / "best" / "4" / "state").rglob("d/*"))
    flip(file)
    with pytest.raises(CheckpointError, match="best/4: is damaged"):
        runs.evaluate(run, best=True)


def test_a_state_without_checksums_is_read_with_a_warning(run: Path) -> None:
    (run / STATES / "4" / "SHA256SUMS").unlink()
    with pytest.warns(UserWarning, match="so damage would go unnoticed"):
        assert runs.choose_state(run) == 4


@pytest.mark.parametrize("name", ["data", "held_out"])
def test_a_run_does_not_resume_with_changed_data_unless_asked(
    name: str, finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("data", "held_out"):
        shutil.copy(place / f"{file}.jsonl", tmp_path / f"{file}.jsonl")
    files = {"files": [str(tmp_path / "data.jsonl")], "seq_len": 128}
    held_out = {"files": [str(tmp_path / "held_out.jsonl")]}
    moved = settings(place, tmp_path / "run", data=files, evaluation=held_out)
    run = shutil.copytree(finished, tmp_path / "run")
    runs.write_recipe(run, moved)
    # Moved, but the same.
    assert loop.resume(run, show=silent).step == 4
    changed = tmp_path / f"{name}.jsonl"
    rows(changed, "zyx")
    error = error_of(capsys, main, "resume", run)
    assert error.startswith(f"v4jax-train resume: {changed}: has changed since the run began")
    assert "--changed-data" in error
    assert main(["resume", str(run), "--changed-data"]) == 0
    # From now on it is the run's data.
    assert main(["resume", str(run)]) == 0


def test_damaged_or_missing_fingerprints_are_reported(run: Path) -> None:
    (run / fingerprint.FILE).write_text("[{")
    with pytest.raises(ValueError, match=r"data\.json: is damaged"):
        loop.resume(run, show=silent)
    (run / fingerprint.FILE).write_text("[]")
    with pytest.raises(ValueError, match="has 0 files, but the recipe has 2"):
        loop.resume(run, show=silent)
    (run / fingerprint.FILE).unlink()
    with pytest.warns(UserWarning, match="whether its data has changed is unknown"):
        loop.resume(run, show=silent)


HOLDER = """
import sys, time; from pathlib import Path; from v4jax_train import runs
with runs.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_belongs_to_one_living_process(
    place: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    resume = lambda directory: loop.resume(directory, show=silent)
    begin = lambda directory: loop.begin(settings(place, directory), show=silent)
    for directory, start in ((run, resume), (new, begin)):
        command = [sys.executable, "-c", HOLDER, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            before = sorted(directory.rglob("*"))
            with pytest.raises(CheckpointError, match="another process is working there"):
                start(directory)
            assert sorted(directory.rglob("*")) == before
            holder.send_signal(signal.SIGKILL)
        assert (directory / runs.LOCK).exists()
    assert loop.resume(run, show=silent).step == 4
    assert not (run / runs.LOCK).exists()
    with runs.locked(new):
        assert runs.is_empty(new)
    assert not new.exists()


def test_a_command_that_is_started_again_continues_its_run(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loop.begin(settings(place, run), show=silent, again=True).step == 4
    other = settings(place, run, optimizer={"rate": 1e-3}, adapter={"rank": 4})
    with pytest.raises(ValueError, match=r"another recipe \(adapter\.rank, optimizer\.rate\)"):
        loop.begin(other, show=silent, again=True)
    # It was killed before it had begun.
    new = tmp_path / "new"
    new.mkdir()
    (new / fingerprint.FILE).write_text("[]")
    assert loop.begin(settings(place, new), show=silent, again=True).step == 4
    assert main(["plot", str(new)]) == 0
    assert capsys.readouterr().out.startswith("Goodput ")


def test_a_run_that_cannot_start_leaves_no_directory(place: Path, tmp_path: Path) -> None:
    invalid = settings(place, tmp_path / "run", model={"path": str(tmp_path / "nothing")})
    with pytest.raises(CheckpointError, match="nothing"):
        loop.begin(invalid, show=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_a_one_line_error_and_the_old_state_survives(run: Path, place: Path) -> None:
    longer = dataclasses.replace(settings(place, run), steps=recipe.Steps(steps=6))
    runs.write_recipe(run, longer)
    # A limit on the size of each file, in kilobytes: beyond it, as if the disk were full. The
    # metrics fit. Orbax splits arrays among files as it likes, but its _sharding never fits.
    limited = f'ulimit -f 3; exec "{sys.executable}" -m v4jax_train resume "{run}"'
    result = subprocess.run(
        ["bash", "-c", limited],
        # Python does not notice that a module's bytecode was cut off.
        env=os.environ | quick.ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    # Step 6 has the best evaluation, and the best state is written first.
    assert lines == [
        f"v4jax-train resume: {run / BEST}: the state of step 6 cannot be saved: File too large."
        " The one of step 4 is intact. Free some space; 'v4jax-train resume' then continues."
    ]
    assert sorted(file.name for file in (run / STATES).iterdir()) == ["2", "4"]
    assert loop.resume(run, show=silent).step == 6
    assert runs.choose_state(run) == 6


def limit(size: int) -> None:
    """Limit the size of each file, in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def small_files() -> Iterator[None]:
    limit(100)
    yield
    limit(resource.RLIM_INFINITY)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_stops_the_metrics_and_their_file_is_named(tmp_path: Path) -> None:
    metrics = journal.Journal(tmp_path)
    for step in (0, 1):
        metrics.write("step", step, loss=1.0)
    with pytest.raises(OSError, match="No space left") as error:
        metrics.write("step", 2, loss=1.0)
    metrics.close()
    assert error.value.filename == str(tmp_path / journal.FILE)
    limit(resource.RLIM_INFINITY)
    # The incomplete line is dropped.
    journal.Journal(tmp_path, after=99).close()
    assert [line["step"] for line in journal.read(tmp_path, "step")] == [0, 1]
