"""Digests stored next to files detect every flipped bit, in the files and in themselves."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from v4jax.checkpoints import checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "0a1b").write_bytes(np.random.default_rng(0).bytes(3000))
    (tmp_path / "state" / "empty").touch()
    (tmp_path / "notes").write_text('{"step": 3}')
    checksums.write(tmp_path)
    return tmp_path


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_unchanged_files_are_undamaged(folder: Path) -> None:
    assert checksums.damage(folder) is None
    # Writing again does not include the digests themselves.
    before = (folder / checksums.FILE).read_bytes()
    checksums.write(folder)
    assert (folder / checksums.FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["state/d/0a1b", "notes"])
def test_a_flipped_bit_in_a_file_is_detected(name: str, folder: Path) -> None:
    bits = (folder / name).stat().st_size * 8
    for bit in (0, bits // 2, bits - 1):
        flip(folder / name, bit)
        assert checksums.damage(folder) == name
        flip(folder / name, bit)
    assert checksums.damage(folder) is None


def test_any_flipped_bit_in_the_digests_is_detected(folder: Path) -> None:
    file = folder / checksums.FILE
    for bit in range(file.stat().st_size * 8):
        flip(file, bit)
        assert checksums.damage(folder) is not None, bit
        flip(file, bit)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "notes").unlink(), "notes"),
        (lambda folder: (folder / "notes").rename(folder / "noted"), "noted"),
        (lambda folder: (folder / "state" / "more").touch(), "state/more"),
        (lambda folder: (folder / checksums.FILE).write_text(""), "notes"),
        (lambda folder: (folder / "state" / "empty").write_text("x"), "state/empty"),
    ],
)
def test_added_removed_and_changed_files_are_detected(
    change: Callable[[Path], object], name: str, folder: Path
) -> None:
    change(folder)
    assert checksums.damage(folder) == name


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_accepts_the_digests(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", checksums.FILE]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    flip(folder / "notes", 7)
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1
