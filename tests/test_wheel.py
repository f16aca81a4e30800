"""The wheel has everything, and runs in an environment that has nothing else.

The second test takes the dependencies from the package index or pip's cache: it is the only one
that shows that those declared are enough.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import house, quick

ROOT = house.ROOT
# Folders of the source tree, and what they are called in the wheel.
FOLDERS = house.PACKAGES | {"configs": "v4jax_configs"}
BUILD = ("pyproject.toml", "README.md", "LICENSE", *FOLDERS)


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that sees neither this environment nor the source tree."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quick.ENVIRONMENT
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves its own folders behind.
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for name in BUILD:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", source.parent, cwd=source)
    (made,) = source.parent.glob("*.whl")
    return made


def test_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    expected = {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected


@pytest.mark.slow
def test_wheel_alone_runs_the_command(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    binaries = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    run(binaries / "python", "-m", "pip", "install", "--quiet", "--no-compile", wheel, cwd=tmp_path)
    where = run(binaries / "python", "-c", "import v4jax; print(v4jax.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))
    assert "159,609,485,896" in run(binaries / "v4jax", "inspect", "flash", cwd=tmp_path)
    assert "tokens/s" in run(binaries / "v4jax", "demo", cwd=tmp_path)
    words = ("plot", tmp_path)
    done = subprocess.run([binaries / "v4jax-train", *words], capture_output=True, text=True)
    assert (done.returncode, "pip install 'v4jax[train]'" in done.stderr) == (1, True), done.stderr
