"""`v4jax plan`: figures of memory and time, the choice of a mesh, its output, and reality."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import pytest
from jax.sharding import AbstractMesh

from tests import quick
from v4jax import __main__ as command
from v4jax import facts, presets
from v4jax.commands import options
from v4jax.engine import settings
from v4jax.model import numerics, paging
from v4jax.model.sharding import AXES
from v4jax.pods import chips, estimate, memory, mesh_search
from v4jax.pods.jobs import Move
from v4jax.pods.serving import Serving
from v4jax_train import plan as training
from v4jax_train import preparation
from v4jax_train import recipe as recipes

NUMBER = {"type": "number", "minimum": 0}
SCHEMA = {
    "type": "object",
    "required": [
        *("model", "job", "sizes", "topology", "devices", "mesh", "rules", "fits", "memory"),
        *("replicated", "flops", "hbm", "collectives", "kernels", "estimate", "warnings"),
    ],
    "properties": {
        "fits": {"type": "boolean"},
        "mesh": {"type": "object", "required": [*AXES], "additionalProperties": {"minimum": 1}},
        "memory": {"type": "object", "required": ["weights", "total", "limit"]},
        "collectives": {"additionalProperties": {"properties": {"bytes": NUMBER}}},
        "flops": {"additionalProperties": NUMBER},
        "hbm": {"additionalProperties": NUMBER},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}


def serving(name: str = "tiny", **sizes: Any) -> Serving:
    sizes = {"context": 1024, "batch": 8, "name": "decode"} | sizes
    return Serving(cfg=presets.get(name), **sizes)


@pytest.mark.parametrize("name", ["", "v6e", "v6e:3x3", "v6e:2x2x2", "v5p:0x2x2", "h200:9", "a:1"])
def test_a_slice_that_cannot_be_rented_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a slice"):
        chips.parse(name)


def test_slices_come_with_the_smallest_first() -> None:
    found = chips.slices(["v5p", "v6e", "tpu7x"])
    sizes = [math.prod(part.shape) for part in found]
    assert sizes == sorted(sizes)
    assert chips.parse("tpu7x:4x4x8").devices == 256


def test_memory_of_a_device_is_what_its_shards_hold() -> None:
    job, mesh = serving(), AbstractMesh((1, 1, 8, 1), AXES)
    arguments = job.arguments(mesh)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments["cache"]))
    lengths = 4 * job.batch
    assert memory.device_bytes(arguments["cache"]) == pytest.approx(whole / 8, abs=lengths)
    copies = {row.copies for row in memory.replicated(arguments["weights"], least=1)}
    assert copies == {8}
    alone = job.arguments(AbstractMesh((1, 1, 1, 1), AXES))
    assert not memory.replicated(alone["weights"], least=1)


@pytest.mark.parametrize("name", ["flash", "pro", "tiny"])
@pytest.mark.parametrize("entries", [None, "fp8"])
def test_the_cache_takes_the_bytes_that_are_printed(name: str, entries: str | None) -> None:
    cfg = presets.get(name)
    page = settings.page_of(8192, cfg, "tpu")

    def nbytes(rows: int, pages: int) -> int:
        how = {"page": page, "dtype": jnp.bfloat16, "entries": entries}
        make = lambda: paging.make(cfg, rows=rows, pages=pages, **how, numerics=numerics.OFFICIAL)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))

    per_token = facts.cache_bytes(cfg)[entries or "bfloat16"]
    assert (nbytes(1, 2) - nbytes(1, 1)) / page == per_token
    length = 4
    assert nbytes(2, 1) - nbytes(1, 1) == facts.report(cfg).state_bytes + length


def test_a_step_takes_as_long_as_its_slowest_part_and_its_collectives() -> None:
    where = chips.parse("v6e:4x4")
    chip = chips.CHIPS["v6e"]
    gather, reduce = (Move(kind, 4, 1e9, 1) for kind in ("all-gather", "all-reduce"))
    latency = 2e-6
    seconds = estimate.seconds(gather, where)
    assert seconds == pytest.approx(latency + 0.75e9 / (2 * chip.link))
    assert estimate.seconds(reduce, where) - latency == pytest.approx(2 * (seconds - latency))
    assert estimate.seconds(gather._replace(group=1), where) == 0
    time = estimate.step(
        where, useful=chip.flops, executed=2 * chip.flops, nbytes=chip.bandwidth, moves=[gather]
    )
    assert time is not None
    assert time.total == pytest.approx(2 + seconds)
    assert (time.mfu, time.bound) == (pytest.approx(1 / time.total), "compute")


def test_every_mesh_of_a_slice_is_compared() -> None:
    job, where = serving(batch=8), chips.parse("v6e:2x4")
    ranked = mesh_search.ranked(job, where)
    sizes = [tuple(candidate.sizes.values()) for candidate in ranked]
    assert len({*sizes}) == len(sizes)
    assert all(math.prod(size) == 8 for size in sizes)
    assert all(tensor <= presets.get("tiny").num_attention_heads for *_, tensor in sizes)
    times = [candidate.time.total for candidate in ranked if candidate.time]
    assert times == pytest.approx(sorted(times), rel=0.01)


def test_a_mesh_that_fits_goes_before_a_faster_one_that_does_not() -> None:
    job = serving("flash", context=2**20, batch=8)
    first, *others = mesh_search.ranked(job, where := chips.parse("v6e:2x4"))
    assert first.fits(where)
    assert any(not other.fits(where) and other.time.total for other in others if other.time)
    assert mesh_search.has_room(job, where)
    assert not mesh_search.has_room(job, chips.parse("v6e:2x2"))


def test_a_batch_that_no_mesh_can_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No mesh of 256 devices .* batch 7"):
        mesh_search.ranked(serving(batch=7), chips.parse("v6e:16x16"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v6e:3x3"], "'v6e:3x3' is not a slice of v6e"),
        (["--search", "v9"], "No chip 'v9' is known"),
        (["--search", "v6e", "--mesh", "expert=4"], "leave --mesh out"),
        (["--topology", "here", "--mesh", "expert=3"], "--mesh expert=3 has 3 devices"),
        (["--topology", "here", "--mesh", "a=8"], "'a=8' is not a mesh"),
        (["--topology", "here", "--seq", "8"], "--seq is not an option of decode"),
        (["--topology", "here", "--job", "train-lora", "--batch", "8"], "--batch is not an option"),
        (["--topology", "here", "--context", "99999"], "the model's own is 65536"),
        (["--topology", "here", "--plot", "a.b"], "use a suffix such as .png"),
        (["--topology", "here", "--plot", "no/a.png"], "there is no directory no"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["plan", "tiny", *words]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_a_job_whose_application_is_missing_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    assert command.main(["plan", "tiny", "--topology", "here", "--job", "train-muon"]) == 1
    assert "pip install 'v4jax[train]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_plan_compiles_nothing_and_has_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("V4JAX_CACHE", str(tmp_path / "programs"))
    words = ["plan", "tiny", "--topology", "here", "--context", "256", "--mesh", "data=2,expert=4"]
    picture = tmp_path / "plan.png"
    assert command.main([*words, "--json", "--plot", str(picture)]) == 0
    first = json.loads(capsys.readouterr().out)
    jsonschema.validate(first, SCHEMA)
    assert picture.read_bytes().startswith(b"\x89PNG")
    parts = {
        name: n for name, n in first["memory"].items() if name not in ("total", "peak", "limit")
    }
    assert sum(parts.values()) == first["memory"]["total"]
    assert first["collectives"]["all-reduce"]["bytes"] > 0

    def compile_again(_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_again)
    assert command.main([*words, "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (first.pop("from_disk"), second.pop("from_disk")) == (False, True)
    assert first == second
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert "mesh data=2,expert=4" in out
    assert "cache per sequence, plus" in out


@pytest.mark.slow
@pytest.mark.full_compilation
def test_a_slice_is_planned_by_its_own_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--topology", "v6e:2x2", "--context", "512", "--batch", "4", "--json"]
    assert command.main(["plan", "tiny", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    jsonschema.validate(plan, SCHEMA)
    assert plan["memory"]["limit"] == chips.CHIPS["v6e"].memory
    assert plan["estimate"]["total_s"] > 0
    assert {kernel["form"] for kernel in plan["kernels"]} == {"tpu", "xla"}
    assert all(kernel["reason"] for kernel in plan["kernels"] if kernel["form"] == "xla")
    assert plan["hops"]["data"] == 1.0
    assert len(plan["meshes"]) > 1


def test_mesh_auto_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(mesh="auto", revision=None, keep_quantised=True)
    mesh = options.mesh_of(args, "tiny", rows=16, context=1024)
    assert mesh is not None
    assert mesh.size == 8
    sizes = mesh_search.named(dict(mesh.shape))
    assert capsys.readouterr().err == f"mesh {sizes} for 8 devices\n"
    args.mesh = None
    assert options.mesh_of(args, "tiny") is None


def test_a_recipe_gets_the_mesh_that_is_favoured() -> None:
    flags = {"model.path": "tiny", "steps.batch": "8", "steps.parts": "1"}
    recipe = recipes.read(Path("configs/train_lora.toml"), flags)
    sizes = training.mesh_for(recipe)
    mesh = preparation.make_mesh(training.with_mesh(recipe, sizes))
    assert mesh is not None
    assert dict(mesh.shape) == sizes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_a_process_takes_the_memory_that_is_planned(tmp_path: Path) -> None:
    """A decode step of the first `bench` layers, in a process of its own that compiles it once."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment = os.environ | quick.ENVIRONMENT | kept
    words = [sys.executable, "-m", "tests.planned_memory"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    planned, peak = map(int, result.stdout.split())
    assert planned > 1e8
    assert peak == pytest.approx(planned, rel=0.1)
