"""Merging: weights take the change, all else stays as it was, and rounding losses are reported."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from peft import PeftModel
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

import v4jax
from tests import checkpoints, hf_models, models, training_runs
from v4jax.__main__ import main
from v4jax.adapters import merge, peft
from v4jax.adapters.lora import Lora
from v4jax.checkpoints import export, native, release_weights, tensor_names
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_directory import Checkpoint
from v4jax.decoding import steps
from v4jax.model import cache as caches
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import HF
from v4jax.model.transformer import Model
from v4jax_train.trainable import Full

Capsys = pytest.CaptureFixture[str]


def small(**changes: Any) -> ModelConfig:
    """Small, quantised, with MTP; all experts and entries are chosen, so no choice can flip."""
    formats = {"quantized": True, "expert_dtype": "fp4", "num_nextn_predict_layers": 1}
    chosen = {"num_experts_per_tok": 8, "index_topk": 64}
    return models.config(models.SLIDING, models.CSA, **(formats | chosen | changes))


CFG = small()
ALL = Lora("all", rank=4, expert_rank=2)
TOKENS_BT = np.random.default_rng(0).integers(0, 96, (2, 40))


def write_release(directory: Path, cfg: ModelConfig, **options: Any) -> Path:
    checkpoints.write_release(directory, cfg, 1, **options)
    checkpoints.write_other_files(directory)
    return directory


def write_adapter(directory: Path, cfg: ModelConfig, settings: Lora, **options: Any) -> Path:
    peft.export(directory, cfg, settings, training_runs.learned(cfg, settings, **options))
    return directory


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "release", CFG, shards=3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", CFG, ALL)


def values(directory: Path) -> dict[str, tuple[str, np.ndarray]]:
    with Checkpoint.open(directory) as files:
        return {name: (files.info(name).dtype, files.read(name).copy()) for name in files.names}


def differing(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose bytes differ; names, dtypes and shapes must be the same."""
    old, new = values(before), values(after)
    assert list(old) == list(new)
    for name, (dtype, value) in old.items():
        assert new[name][0] == dtype
        assert new[name][1].shape == value.shape
    return {name for name in old if old[name][1].tobytes() != new[name][1].tobytes()}


def files(directory: Path) -> dict[str, bytes]:
    paths = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in paths}


def weights(directory: Path) -> tuple[Model, ModelConfig]:
    return release_weights.load(directory, dtype=jnp.float32, keep_quantised=False)


def logits(model: Model, cfg: ModelConfig) -> np.ndarray:
    cache = caches.make(cfg, *TOKENS_BT.shape, jnp.float32)
    count_B = jnp.full(TOKENS_BT.shape[0], TOKENS_BT.shape[1], jnp.int32)
    tokens_BT = jnp.asarray(TOKENS_BT, jnp.int32)
    return np.asarray(steps.logits(model, tokens_BT, cache, count_B, cfg=cfg, numerics=HF)[0])


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def changed_names(cfg: ModelConfig, leaves: Any) -> set[str]:
    """Names of these leaves' tensors in the release, without scales."""
    return {
        name
        for leaf in leaves
        for name in tensor_names.flatten(tensor_names.release_names(leaf, cfg))
    }


def test_keep_changes_the_adapters_weights_and_nothing_else(
    released: Path, adapter: Path, tmp_path: Path
) -> None:
    rows = merge.merge(released, adapter, tmp_path / "merged", weights="keep")
    _, factors = peft.load(adapter, CFG)
    names = changed_names(CFG, factors)
    scales = {tensor_names.scale_name(name) for name in names}
    changed = differing(released, tmp_path / "merged")
    assert names <= changed <= names | scales
    before, after = files(released), files(tmp_path / "merged")
    dropped = {".cache/lock", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert after.keys() == before.keys() - dropped
    for name in after:
        if not name.endswith(".safetensors"):
            assert after[name] == before[name]
    assert {(row.kind, row.stored) for row in rows} == {
        *((f"attn.{w}", "FP8") for w in ("wq_a", "wq_b", "wkv", "wo_b")),
        *((f"ffn.shared_experts.{w}", "FP8") for w in ("w1", "w2", "w3")),
        *((f"ffn.experts.{w}", "FP4") for w in ("w1", "w2", "w3")),
    }
    layers = len(CFG.layers)
    for row in rows:
        assert row.tensors == layers * (8 if row.stored == "FP4" else 1)


@pytest.mark.parametrize("scales", ["F8_E8M0", "F32"])
def test_keep_is_as_close_to_the_target_weights_as_its_format_allows(
    scales: str, tmp_path: Path
) -> None:
    cfg = small(expert_dtype="fp8" if scales == "F32" else "fp4")
    release = write_release(tmp_path / "release", cfg, scales=scales, shards=1)
    settings = Lora("all", rank=4)
    directory = write_adapter(tmp_path / "adapter", cfg, settings, size=0.2)
    rows = merge.merge(release, directory, tmp_path / "merged", weights="keep")
    base, _ = weights(release)
    _, factors = peft.load(directory, cfg)
    target = training_runs.folded(cfg, base, settings, factors, jnp.float32)
    merged, old = (dict(params.leaves(weights(d)[0])) for d in (tmp_path / "merged", release))
    for name, value in params.leaves(target):
        if name not in factors:
            np.testing.assert_array_equal(merged[name], old[name])
            continue
        # Half a step is at most 1/16 of a value in E4M3, and 1/6 of a block's largest in E2M1.
        fp4 = ".experts." in name and cfg.expert_dtype == "fp4"
        error = np.linalg.norm(merged[name] - value) / np.linalg.norm(value)
        assert error < (0.2 if fp4 else 0.04)
    # The update here is as large as the weights.
    for row in rows:
        assert 0.95 < row.gain < 1.05
        assert row.cosine > 0.95


def test_bfloat16_reproduces_the_logits_of_the_folded_weights(
    released: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    rows = merge.merge(released, adapter, merged, weights="bfloat16")
    config = json.loads((merged / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert not {"quantization_config", "expert_dtype"} & config.keys()
    assert {dtype for dtype, _ in values(merged).values()} == {"BF16", "F32", "I64"}
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for _, v in values(merged).values())
    base, cfg = weights(released)
    settings, factors = peft.load(adapter, cfg)
    expected = logits(training_runs.folded(cfg, base, settings, factors, jnp.bfloat16), cfg)
    model, read_cfg = weights(merged)
    assert read_cfg.num_nextn_predict_layers == 1
    assert distance(logits(model, cfg), expected) <= 1e-5
    assert all(row.stored == "BF16" and row.gain > 0.99 for row in rows)


def test_bfloat16_reproduces_the_adapters_logits_up_to_rounding(
    released: Path, adapter: Path, tmp_path: Path
) -> None:
    merge.merge(released, adapter, tmp_path / "merged", weights="bfloat16")
    settings, factors = peft.load(adapter, CFG)
    base, cfg = weights(released)
    served = logits(training_runs.folded(cfg, base, settings, factors, jnp.float32), cfg)
    merged = logits(weights(tmp_path / "merged")[0], cfg)
    assert distance(served, logits(base, cfg)) > 0.2
    # A weight is rounded by at most 2^-9 of its value.
    assert distance(merged, served) < 2**-5


# PEFT reads a property of transformers that has been renamed. It warns about patterns that match
# parameters rather than modules, but applies their ranks all the same.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_merging_a_checkpoint_of_transformers_equals_peft(tmp_path: Path) -> None:
    theirs = hf_models.make([0, 4], 3, num_hash_layers=1)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    model = v4jax.load(tmp_path / "model", dtype="float32", numerics="hf")
    directory = write_adapter(tmp_path / "adapter", model.config, ALL)
    rows = merge.merge(tmp_path / "model", directory, tmp_path / "merged", weights="keep")
    assert all(row.gain == pytest.approx(1.0, abs=1e-6) for row in rows)
    cfg = model.config
    settings, factors = peft.load(directory, cfg)
    folded = training_runs.folded(cfg, model.weights, settings, factors, jnp.float32)
    merged, _ = weights(tmp_path / "merged")
    for name, value in params.leaves(folded):
        np.testing.assert_allclose(dict(params.leaves(merged))[name], value, atol=1e-6)
    reloaded = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "merged").eval()
    served = PeftModel.from_pretrained(theirs, directory)
    expected = hf_models.logits(served, TOKENS_BT)
    assert distance(hf_models.logits(reloaded, TOKENS_BT), expected) <= 1e-5


def test_dsparks_tensors_keep_their_bytes(tmp_path: Path) -> None:
    drafter = checkpoints.tiny_dspark().dspark
    assert drafter is not None
    drafter = dataclasses.replace(drafter, target_layer_ids=(0, 1))
    cfg = small(num_nextn_predict_layers=0, dspark=drafter)
    release = write_release(tmp_path / "release", cfg)
    directory = write_adapter(tmp_path / "adapter", cfg, Lora("attn", rank=2))
    old = values(release)
    names = [name for name in old if name.startswith("mtp.")]
    assert names
    for mode in ("keep", "bfloat16"):
        merge.merge(release, directory, tmp_path / mode, weights=mode)
        new = values(tmp_path / mode)
        for name in names:
            assert old[name][0] == new[name][0]
            assert old[name][1].tobytes() == new[name][1].tobytes()


def full_run(directory: Path, released: Path, *, fp4_experts: bool = False) -> Path:
    """A run that has changed a norm, an FP8 matrix, one FP4 expert and a router's bias."""
    leaves = dict(params.leaves(weights(released)[0]))
    names = ("norm_D", "mtp.0.embed_DD", "stacks.0.experts.0.up_EFD", "head_VD")
    trained = {name: np.asarray(leaves[name]).copy() for name in names}
    trained["norm_D"] += 0.5
    trained["mtp.0.embed_DD"] *= -1
    trained["stacks.0.experts.0.up_EFD"][0, 3] *= 0.7
    bias = next(name for name in leaves if name.endswith("router.bias_E"))
    balanced = {bias: np.asarray(leaves[bias]) - 0.25}
    trainable = Full(fp4_experts=fp4_experts)
    return training_runs.write(directory, released, trainable, trained, balanced)


def test_weights_trained_in_full_replace_the_old_ones(released: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", released)
    merge.merge(released, run, tmp_path / "merged", weights="keep")
    biases = [name for name in values(released) if name.endswith("gate.bias")]
    assert differing(released, tmp_path / "merged") - {"layers.0.ffn.experts.3.w3.scale"} == {
        *("norm.weight", "mtp.0.e_proj.weight", "layers.0.ffn.experts.3.w3.weight"),
        biases[0],
    }
    merge.merge(released, run, tmp_path / "dense", weights="bfloat16")
    old, new = (dict(params.leaves(weights(d)[0])) for d in (released, tmp_path / "dense"))
    np.testing.assert_allclose(new["norm_D"], old["norm_D"] + 0.5, rtol=2**-8)
    np.testing.assert_array_equal(new["mtp.0.embed_DD"], -old["mtp.0.embed_DD"])


def test_experts_trained_as_fp4_lose_nothing_in_fp4(released: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", released, fp4_experts=True)
    rows = merge.merge(released, run, tmp_path / "merged", weights="keep")
    [row] = [row for row in rows if row.stored == "FP4"]
    assert row.tensors == 1
    assert row.gain == pytest.approx(1.0, abs=1e-6)
    assert row.cosine == pytest.approx(1.0, abs=1e-6)


def test_an_interrupted_merge_resumes_with_the_same_result(
    released: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = merge.merge(released, adapter, tmp_path / "whole", weights="keep")
    write, written = export.write_safetensors, []

    def interrupted(path: Path, *args: Any, **kwargs: Any) -> None:
        if len(written) == 2:
            written.append("interruption")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *args, **kwargs)

    target = tmp_path / "target"
    monkeypatch.setattr(export, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge.merge(released, adapter, target, weights="keep")
    assert not target.exists()
    with pytest.raises(CheckpointError, match="with other settings"):
        merge.merge(released, adapter, target, weights="bfloat16")
    assert merge.merge(released, adapter, target, weights="keep") == rows
    assert len(written) == len(set(written)) == 4
    assert files(target) == files(tmp_path / "whole")
    assert not target.with_name("target.unfinished").exists()


def error_message(capsys: Capsys, *args: Any) -> str:
    assert main([str(arg) for arg in args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def other_model(released: Path, adapter: Path, directory: Path) -> list[Path]:
    cfg = small(q_lora_rank=64)
    return [released, write_adapter(directory / "other", cfg, ALL)]


def native_source(released: Path, adapter: Path, directory: Path) -> list[Path]:
    (directory / "native").mkdir()
    (directory / "native" / native.MANIFEST).write_text("{}")
    return [directory / "native", adapter]


def damaged(released: Path, adapter: Path, directory: Path) -> list[Path]:
    copy = shutil.copytree(adapter, directory / "copy")
    file = copy / peft.TENSORS
    file.write_bytes(file.read_bytes()[:-10])
    return [released, copy]


REFUSALS: dict[str, tuple[Callable[[Path, Path, Path], list[Path]], str]] = {
    "another model's adapter": (other_model, "is for another model"),
    "a native checkpoint": (native_source, "v4jax export"),
    "a damaged adapter": (damaged, "cut off"),
    "no change": (lambda r, a, p: [r, r], "neither an adapter"),
    "no release": (lambda r, a, p: [a, a], "is not a checkpoint"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_merge_prints_one_line_and_leaves_nothing(
    name: str, released: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    make, message = REFUSALS[name]
    (tmp_path / "place").mkdir()
    arguments = make(released, adapter, tmp_path)
    target = tmp_path / "place" / "target"
    assert message in error_message(capsys, "merge", *arguments, target, "--weights", "keep")
    assert not list((tmp_path / "place").iterdir())


def test_an_existing_directory_is_not_overwritten(
    released: Path, adapter: Path, capsys: Capsys
) -> None:
    before = files(released)
    message = error_message(capsys, "merge", released, adapter, released, "--weights", "keep")
    assert "exists; choose another place" in message
    assert files(released) == before


def test_the_command_reports_rounding_losses_and_a_way_out(
    released: Path, tmp_path: Path, capsys: Capsys
) -> None:
    settings = Lora("all", rank=2, alpha=0.1)
    factors = training_runs.learned(CFG, settings, size=0.005)
    run = training_runs.write(tmp_path / "run", released, settings, factors)
    assert main(["export-adapter", str(run), str(tmp_path / "adapter")]) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'adapter'}.\n"
    for number, change in enumerate((run, tmp_path / "adapter")):
        target = tmp_path / f"merged{number}"
        assert main(["merge", str(released), str(change), str(target), "--weights", "keep"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[0].split() == [
            "weights",
            "stored",
            "as",
            "tensors",
            "gain",
            "cosine",
        ]
        assert out.endswith(f"Wrote {target}.\n")
        [warning] = [line for line in err.splitlines() if "FP4" in line]
        assert "less than half of the change of ffn.experts.w1 (0%), " in warning
        assert "merge with --weights bfloat16, or run the release with --adapter" in warning
    assert files(tmp_path / "merged0") == files(tmp_path / "merged1")


def test_export_adapter_refuses_sources_without_an_adapter(
    released: Path, tmp_path: Path, capsys: Capsys
) -> None:
    run = full_run(tmp_path / "run", released)
    target = tmp_path / "adapter"
    assert "v4jax merge" in error_message(capsys, "export-adapter", run, target)
    assert "has no recipe.json" in error_message(capsys, "export-adapter", released, target)
    moved = training_runs.write(
        tmp_path / "moved", tmp_path / "gone", ALL, training_runs.learned(CFG, ALL)
    )
    assert "give --model" in error_message(capsys, "export-adapter", moved, target)
    assert "has no best state yet" in error_message(
        capsys, "export-adapter", moved, target, "--best"
    )
    assert not target.exists()
    assert main(["export-adapter", str(moved), str(target), "--model", str(released)]) == 0
    capsys.readouterr()
    assert "exists" in error_message(capsys, "export-adapter", moved, target, "--model", released)
