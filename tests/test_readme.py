"""Every command and every block of Python in the README runs, but for those on the server."""

import re
import shlex
from pathlib import Path

import pytest

from tests.checkpoints import tiny
from v4jax import presets
from v4jax.__main__ import main
from v4jax.checkpoints import random_release

ROOT = Path(__file__).parent.parent
# `test_serve_readme` runs the blocks of the section on the server.
TEXT = re.sub(r"^## Serve\n.*?(?=^## )", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind != "python"
    for line in block.splitlines()
]
V4JAX = [command[1:] for command in COMMANDS if command[0] == "v4jax"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the paths that the README names; its checkpoint is a random one."""
    path = tmp_path_factory.mktemp("readme")
    random_release.make_checkpoint(path / "HF_DIR", tiny(), 0)
    (path / "path" / "to").mkdir(parents=True)
    (path / "path" / "to" / "checkpoint").symlink_to(path / "HF_DIR")
    return path


@pytest.fixture
def here(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)


def test_every_command_is_tested_here() -> None:
    assert V4JAX
    assert {command[0] for command in COMMANDS} == {"make", "v4jax"}


# In the README's order: what one command writes, the next one reads.
@pytest.mark.parametrize("command", V4JAX, ids=" ".join)
@pytest.mark.usefixtures("here")
def test_commands_run(command: list[str]) -> None:
    assert main(command) == 0


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"`?make ([\w-]+)", TEXT)
    assert {"demo", "test"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
@pytest.mark.usefixtures("here")
def test_python_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)


def test_named_files_exist() -> None:
    named = set(re.findall(r"`([\w/.-]+\.(?:md|ipynb)|[\w-]+/)`", TEXT))
    assert {"docs/finetune.md", "docs/architecture.md", "examples/quickstart.ipynb"} <= named
    for name in named:
        assert (ROOT / name).exists(), name


def test_presets_are_named() -> None:
    named = {name.lower() for name in re.findall(r"\b(?:Flash|Pro)\b(?:-\w+)?", TEXT)}
    # The other presets are for trying things out.
    assert named == set(presets.names()) - {"tiny", "bench"}
