"""Interrupted, invalid and damaged conversions: nothing is lost, and errors are helpful."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from tests import checkpoints
from tests.test_convert import assert_same_checkpoint, contents, run, write_release
from v4jax.checkpoints import convert, native, release_weights, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import open_safetensors


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "source")


@pytest.mark.parametrize("command", ["convert", "export"])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, command):
    source = write_release(tmp_path / "source", cfg=checkpoints.tiny_dspark(), shards=3)
    if command == "export":
        convert.convert(source, tmp_path / "native")
        source = tmp_path / "native"
    expected, target = tmp_path / "expected", tmp_path / "target"
    steps = []
    getattr(convert, command)(source, expected, progress=lambda *args: steps.append(args))
    for stop in (1, len(steps) // 2, 20):
        result = run(command, source, target, stop)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert not target.exists()
        scratch = unfinished.scratch(target)
        assert not native.is_native(scratch)
        for load in (release_weights.load, native.load):
            for path in (scratch, scratch / "result"):
                with pytest.raises(CheckpointError, match="is unfinished"):
                    load(path, dtype=jnp.bfloat16, keep_quantised=True)
    result = run(command, source, target, 0)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) < len(steps), "no work of the killed runs was reused"
    assert contents(target) == contents(expected)
    assert not unfinished.scratch(target).exists()


def assert_rejected(message: str, source: Any, target: Path, weights: Any = "keep") -> None:
    """Conversion raises with this message and leaves no new files."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert.convert(source, target, weights=weights)
    assert sorted(target.parent.iterdir()) == before


def test_invalid_conversions_are_rejected_before_anything_is_written(released, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert_rejected("full: exists", released, tmp_path / "full")
    assert_rejected("no such file", tmp_path / "nothing", tmp_path / "new")
    assert_rejected("is not a checkpoint", tmp_path / "full", tmp_path / "new")
    convert.convert(released, tmp_path / "native")
    assert_rejected("is already a native checkpoint", tmp_path / "native", tmp_path / "new")
    result = run("convert", released, tmp_path / "new", 0, "int4")
    assert "ValueError: weights is 'int4'; it must be one of" in result.stderr
    with pytest.raises(CheckpointError, match="is not a native checkpoint"):
        convert.export(released, tmp_path / "new")
    with pytest.raises(CheckpointError, match="full: exists"):
        convert.export(tmp_path / "native", tmp_path / "full")


def test_a_full_disk_is_reported_with_needed_and_free_bytes(released, tmp_path, monkeypatch):
    convert.convert(released, tmp_path / "native")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=9, used=5, free=1234))
    assert_rejected(r"[\d,]{7,} bytes are needed and 1,234 are free", released, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"[\d,]{7,} bytes are needed and 1,234 are free"):
        convert.export(tmp_path / "native", tmp_path / "new")
    assert not unfinished.scratch(tmp_path / "new").exists()


def test_unfinished_work_is_not_resumed_for_another_source_or_other_weights(tmp_path):
    source, target = write_release(tmp_path / "source"), tmp_path / "target"
    assert run("convert", source, target, 150).returncode == -signal.SIGKILL
    assert_rejected("started from other files or with other settings", source, target, "float32")
    shard = next(source.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    assert_rejected("started from other files or with other settings", source, target)
    convert.convert(source, tmp_path / "native")
    with pytest.raises(CheckpointError, match="started from other files"):
        convert.export(tmp_path / "native", target)


def test_two_processes_cannot_work_on_the_same_target(tmp_path):
    with (
        unfinished.begin(tmp_path / "target", "convert", "a"),
        pytest.raises(CheckpointError, match="another process"),
        unfinished.begin(tmp_path / "target", "convert", "a"),
    ):
        pass


def test_a_truncated_journal_loses_only_its_last_line(tmp_path):
    target = tmp_path / "target"
    with contextlib.suppress(KeyboardInterrupt), unfinished.begin(target, "convert", "a") as work:
        work.add("one")
        work.add("two")
        raise KeyboardInterrupt
    journal = unfinished.scratch(target) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-2])
    with unfinished.begin(target, "convert", "a") as work:
        assert work.done == {"one"}
        work.add("three")
    with unfinished.begin(target, "convert", "a") as work:
        assert work.done == {"one", "three"}


@pytest.mark.parametrize(
    "damage", ["no chunk", "short chunk", "no array", "other shape", "version"]
)
def test_a_damaged_native_checkpoint_is_rejected(released, tmp_path, damage):
    target = tmp_path / "native"
    convert.convert(released, target)
    norm = target / native.WEIGHTS / "norm_D"
    if damage == "no chunk":
        (norm / "0").unlink()
    if damage == "short chunk":
        (norm / "0").write_bytes(b"12")
    if damage == "no array":
        shutil.rmtree(norm)
    if damage == "other shape":
        array = json.loads((norm / ".zarray").read_text())
        (norm / ".zarray").write_text(json.dumps(array | {"shape": [64], "chunks": [64]}))
    if damage == "version":
        (target / native.MANIFEST).write_text('{"version": 99}')
    with pytest.raises(CheckpointError, match=r"norm_D|version 99"):
        native.load(target, dtype=jnp.bfloat16, keep_quantised=True)


@pytest.mark.parametrize("weights", ["keep", "float32"])
def test_scales_that_are_nan_stop_the_conversion(tmp_path, weights):
    source = write_release(tmp_path / "source", shards=1)
    [file] = source.glob("*.safetensors")
    name = "layers.3.attn.wkv.scale"
    tensors = open_safetensors(file)
    start = file.stat().st_size - sum(tensors.info(name).nbytes for name in tensors.names)
    with file.open("r+b") as raw:
        raw.seek(start + tensors.info(name).start)
        raw.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"layers\.3\.attn\.wkv\.scale"):
        convert.convert(source, tmp_path / "native", weights=weights)
    assert not (tmp_path / "native").exists()


def command(*arguments: Any) -> Any:
    line = [sys.executable, "-m", "v4jax", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_converts_and_exports_and_reports_errors_in_one_line(released, tmp_path):
    target, exported = tmp_path / "native", tmp_path / "exported"
    assert command("convert", released, target).returncode == 0
    assert command("export", target, exported).returncode == 0
    assert_same_checkpoint(released, exported)
    result = command("convert", released, target)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"v4jax convert: {target}: exists; choose another place, or remove it first."
    )
