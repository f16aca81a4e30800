"""`v4jax launch`: files that each launcher accepts, in which every process has its place."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from jax.experimental import topologies

from tests import house
from tests.launches import RECIPE, TPU_SLICES, Capsys, make, printed, refused, write_recipe
from v4jax.__main__ import main
from v4jax.commands.launch import LAUNCHERS
from v4jax.launch import job, ray_script, skypilot, slurm, ssh, topology
from v4jax.launch.topology import Topology
from v4jax_train.__main__ import main as train_main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def program(directory: Path, name: str, script: str) -> None:
    """Put a program on a PATH of tests."""
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def bash(script: str, directory: Path, **variables: str) -> int:
    """The exit status of a script that finds programs in a directory first."""
    environment = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"} | variables
    words = ["bash", "-c", script]
    return subprocess.run(words, env=environment, cwd=directory, timeout=60, check=False).returncode


# What v4jax-train is called with, a line of JSON for each call.
RECORD = (
    f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    ' "$@" >> calls'
)


def calls(directory: Path) -> list[list[str]]:
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    "where", [x for x in TPU_SLICES if x.chips in (*range(4, 65), 128)], ids=str
)
def test_slices_are_those_of_the_compiler(where: Topology) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=str(where)).devices
    assert len(devices) == where.devices
    # The compiler gives a host 4 chips unless told otherwise; v6e:2x4 is also one host with 8.
    hosts = 1 if where.shape == (2, 4) else len({device.process_index for device in devices})
    assert hosts == where.hosts


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("v5p:4x4x8", (128, 32, 4)),
        ("v6e:1x1", (1, 1, 1)),
        ("v6e:2x4", (8, 1, 8)),
        ("v6e:4x4", (16, 4, 4)),
        ("tpu7x:4x4x8", (256, 32, 4)),
        ("h200:2x8", (16, 2, 8)),
        ("cpu:2x4", (8, 2, 4)),
    ],
)
def test_sizes(text: str, sizes: tuple[int, int, int]) -> None:
    where = topology.read(text)
    assert (where.devices, where.hosts, where.chips_per_host) == sizes
    assert str(where) == text


@pytest.mark.parametrize(
    "place",
    [
        ["--distributed", "--wait", "9"],
        ["--coordinator", "a:1", "--processes", "2", "--process", "0"],
        [],
    ],
)
def test_v4jax_train_accepts_the_options(place: list[str], tmp_path: Path, capsys: Capsys) -> None:
    flags = ("--model", "m", "--data", "a", "--data", "b", "--out", "/runs/a")
    command = make("cpu:2x1", flags=flags).command(tmp_path / "none.toml", *place)
    # Misuse would be status 2; this recipe does not exist.
    assert train_main(command[1:]) == 1
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "restarted", "again"),
    [(0, 0, False), (1, 0, True), (2, 0, False), (137, 2, True), (143, 2, True), (1, 3, False)],
)
def test_slurm_starts_a_failed_run_again(
    status: int, restarted: int, again: bool, tmp_path: Path
) -> None:
    program(tmp_path, "srun", f"shift; {RECORD}; exit {status}")
    program(tmp_path, "scontrol", 'echo "$@" > requeued')
    text = slurm.text(make("cpu:2x4", flags=("--out", "it's $HOME")))
    variables = {"SLURM_JOB_ID": "7"} | (
        {"SLURM_RESTART_COUNT": str(restarted)} if restarted else {}
    )
    assert bash(text, tmp_path, **variables) == status
    requeued = tmp_path / "requeued"
    assert requeued.exists() == again
    assert not again or requeued.read_text() == "requeue 7\n"
    (call,) = calls(tmp_path)
    assert call[:4] == ["v4jax-train", "its recipe.toml", "--out", "it's $HOME"]


@pytest.mark.parametrize(
    ("where", "nodes", "tasks", "gpus"),
    [("h200:2x8", 2, 8, 8), ("tpu7x:2x2x2", 2, 1, 0), ("cpu:3x1", 3, 1, 0)],
)
def test_slurm_has_a_task_for_each_gpu(where: str, nodes: int, tasks: int, gpus: int) -> None:
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", slurm.text(make(where)), re.M))
    assert (directives["nodes"], directives["ntasks-per-node"]) == (str(nodes), str(tasks))
    assert directives.get("gpus-per-node") == (str(gpus) if gpus else None)


@pytest.mark.parametrize(("first", "attempts"), [(0, 1), (2, 1), (1, 2), (143, 2)])
def test_ssh_starts_a_process_on_each_host(first: int, attempts: int, tmp_path: Path) -> None:
    program(tmp_path, "ssh", '[ "$1" = -tt ] && host=$2 bash -c "cd / && $3"')
    fails = f'if [ "$host" = b ] && [ ! -e failed ]; then touch failed; exit {first}; fi'
    program(tmp_path, "v4jax-train", f"{RECORD}; env > environment.$host; echo ran; {fails}")
    settings = {"hosts": ("me@a", "b"), "flags": ("--out", "it's $HOME")}
    assert bash(ssh.text(make("v5p:2x2x1", 2, **settings)), tmp_path) == (2 if first == 2 else 0)
    called = calls(tmp_path)
    assert len(called) == 2 * attempts
    place = ["--coordinator", "a:8482", "--processes", "2", "--process"]
    for call in called:
        assert call[:4] == ["its recipe.toml", "--out", "it's $HOME", "--resume"]
        assert call[4:-1] == place
    assert sorted(call[-1] for call in called) == sorted("01" * attempts)
    assert (tmp_path / "run-1.log").read_text() == "ran\n" * attempts
    assert "MEGASCALE_NUM_SLICES=2\n" in (tmp_path / "environment.b").read_text()


def test_skypilot_runs_the_recipe(tmp_path: Path) -> None:
    program(tmp_path, "v4jax-train", RECORD)
    task = yaml.safe_load(skypilot.text(make("h200:2x8", image="")))
    assert task["resources"]["accelerators"] == "H200:8"
    assert task["num_nodes"] == 2
    copy = tmp_path / "recipe.toml"
    script = task["run"].replace("/tmp/recipe.toml", str(copy))
    nodes = {"IPS": "10.0.0.1\n10.0.0.2", "RANK": "1"}
    variables = {f"SKYPILOT_NODE_{name}": value for name, value in nodes.items()}
    assert bash(script, tmp_path, SKYPILOT_NUM_NODES="2", **variables) == 0
    assert copy.read_text() == RECIPE
    place = ["--coordinator", "10.0.0.1:8482", "--processes", "2", "--process", "1"]
    assert calls(tmp_path) == [[str(copy), "--resume", *place]]


@pytest.mark.parametrize(
    ("where", "accelerators"), [("v5p:4x4x8", "tpu-v5p-256"), ("v6e:4x4", "tpu-v6e-16")]
)
def test_skypilot_counts_cores(where: str, accelerators: str) -> None:
    task = yaml.safe_load(skypilot.text(make(where)))
    assert task["resources"]["accelerators"] == accelerators
    assert task["num_nodes"] == 1
    assert task["run"].endswith("--distributed\n")


@dataclasses.dataclass
class Ray:
    """Ray's classes for a script, which record what they are given."""

    given: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    ended: int = 0

    def __getattr__(self, name: str) -> Any:
        def construct(*args: Any, **settings: Any) -> Any:
            self.given[name] = settings | ({"train": args[0]} if args else {})
            return types.SimpleNamespace(fit=lambda: self.given["JaxTrainer"]["train"]({}))

        return construct


@pytest.mark.parametrize(
    ("where", "slices", "scaling"),
    [
        ("tpu7x:2x2x2", 3, (6, {"use_tpu": True, "topology": "2x2x2", "type": "TPU-V7X"})),
        ("h200:2x8", 1, (2, {"use_gpu": True, "resources_per_worker": {"GPU": 8}, "type": "H200"})),
        ("cpu:2x1", 1, (2, {})),
    ],
)
@pytest.mark.parametrize("status", [0, 1])
def test_ray_trains_with_the_recipe(
    where: str,
    slices: int,
    scaling: tuple[int, dict[str, Any]],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, read = Ray(), []

    def train(words: list[str]) -> int:
        read.append((Path(words[0]).read_text("utf-8"), words[1:]))
        return status

    for name in ("ray", "ray.train", "ray.train.v2", "ray.train.v2.jax"):
        monkeypatch.setitem(sys.modules, name, ray)
    monkeypatch.setattr("v4jax_train.__main__.main", train)
    script = compile(ray_script.text(make(where, slices, flags=("--out", "/a'b"))), "ray", "exec")
    run = lambda: exec(script, {"__name__": "__main__"})
    if status:
        with pytest.raises(RuntimeError, match="status 1"):
            run()
    else:
        run()
    assert read == [(RECIPE, ["--out", "/a'b", "--resume"])]
    workers, others = scaling
    others = {{"type": "accelerator_type"}.get(key, key): value for key, value in others.items()}
    assert ray.given["ScalingConfig"] == {"num_workers": workers} | others
    assert ray.given["FailureConfig"] == {"max_failures": 3}
    variables = ray.given["RunConfig"]["worker_runtime_env"]["env_vars"]
    assert variables.get("JAX_PLATFORMS") == ("cpu" if where.startswith("cpu") else None)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_scripts_parse(launcher: str, recipe: Path, capsys: Capsys) -> None:
    special = {"gke": ["--image", "x"], "ssh": ["--hosts", "a,b"]}.get(launcher, [])
    where = "v6e:4x4" if launcher == "skypilot" else "v5p:2x2x2"
    text = printed(capsys, recipe, "--on", launcher, "--topology", where, *special)
    if launcher in ("slurm", "ssh"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert text.startswith("#!/bin/bash\n")
    elif launcher == "ray":
        compile(text, "script", "exec")
    else:
        assert all(yaml.safe_load_all(text))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("slurm v5p", "v5p:4x4x8"),
        ("slurm v4:2x2x1", "begin with one of v5p, v6e, tpu7x"),
        ("slurm v5p:4x4x7", "the nearest is v5p:4x4x8"),
        ("slurm v5p:8x4x4", "the nearest is v5p:4x4x8"),
        ("slurm v5p:64x64x64", "the nearest is v5p:16x16x24"),
        ("slurm v6e:2x2x2", "the nearest is v6e:2x4"),
        ("slurm v6e:0x4", "give sizes"),
        ("slurm h200:16", "give sizes after the colon, as in h200:2x8"),
        ("slurm h200:2x16", "at most 8 GPUs"),
        ("slurm h200:2x2x2", "NODESxDEVICES"),
        ("slurm v6e:1x1", r"\[mesh\] needs a multiple of 4 devices \(fsdp 4\); v6e:1x1 has 1"),
        ("slurm v5p:2x2x1 --image x", "--image is an option of --on gke and skypilot, not slurm"),
        ("slurm v5p:2x2x2 --slices 2", "--slices is an option of --on gke and ray and ssh"),
        ("slurm v5p:2x2x1 --name Run", "--name 'Run': use at most 47 lower-case"),
        ("gke v5p:2x2x1", "needs --image"),
        ("gke h200:2x8 --image x", "ray and slurm and ssh and skypilot do"),
        ("gke v5p:2x2x1 --image x --slices 2", "GKE connects only slices of several hosts"),
        ("gke v5p:2x2x1 --image x --queue A", "--queue 'A': use at most 63 lower-case"),
        ("gke v5p:2x2x1 --image x --volume A:/b", "the claim 'A'"),
        ("gke v5p:2x2x1 --image x --out runs/a", "out is runs/a, relative"),
        ("ray v5p:2x2x1 --data chats.jsonl", "data is chats.jsonl, relative"),
        ("gke v5p:2x2x1 --image x --volume runs:b", "give CLAIM:PATH"),
        ("gke v5p:2x2x1 --image x --volume a:/b --volume a:/c", "already mounted"),
        ("gke v5p:2x2x1 --image x --volume a:/local", "already mounted"),
        ("ray h200:2x8 --slices 2", "give more nodes"),
        ("skypilot tpu7x:2x2x1", "does not launch on tpu7x"),
        ("ssh v5p:2x2x2", "needs --hosts"),
        ("ssh v5p:2x2x2 --hosts a", "--hosts names 1 hosts; v5p:2x2x2 with --slices 1 has 2"),
        ("ssh v5p:2x2x2 --hosts a,a", "names 1 hosts"),
        ("ssh v5p:2x2x2 --hosts a,-oProxyCommand=x", "'-oProxyCommand=x' is not a host"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    args: str, message: str, recipe: Path, capsys: Capsys
) -> None:
    launcher, where, *more = args.split()
    words = [recipe, "--on", launcher, "--topology", where, *more]
    assert re.search(message, refused(capsys, *words))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh = {fsdp = 0}", "mesh.fsdp is 0"),
        ("mesh = {fsdp = 2, expert = 3}", r"a multiple of 6 devices \(fsdp 2 x expert 3\)"),
        ("out = 3", "out is 3; it must be a path"),
        ("data = 3", "data is 3; it must be a table"),
        ("checkpoints = {local = 3}", "checkpoints.local is 3"),
        ("", "give --data, --out"),
        ("out =", "is not TOML"),
    ],
)
def test_wrong_recipes_are_refused(text: str, message: str, tmp_path: Path, capsys: Capsys) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    words = [path, "--on", "slurm", "--topology", "cpu:2x2", "--model", "m"]
    words += ["--data", "d"] if text else []
    words += ["--out", "a"] if text and "out" not in text else []
    assert re.search(message, refused(capsys, *words))


def test_names_come_from_the_recipe(tmp_path: Path, capsys: Capsys) -> None:
    assert job.name_of(Path("a/Train_LoRA (2).toml")) == "train-lora-2"
    assert "No such file" in refused(
        capsys, tmp_path / "none.toml", "--on", "slurm", "--topology", "cpu:2x1"
    )
    with pytest.raises(ValueError, match="give --name"):
        job.name_of(Path("2.toml"))


@pytest.mark.parametrize("status", [0, 3])
def test_the_launchers_command_takes_the_file(
    status: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    words = [str(recipe), "--on", "slurm", "--topology", "v5p:2x2x1"]
    expected = printed(capsys, *words)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *words]) == 1
    assert "sbatch is not installed; add --dry-run > train.sbatch" in capsys.readouterr().err
    monkeypatch.undo()
    program(tmp_path, "sbatch", f'cp "$1" {shlex.quote(str(tmp_path))}/submitted; exit {status}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["launch", *words]) == bool(status)
    assert (tmp_path / "submitted").read_text() == expected
    assert ("sbatch failed with status 3" in capsys.readouterr().err) == bool(status)


def test_every_option_is_documented(capsys: Capsys) -> None:
    page = (house.ROOT / "docs" / "pods.md").read_text("utf-8")
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    for option in set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out)) - {"--help"}:
        assert f"`{option}" in page, option
