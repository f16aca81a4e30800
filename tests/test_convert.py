"""Conversion to native checkpoints and back: nothing is lost, little is held, kills do no harm."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import checkpoints, hf_models
from v4jax import config_json, convert, huggingface, native, params, sharding, unfinished
from v4jax.checkpoint_files import Checkpoint, write_checkpoint
from v4jax.safetensors_file import CheckpointError, TensorInfo

RATIOS = [0, 0, 4, 128, 4]


def write_release(directory: Path, **options: Any) -> Path:
    cfg = options.pop("cfg", checkpoints.tiny())
    checkpoints.write_release(directory, cfg, 1, **options)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "generation_config.json").write_text('{"temperature": 1.0}')
    return directory


def write_saved(directory: Path) -> Path:
    model = hf_models.make(RATIOS, 0)
    model.save_pretrained(directory, max_shard_size="200KB")
    return directory


def write_modules(directory: Path) -> Path:
    """The names of transformers' modules, experts of a layer in one tensor."""
    model = hf_models.make(RATIOS, 0)
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    kinds = {"float32": "F32", "int64": "I64"}
    infos = {name: TensorInfo(kinds[v.dtype.name], v.shape) for name, v in values.items()}
    assert any("experts.gate_up_proj" in name for name in infos)
    names = list(infos)
    shards = [{n: infos[n] for n in part} for part in (names[:30], names[30:])]
    config = json.loads(model.config.to_json_string())
    write_checkpoint(directory, config, shards, lambda name: values[name])
    return directory


SOURCES: dict[str, Callable[[Path], Path]] = {
    "fp8 and fp4 with MTP": write_release,
    "dspark": lambda path: write_release(path, cfg=checkpoints.tiny_dspark(), shards=3),
    "base": lambda path: write_release(
        path, cfg=checkpoints.tiny(expert_dtype="fp8"), scales="F32", shards=1
    ),
    "dense": lambda path: write_release(
        path, cfg=checkpoints.tiny(quantized=False, expert_dtype=None)
    ),
    "saved": write_saved,
    "modules": write_modules,
}


@pytest.fixture(scope="module", params=SOURCES)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A source, and what conversion with --weights keep makes of it."""
    folder = tmp_path_factory.mktemp("kept")
    source = SOURCES[request.param](folder / "source")
    convert.convert(source, folder / "native")
    return source, folder / "native"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "source")


def assert_same_checkpoint(one: Path, other: Path) -> None:
    ours, theirs = Checkpoint.open(one), Checkpoint.open(other)
    assert ours.config == theirs.config
    assert ours.names == theirs.names
    for name in ours.names:
        a, b = ours.info(name), theirs.info(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert (a.file and a.file.name) == (b.file and b.file.name), name
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def assert_same_model(one: Any, other: Any) -> None:
    ours, theirs = dict(params.leaves(one)), dict(params.leaves(other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert jax.tree.structure(ours[name]) == jax.tree.structure(theirs[name]), name
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(theirs[name]), strict=True):
            assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding), name
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def test_export_reproduces_the_source(kept, tmp_path):
    source, made = kept
    convert.export(made, tmp_path / "exported")
    assert_same_checkpoint(source, tmp_path / "exported")
    index = "model.safetensors.index.json"
    assert (source / index).exists() == (tmp_path / "exported" / index).exists()
    if (source / index).exists():
        read = lambda path: json.loads((path / index).read_text())
        assert read(source) == read(tmp_path / "exported")
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        if (source / file).exists():
            assert (source / file).read_bytes() == (tmp_path / "exported" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("keep", [True, False])
def test_native_model_equals_the_one_from_the_source(kept, dtype, keep):
    source, made = kept
    expected, cfg = huggingface.load(source, dtype=jnp.dtype(dtype), keep=keep)
    model, found = native.load(made, dtype=jnp.dtype(dtype), keep=keep)
    assert found == cfg
    assert_same_model(model, expected)


@pytest.mark.parametrize("keep", [True, False])
def test_native_model_on_a_mesh_equals_the_one_from_the_source(released, tmp_path, keep):
    convert.convert(released, tmp_path / "native")
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    expected, _ = huggingface.load(released, dtype=jnp.bfloat16, keep=keep, mesh=mesh)
    model, _ = native.load(tmp_path / "native", dtype=jnp.bfloat16, keep=keep, mesh=mesh)
    assert_same_model(model, expected)


@pytest.mark.parametrize("weights", ["keep", "bfloat16"])
def test_orbax_restores_the_arrays_under_the_names_of_the_leaves(released, tmp_path, weights):
    convert.convert(released, tmp_path / "native", weights=weights)
    model, _ = native.load(tmp_path / "native", dtype=jnp.bfloat16, keep=True)
    expected: dict[str, Any] = {}
    for name, leaf in params.leaves(model):
        parts = (
            {name: leaf}
            if isinstance(leaf, jax.Array)
            else {f"{name}.codes": leaf.codes, f"{name}.scale": leaf.scale}
        )
        expected |= parts
    folder = tmp_path / "native" / native.WEIGHTS
    plain = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder)
    standard = ocp.StandardCheckpointer().restore(
        folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
    )
    for restored in (plain, standard):
        assert restored.keys() == expected.keys()
        for name, value in expected.items():
            assert restored[name].dtype == value.dtype, name
            assert np.asarray(restored[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["fp8 and fp4 with MTP", "base", "modules"])
def test_decoded_checkpoint_exports_dense_tensors_under_the_same_names(tmp_path, kind, weights):
    source = SOURCES[kind](tmp_path / "source")
    convert.convert(source, tmp_path / "native", weights=weights)
    convert.export(tmp_path / "native", tmp_path / "exported")
    exported, original = Checkpoint.open(tmp_path / "exported"), Checkpoint.open(source)
    assert exported.config.keys().isdisjoint({"quantization_config", "expert_dtype"})
    scales = {name for name in original.names if name.endswith(".scale") and ".hc_" not in name}
    assert set(exported.names) == {
        n for n in original.names if original.info(n).dtype not in ("F8_E8M0",)
    } - (scales if kind == "base" else set())
    dtypes = {exported.info(name).dtype for name in exported.names}
    assert dtypes == {"F32", "I64"} | ({"BF16"} if weights == "bfloat16" else set())
    expected, _ = huggingface.load(source, dtype=jnp.dtype(weights), keep=False)
    model, _ = huggingface.load(tmp_path / "exported", dtype=jnp.dtype(weights), keep=False)
    assert_same_model(model, expected)


def test_float4_tensors_keep_their_declared_dtype(tmp_path):
    made = dict(checkpoints.tensors(checkpoints.tiny(), 1))

    def info(name: str) -> TensorInfo:
        found = made[name].info
        if found.dtype != "I8":
            return found
        return TensorInfo("F4", (found.shape[0], 2 * found.shape[1]))

    values = lambda name: (
        made[name].make().view(np.uint8) if made[name].info.dtype == "I8" else made[name].make()
    )
    config = config_json.to_json(checkpoints.tiny())
    write_checkpoint(tmp_path / "source", config, [{name: info(name) for name in made}], values)
    convert.convert(tmp_path / "source", tmp_path / "native")
    convert.export(tmp_path / "native", tmp_path / "exported")
    assert_same_checkpoint(tmp_path / "source", tmp_path / "exported")


_RUN = """
import os, sys
from v4jax import convert
command, source, target, weights, stop = sys.argv[1:]
calls = 0
def progress(what, done, total):
    global calls
    calls += 1
    if calls == int(stop):
        os.kill(os.getpid(), 9)
if command == "convert":
    convert.convert(source, target, weights=weights, progress=progress)
else:
    convert.export(source, target, progress=progress)
print(calls)
"""


def run(command: str, source: Path, target: Path, stop: int, weights: str = "keep") -> Any:
    """Convert or export in a process of its own, which kills itself at a step."""
    arguments = [command, str(source), str(target), weights, str(stop)]
    return subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=False
    )


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
        for read in (huggingface.load, native.load):
            for place in (left, left / "result"):
                with pytest.raises(CheckpointError, match="is unfinished"):
                    read(place, dtype=jnp.bfloat16, keep=True)
    ended = run(command, source, target, 0)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < len(steps), "nothing was taken up from the runs before"
    assert contents(target) == contents(whole)
    assert not unfinished.scratch(target).exists()
