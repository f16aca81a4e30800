"""Refused files of PEFT: their settings contradict the factors, or are not supported here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import models, training_runs
from v4jax.adapters import peft, updates
from v4jax.adapters.lora import Lora
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import TensorInfo, open_safetensors, write_safetensors

CFG = models.config(models.SLIDING, models.CSA, models.CSA)


@pytest.fixture
def adapter_directory(tmp_path: Path) -> Path:
    settings = Lora("all", rank=2)
    peft.export(tmp_path / "adapter", CFG, settings, training_runs.learned(CFG, settings))
    return tmp_path / "adapter"


def configured(**changes: Any) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        file = directory / peft.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def removed(key: str) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        file = directory / peft.CONFIG
        remaining = {k: value for k, value in json.loads(file.read_text()).items() if k != key}
        file.write_text(json.dumps(remaining))

    return change


def targeting(name: str) -> Callable[[Path], Any]:
    """The adapter with one more target."""
    return lambda directory: configured(
        target_modules=[*json.loads((directory / peft.CONFIG).read_text())["target_modules"], name]
    )(directory)


def rewritten(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    def rewrite(directory: Path) -> None:
        file = directory / peft.TENSORS
        with open_safetensors(file) as opened:
            values = {name: opened.read(name).copy() for name in opened.names}
        change(values)
        kinds = {"float32": "F32", "int32": "I32"}
        infos = {name: TensorInfo(kinds[x.dtype.name], x.shape) for name, x in values.items()}
        write_safetensors(file, infos, values.__getitem__)

    return rewrite


PREFIX = "base_model.model.model.layers.0."
Q_A = PREFIX + "self_attn.q_a_proj.lora_A.weight"
DOWN_A = PREFIX + "mlp.experts.lora_A.weight"


def replaced(name: str, value: Any) -> Callable[[Path], Any]:
    def change(values: dict[str, np.ndarray]) -> None:
        values[name] = value(values[name]) if name in values else value(values[Q_A])

    return rewritten(change)


def with_nan(values: np.ndarray) -> np.ndarray:
    values[0, 0] = np.nan
    return values


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (configured(peft_type="IA3"), "IA3"),
    "dora": (configured(use_dora=True), "use_dora"),
    "biases": (configured(bias="all"), "bias"),
    "pissa": (configured(init_lora_weights="pissa"), "pissa"),
    "saved modules": (configured(modules_to_save=["lm_head"]), "modules_to_save"),
    "rank of nothing": (configured(r=0), "rank 0"),
    "another rank": (configured(r=8), "q_a_proj' have rank 2, but adapter_config.json says 8"),
    "another rank in a pattern": (
        configured(rank_pattern={"gate_up_proj": 4, "layers.1.self_attn.kv_proj": 3}),
        "'model.layers.1.self_attn.kv_proj' have rank 2, but adapter_config.json says 3",
    ),
    "an expert's rank": (configured(rank_pattern={}, r=2), "gate_up_proj' have rank 4"),
    "a rank that is no number": (configured(r="2"), "rank '2'"),
    "no rank": (removed("r"), "damaged .KeyError"),
    "alpha without end": (configured(lora_alpha=float("inf")), "alpha inf"),
    "alpha of a truth": (configured(lora_alpha=True), "alpha True"),
    "alpha that is none, in a pattern": (
        configured(alpha_pattern={"q": float("nan")}),
        "alpha nan",
    ),
    "fewer targets": (configured(target_modules=["q_a_proj"]), "has factors for '.*q_b_proj', wh"),
    "more targets": (targeting("indexer.kv_proj"), "no factors for '.*indexer.kv_proj', which is"),
    "a target that stays": (targeting("lm_head"), "no factors for 'lm_head', which is a target"),
    "grouped maps": (targeting("o_a_proj"), "no factors for 'model.layers.0.self_attn.o_a_proj'"),
    "fewer layers": (configured(layers_to_transform=[0, 2]), "has factors for 'model.layers.1"),
    "left out": (configured(exclude_modules=["kv_proj"]), "has factors for '.*kv_proj', which"),
    "no targets": (configured(target_modules=None, target_parameters=None), "no target_modules"),
    "targets by number": (configured(target_modules=[3]), "damaged .*target_modules"),
    "a broken expression": (configured(target_modules="("), "damaged"),
    "fewer parameters": (configured(target_parameters=["mlp.experts.down_proj"]), "base_layer"),
    "rank-stabilized in words": (configured(use_rslora="no"), "use_rslora 'no'"),
    "dropout of all": (configured(lora_dropout=1.0), "lora_dropout 1.0"),
    "biases of factors": (configured(lora_bias=True), "lora_bias"),
    "a setting of tomorrow": (configured(lora_twist={"by": 3}), "has lora_twist, which adapters"),
    "a llama's": (configured(auto_mapping={"base_model_class": "LlamaForCausalLM"}), "is a Llama"),
    "a base that lies here": (
        configured(base_model_name_or_path="tiny"),
        "vocab_size of its base, tiny, is not that of this model",
    ),
    "a base by number": (configured(base_model_name_or_path=3), "base_model_name_or_path 3"),
    "alpha in words": (configured(lora_alpha="many"), "damaged"),
    "a broken pattern": (configured(rank_pattern={"(": 3}), "damaged"),
    "settings that are no JSON": (lambda d: (d / peft.CONFIG).write_text("{"), "line 1"),
    "no settings": (lambda d: (d / peft.CONFIG).unlink(), "neither an adapter"),
    "no tensors": (lambda d: (d / peft.TENSORS).unlink(), "expected adapter_config.json and"),
    "cut off": (lambda d: (d / peft.TENSORS).write_bytes(b"12345678"), "adapter_model"),
    "no factors": (rewritten(lambda values: values.clear()), "no factors"),
    "one factor": (rewritten(lambda values: values.pop(Q_A)), "without its other factor"),
    "another module": (
        replaced(PREFIX + "self_attn.o_a_proj.lora_A.weight", np.copy),
        "o_a_proj",
    ),
    "another layer": (
        replaced(Q_A.replace("layers.0", "layers.9"), np.copy),
        "this model 3 layers",
    ),
    "integers": (replaced(Q_A, lambda x: x.astype(np.int32)), "I32"),
    "no number": (replaced(Q_A, with_nan), "values that are not finite"),
    "other channels": (replaced(Q_A, lambda x: x[:, :-1]), "another model"),
    "other ranks": (replaced(Q_A, lambda x: x[:1]), "ranks 1 and 2"),
    "other experts": (replaced(DOWN_A, lambda x: x[:-1]), "8 matrices"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_adapters_that_do_not_fit_this_model_are_refused(
    name: str, adapter_directory: Path
) -> None:
    change, message = REFUSALS[name]
    change(adapter_directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        updates.read(adapter_directory, CFG)
    assert str(adapter_directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_without_effect_here_are_ignored(
    adapter_directory: Path,
) -> None:
    settings, expected = peft.load(adapter_directory, CFG)
    mapping = {"base_model_class": "DeepseekV4ForCausalLM", "unsloth_fixed": True}
    configured(
        auto_mapping=mapping,
        unsloth_fixed=True,
        peft_version="0.21.2",
        revision="main",
        base_model_name_or_path="some/where else",
        loftq_config={"loftq_bits": 4},
        init_lora_weights="gaussian",
        megatron_core="megatron.core",
        qalora_group_size=16,
        a_setting_of_tomorrow=None,
    )(adapter_directory)
    targeting("q_proj")(adapter_directory)  # no module of V4 has this name
    loaded, factors = peft.load(adapter_directory, CFG)
    assert loaded == settings
    assert factors.keys() == expected.keys()
    for name, pair in expected.items():
        np.testing.assert_array_equal(factors[name]["a"], pair["a"])
        np.testing.assert_array_equal(factors[name]["b"], pair["b"])
