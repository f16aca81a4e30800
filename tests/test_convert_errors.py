"""Conversions that are interrupted, refused or damaged: no harm, no loss, a sentence that helps."""

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
    whole, target = tmp_path / "whole", tmp_path / "target"
    steps = []
    getattr(convert, command)(source, whole, progress=lambda *args: steps.append(args))
    for stop in (1, len(steps) // 2, 20):
        ended = run(command, source, target, stop)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not target.exists()
        left = unfinished.scratch(target)
        assert not native.is_native(left)
        for read in (release_weights.load, native.load):
            for place in (left, left / "result"):
                with pytest.raises(CheckpointError, match="is unfinished"):
                    read(place, dtype=jnp.bfloat16, keep_quantised=True)
    ended = run(command, source, target, 0)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[0]) < len(steps), "nothing was taken up from the runs before"
    assert contents(target) == contents(whole)
    assert not unfinished.scratch(target).exists()


def refused(says: str, source: Any, target: Path, weights: Any = "keep") -> None:
    """Conversion raises, the message says so, and nothing is left beside what was there."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(CheckpointError, match=says):
        convert.convert(source, target, weights=weights)
    assert sorted(target.parent.iterdir()) == before


def test_what_cannot_be_converted_is_refused_before_anything_is_written(released, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("full: exists", released, tmp_path / "full")
    refused("no such file", tmp_path / "nothing", tmp_path / "new")
    refused("is not a checkpoint", tmp_path / "full", tmp_path / "new")
    convert.convert(released, tmp_path / "native")
    refused("is already a native checkpoint", tmp_path / "native", tmp_path / "new")
    asked = run("convert", released, tmp_path / "new", 0, "int4")
    assert "ValueError: weights is 'int4'; it must be one of" in asked.stderr
    with pytest.raises(CheckpointError, match="is not a native checkpoint"):
        convert.export(released, tmp_path / "new")
    with pytest.raises(CheckpointError, match="full: exists"):
        convert.export(tmp_path / "native", tmp_path / "full")


def test_a_full_disk_is_told_with_both_numbers_of_bytes(released, tmp_path, monkeypatch):
    convert.convert(released, tmp_path / "native")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=9, used=5, free=1234))
    refused(r"[\d,]{7,} bytes are needed and 1,234 are free", released, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"[\d,]{7,} bytes are needed and 1,234 are free"):
        convert.export(tmp_path / "native", tmp_path / "new")
    assert not unfinished.scratch(tmp_path / "new").exists()


def test_unfinished_work_is_not_taken_up_for_another_source_or_other_weights(tmp_path):
    source, target = write_release(tmp_path / "source"), tmp_path / "target"
    assert run("convert", source, target, 150).returncode == -signal.SIGKILL
    refused("started from other files or with other settings", source, target, "float32")
    shard = next(source.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    refused("started from other files or with other settings", source, target)
    convert.convert(source, tmp_path / "native")
    with pytest.raises(CheckpointError, match="started from other files"):
        convert.export(tmp_path / "native", target)


def test_two_processes_do_not_work_on_one_target(tmp_path):
    with (
        unfinished.begin(tmp_path / "target", "convert", "a"),
        pytest.raises(CheckpointError, match="another process"),
        unfinished.begin(tmp_path / "target", "convert", "a"),
    ):
        pass


def test_a_journal_cut_off_in_a_line_loses_that_line_only(tmp_path):
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
def test_a_damaged_native_checkpoint_is_refused(released, tmp_path, damage):
    made = tmp_path / "native"
    convert.convert(released, made)
    norm = made / native.WEIGHTS / "norm_D"
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
        (made / native.MANIFEST).write_text('{"version": 99}')
    with pytest.raises(CheckpointError, match=r"norm_D|version 99"):
        native.load(made, dtype=jnp.bfloat16, keep_quantised=True)


@pytest.mark.parametrize("weights", ["keep", "float32"])
def test_scales_that_are_no_numbers_stop_the_conversion(tmp_path, weights):
    source = write_release(tmp_path / "source", shards=1)
    [file] = source.glob("*.safetensors")
    name = "layers.3.attn.wkv.scale"
    opened = open_safetensors(file)
    start = file.stat().st_size - sum(opened.info(name).nbytes for name in opened.names)
    with file.open("r+b") as raw:
        raw.seek(start + opened.info(name).start)
        raw.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"layers\.3\.attn\.wkv\.scale"):
        convert.convert(source, tmp_path / "native", weights=weights)
    assert not (tmp_path / "native").exists()


def command(*arguments: Any) -> Any:
    line = [sys.executable, "-m", "v4jax", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_converts_and_exports_and_tells_mistakes_in_a_line(released, tmp_path):
    made, exported = tmp_path / "native", tmp_path / "exported"
    assert command("convert", released, made).returncode == 0
    assert command("export", made, exported).returncode == 0
    assert_same_checkpoint(released, exported)
    ended = command("convert", released, made)
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        f"v4jax convert: {made}: exists; choose another place, or remove it first."
    )
