"""The wheel is complete, and runs in an environment with nothing else installed.

The second test installs the dependencies from the package index or pip's cache: no other test shows
that the declared ones are enough.
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
# Source directories and their names in the wheel.
FOLDERS = house.PACKAGES | {"configs": "v4jax_configs"}
BUILD = ("pyproject.toml", "README.md", "LICENSE", *FOLDERS)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside this environment and the source tree; return its standard output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quick.ENVIRONMENT
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves directories behind.
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for name in BUILD:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", source.parent, cwd=source)
    (file,) = source.parent.glob("*.whl")
    return file


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
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
def test_the_wheel_alone_runs_the_commands(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    scripts = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", "--no-compile", wheel, cwd=tmp_path)
    location = run(scripts / "python", "-c", "import v4jax; print(v4jax.__file__)", cwd=tmp_path)
    assert location.startswith(str(tmp_path))
    assert "159,609,485,896" in run(scripts / "v4jax", "inspect", "flash", cwd=tmp_path)
    assert "tokens/s" in run(scripts / "v4jax", "demo", cwd=tmp_path)
    command = [scripts / "v4jax-train", "plot", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'v4jax[train]'" in result.stderr
