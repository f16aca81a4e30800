"""Jobs of `v4jax launch`, and what the command prints for them."""

from pathlib import Path
from typing import Any

import pytest

from v4jax.__main__ import main
from v4jax.launch import topology
from v4jax.launch.job import Job
from v4jax.launch.topology import Topology

Capsys = pytest.CaptureFixture[str]
RECIPE = """\
# It's a "recipe" with a back\\slash, $HOME and {braces}.
out = "/runs/a"
model = {path = "/runs/model"}
data = {files = ["/runs/chats.jsonl"]}
checkpoints = {local = "/local"}
[mesh]
fsdp = 4
"""
TPU_SLICES = [Topology(kind, shape) for kind in topology.TPUS for shape in topology.shapes(kind)]


def make(where: str | Topology, slices: int = 1, **settings: Any) -> Job:
    """A job like that of the command with RECIPE."""
    where = topology.read(where) if isinstance(where, str) else where
    values = {"recipe": Path("its recipe.toml"), "text": RECIPE, "flags": (), "local": "/local"}
    values |= {"name": "run", "restarts": 3, "image": "registry/image:tag"} | settings
    return Job(topology=where, slices=slices, **values)


def write_recipe(directory: Path) -> Path:
    path = directory / "Train_LoRA.toml"
    path.write_text(RECIPE)
    return path


def printed(capsys: Capsys, *args: Any) -> str:
    """What a dry run prints."""
    assert main(["launch", *map(str, args), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def refused(capsys: Capsys, *args: Any) -> str:
    """The sentence of a command that launches nothing."""
    assert main(["launch", *map(str, args), "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err
