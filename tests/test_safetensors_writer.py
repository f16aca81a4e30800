"""The safetensors writer: crash-safe, one tensor at a time, strict about declarations."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from v4jax.checkpoints import disk
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import TensorInfo, open_safetensors, write_safetensors

TWO = {"a": TensorInfo("F32", (4,)), "b": TensorInfo("F32", (4,))}


@pytest.mark.parametrize("before", [None, b"an older file"])
def test_an_exception_while_writing_changes_nothing(tmp_path: Path, before: bytes | None):
    target = tmp_path / "f"
    if before is not None:
        target.write_bytes(before)

    def read(name: str) -> np.ndarray:
        if name == "b":
            raise KeyboardInterrupt
        return np.zeros(4, np.float32)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(target, TWO, read)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before] * (before is not None)


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path):
    script = (
        "import os, sys, numpy as np\n"
        "from v4jax.checkpoints.safetensors_file import TensorInfo, write_safetensors\n"
        "tensors = {n: TensorInfo('F32', (4,)) for n in 'ab'}\n"
        "read = lambda n: os._exit(9) if n == 'b' else np.zeros(4, np.float32)\n"
        "write_safetensors(sys.argv[1], tensors, read)\n"
    )
    target = tmp_path / "m.safetensors"
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == 9
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors.part"]
    write_safetensors(target, TWO, lambda _: np.zeros(4, np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_file_is_renamed_only_after_it_is_synced(tmp_path: Path, monkeypatch: Any):
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("rename"), replace(self, to))[1]
    )
    write_safetensors(tmp_path / "f", TWO, lambda _: np.zeros(4, np.float32))
    assert events == ["sync", "rename", "sync"]


def test_one_tensor_is_alive_at_a_time_and_the_order_is_preserved(tmp_path: Path):
    alive: list[weakref.ref[np.ndarray]] = []
    requested: list[str] = []

    def read(name: str) -> np.ndarray:
        assert all(ref() is None for ref in alive)
        array = np.zeros(4, np.float32)
        alive.append(weakref.ref(array))
        requested.append(name)
        return array

    write_safetensors(tmp_path / "f", {"b": TWO["b"], "a": TWO["a"]}, read)
    assert requested == ["b", "a"]
    assert open_safetensors(tmp_path / "f").names == ("b", "a")


def test_a_full_disk_is_detected_before_any_work(tmp_path: Path, monkeypatch: Any):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"\d+ bytes are needed and 10 are free"):
        write_safetensors(tmp_path / "f", TWO, lambda _: pytest.fail("work was done"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("array", "received"),
    [
        (np.zeros(4), r"read as float64 \[4\]"),
        (np.zeros((2, 2), np.float32), r"read as float32 \[2, 2\]"),
    ],
)
def test_an_array_that_differs_from_its_declaration_is_rejected(
    tmp_path: Path, array: np.ndarray, received: str
):
    with pytest.raises(CheckpointError, match=rf"'a' was declared F32 \[4\], but {received}"):
        write_safetensors(tmp_path / "f", TWO, lambda _: array)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "info", "reason"),
    [
        ("__metadata__", TensorInfo("U8", (1,)), "can be named __metadata__"),
        ("w", TensorInfo("F6", (1,)), "'w' has dtype 'F6'"),
        ("w", TensorInfo("F4", (3,)), "last dim must be even"),
    ],
)
def test_an_invalid_declaration_is_rejected(
    tmp_path: Path, name: str, info: TensorInfo, reason: str
):
    with pytest.raises(CheckpointError, match=reason):
        write_safetensors(tmp_path / "f", {name: info}, lambda _: np.zeros(1, np.uint8))


def test_a_directory_as_target_is_rejected(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is a directory"):
        write_safetensors(tmp_path, TWO, lambda _: pytest.fail("work was done"))


def test_strided_arrays_are_written_in_order(tmp_path: Path):
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    write_safetensors(tmp_path / "f", {"w": TensorInfo("I32", (4, 3))}, lambda _: array)
    np.testing.assert_array_equal(open_safetensors(tmp_path / "f").read("w"), array)
