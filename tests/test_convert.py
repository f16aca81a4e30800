"""Conversion to native checkpoints and back: lossless, with little memory, and safe to kill."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import checkpoints, hf_models
from tests.test_hub import Hub, client
from v4jax.checkpoints import convert, native, release_weights, tensor_names
from v4jax.checkpoints.safetensors_directory import Checkpoint, write_checkpoint
from v4jax.checkpoints.safetensors_file import TensorInfo
from v4jax.model import config_json, params, sharding
from v4jax.model.config import LayerKind

RATIOS = [0, 0, 4, 128, 4]


def write_release(directory: Path, **options: Any) -> Path:
    cfg = options.pop("cfg", checkpoints.tiny())
    checkpoints.write_release(directory, cfg, 1, **options)
    checkpoints.write_other_files(directory)
    return directory


def write_saved(directory: Path) -> Path:
    model = hf_models.make(RATIOS, 0)
    model.save_pretrained(directory, max_shard_size="200KB")
    checkpoints.write_other_files(directory)
    return directory


def write_modules(directory: Path) -> Path:
    """Write a checkpoint with transformers' module names: one tensor for all experts of a layer."""
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
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A source and its native checkpoint, converted with --weights keep."""
    folder = tmp_path_factory.mktemp("converted")
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


def test_export_reproduces_the_source(converted, tmp_path):
    source, target = converted
    convert.export(target, tmp_path / "exported")
    assert_same_checkpoint(source, tmp_path / "exported")
    index = "model.safetensors.index.json"
    assert (source / index).exists() == (tmp_path / "exported" / index).exists()
    if (source / index).exists():
        read = lambda path: json.loads((path / index).read_text())
        assert read(source) == read(tmp_path / "exported")
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        if (source / file).exists():
            assert (source / file).read_bytes() == (tmp_path / "exported" / file).read_bytes()
    assert checkpoints.copied_files(tmp_path / "exported") == checkpoints.copied_files(source)


@pytest.mark.parametrize(("dtype", "keep"), [("bfloat16", True), ("float32", False)])
def test_native_model_equals_the_one_from_the_source(converted, dtype, keep):
    source, target = converted
    expected, cfg = release_weights.load(source, dtype=jnp.dtype(dtype), keep_quantised=keep)
    model, native_cfg = native.load(target, dtype=jnp.dtype(dtype), keep_quantised=keep)
    assert native_cfg == cfg
    assert_same_model(model, expected)


@pytest.mark.parametrize("keep", [True, False])
def test_native_model_on_a_mesh_equals_the_one_from_the_source(released, tmp_path, keep):
    convert.convert(released, tmp_path / "native")
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    expected, _ = release_weights.load(released, dtype=jnp.bfloat16, keep_quantised=keep, mesh=mesh)
    model, _ = native.load(tmp_path / "native", dtype=jnp.bfloat16, keep_quantised=keep, mesh=mesh)
    assert_same_model(model, expected)


@pytest.mark.parametrize("weights", ["keep", "bfloat16"])
def test_orbax_restores_the_arrays_by_the_names_of_the_leaves(released, tmp_path, weights):
    convert.convert(released, tmp_path / "native", weights=weights)
    model, _ = native.load(tmp_path / "native", dtype=jnp.bfloat16, keep_quantised=True)
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


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("fp8 and fp4 with MTP", "bfloat16"), ("base", "float32"), ("modules", "bfloat16")],
)
def test_dequantised_checkpoint_exports_dense_tensors_of_the_same_names(tmp_path, kind, weights):
    source = SOURCES[kind](tmp_path / "source")
    convert.convert(source, tmp_path / "native", weights=weights)
    convert.export(tmp_path / "native", tmp_path / "exported")
    exported, original = Checkpoint.open(tmp_path / "exported"), Checkpoint.open(source)
    assert exported.config.keys().isdisjoint({"quantization_config", "expert_dtype"})
    weight_of = lambda name: name.removesuffix(".scale") + ".weight"
    assert set(exported.names) == {
        name
        for name in original.names
        if not name.endswith(".scale") or weight_of(name) not in original.names
    }
    dtypes = {exported.info(name).dtype for name in exported.names}
    assert dtypes == {"F32", "I64"} | ({"BF16"} if weights == "bfloat16" else set())
    expected, _ = release_weights.load(source, dtype=jnp.dtype(weights), keep_quantised=False)
    model, _ = release_weights.load(
        tmp_path / "exported", dtype=jnp.dtype(weights), keep_quantised=False
    )
    assert_same_model(model, expected)


def test_float4_tensors_keep_their_declared_dtype(tmp_path):
    lazy = dict(checkpoints.tensors(checkpoints.tiny(), 1))

    def float4_info(name: str) -> TensorInfo:
        info = lazy[name].info
        if info.dtype != "I8":
            return info
        return TensorInfo("F4", (info.shape[0], 2 * info.shape[1]))

    values = lambda name: (
        lazy[name].make().view(np.uint8) if lazy[name].info.dtype == "I8" else lazy[name].make()
    )
    config = config_json.to_json(checkpoints.tiny())
    write_checkpoint(
        tmp_path / "source", config, [{name: float4_info(name) for name in lazy}], values
    )
    convert.convert(tmp_path / "source", tmp_path / "native")
    convert.export(tmp_path / "native", tmp_path / "exported")
    assert_same_checkpoint(tmp_path / "source", tmp_path / "exported")


_RUN = """
import os, resource, sys
import jax
from v4jax.checkpoints import convert
command, source, target, weights, stop = sys.argv[1:]
jax.devices()
resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
calls, before = 0, resident()
if int(stop):
    # Otherwise a whole tiny checkpoint may still be in flight to the disk.
    convert._IN_FLIGHT_BYTES = 2**16
def progress(what, done, total):
    global calls
    calls += 1
    if calls == int(stop):
        os.kill(os.getpid(), 9)
if command == "convert":
    convert.convert(source, target, weights=weights, progress=progress)
else:
    convert.export(source, target, progress=progress)
print(calls, (resident() - before) * 1024)
"""


def run(command: str, source: Path, target: Path, stop: int, weights: str = "keep") -> Any:
    """Convert or export in a separate process, which kills itself at a step."""
    arguments = [command, str(source), str(target), weights, str(stop)]
    return subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_conversion_holds_a_fraction_of_one_leaf_in_memory(tmp_path):
    layers = (LayerKind("sliding", 0, "routed"),) * 2
    cfg = checkpoints.tiny(
        hidden_size=2048,
        moe_intermediate_size=1024,
        n_routed_experts=64,
        layers=layers,
        num_nextn_predict_layers=0,
    )
    source, target = tmp_path / "source", tmp_path / "native"
    checkpoints.write_release(source, cfg, 1, fill="bytes")
    leaf = tensor_names.slots(cfg)["layers.0.ffn.experts.0.w1.weight"].spec.size * 2
    converted = run("convert", source, target, 0, "bfloat16")
    shutil.rmtree(source)
    exported = run("export", target, tmp_path / "exported", 0)
    shutil.rmtree(target)
    shutil.rmtree(tmp_path / "exported")
    for result in (converted, exported):
        assert result.returncode == 0, result.stderr
        # Half of this is pages of a mapped file, which the reader drops every 256 MiB.
        assert int(result.stdout.split()[1]) < 450 * 2**20 < leaf, result.stdout


def test_a_checkpoint_on_the_hub_is_converted_shard_by_shard(released, tmp_path):
    files = contents(released)
    home, target = tmp_path / "home", tmp_path / "target"
    script = "from v4jax.checkpoints import convert\n"
    script += f"out = convert.convert('org/name', Path({str(target)!r}))"
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert client(home, server.url, script) is None
        server.shutdown()
        thread.join()
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert [name for name in server.gets() if name in shards] == shards
    assert not list(home.rglob("*.safetensors"))
    convert.convert(released, tmp_path / "local")
    assert contents(target) == contents(tmp_path / "local")
