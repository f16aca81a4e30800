"""Adapters exported to PEFT and loaded from it, compared with PEFT on transformers' model."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft as theirs
import pytest
import torch

import v4jax
from tests import hf_models, training_runs
from v4jax.adapters import lora, peft, runs, updates
from v4jax.adapters.lora import Adapter
from v4jax.adapters.lora_settings import MODULES, Lora
from v4jax.checkpoints.disk import CheckpointError
from v4jax.language_model import LanguageModel
from v4jax.model import params, sharding
from v4jax_train.trainable import Full

pytestmark = [
    # PEFT warns about patterns that match parameters, but applies their ranks all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    # It reads a property of transformers that has been renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
TOKENS_BT = np.random.default_rng(0).integers(0, 128, (2, 40))
SETTINGS = {
    "attn": Lora("attn", rank=3, alpha=5.0, dropout=0.25),
    "attn+shared": Lora("attn+shared", rank=4, rank_stabilized=True),
    "experts": Lora("experts", rank=4, alpha=8.0, expert_rank=2),
    "all": Lora("all", rank=3, expert_rank=2),
    "all, rank-stabilized": Lora("all", rank=3, expert_rank=5, rank_stabilized=True),
    "every projection": Lora((*MODULES, "mlp.experts.down_proj"), rank=2, expert_rank=3),
}


@pytest.fixture(scope="module")
def torch_model() -> Any:
    return hf_models.make([0, 4, 4], 7, num_hash_layers=1)


@pytest.fixture(scope="module")
def directory(torch_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.save(torch_model, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def model(directory: Path) -> LanguageModel:
    return v4jax.load(directory, dtype="float32", numerics="hf")


def logits(model: LanguageModel) -> np.ndarray:
    return np.asarray(model.logits(TOKENS_BT))


def folded(model: LanguageModel, settings: Lora, adapter: Adapter) -> LanguageModel:
    """The model with the update folded into its matrices, so that adapters share a program."""
    base = model.weights
    changed = training_runs.folded(model.config, base, settings, adapter, jnp.float32)
    return dataclasses.replace(model, weights=changed, tokenizer=None)


def distance(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def assert_same(actual: Adapter, expected: Adapter) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        for part in "ab":
            np.testing.assert_array_equal(actual[name][part], expected[name][part])


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_reproduces_the_logits_of_our_adapters(
    name: str, torch_model: Any, model: LanguageModel, tmp_path: Path
) -> None:
    settings, cfg = SETTINGS[name], model.config
    adapter = training_runs.learned(cfg, settings)
    peft.export(tmp_path / "adapter", cfg, settings, adapter, base="some/model")
    wrapped = theirs.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path / "adapter")
    expected = hf_models.logits(wrapped, TOKENS_BT)
    assert distance(expected, hf_models.logits(torch_model, TOKENS_BT)) > 0.1
    assert distance(logits(folded(model, settings, adapter)), expected) <= 1e-5
    if name == "all":
        assert distance(logits(model.with_adapter(tmp_path / "adapter")), expected) <= 1e-5
    loaded, factors = peft.load(tmp_path / "adapter", cfg)
    assert loaded == settings
    assert_same(factors, adapter)


THEIRS: dict[str, dict[str, Any]] = {
    "names without their parents": {"target_modules": ["q_a_proj", "self_attn.o_b_proj"], "r": 3},
    "a regular expression": {"target_modules": r".*\.layers\.[02]\.self_attn\.q_[ab]_proj"},
    "some layers": {"target_modules": ["shared_experts.up_proj"], "layers_to_transform": [1]},
    "own ranks and alphas": {
        "target_modules": ["self_attn.kv_proj", "shared_experts.gate_proj"],
        "rank_pattern": {"kv_proj": 2, r"layers\.1\.mlp\.shared_experts\.gate_proj": 7},
        "alpha_pattern": {"kv_proj": 3},
        "use_rslora": True,
    },
    "ends of names that compressors and indexers have too": {
        "target_modules": ["q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"],
    },
    "gates": {
        "target_modules": ["gate_proj", "weights_proj"],
        "alpha_pattern": {r"compressor\.gate_proj": 11},
        "use_rslora": True,
    },
    "no indexers": {
        "target_modules": ["kv_proj", "q_b_proj"],
        "exclude_modules": r".*\.indexer\..*",
    },
    "compressors of some layers": {
        "target_modules": ["compressor.kv_proj", "model.layers.1.self_attn.o_b_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
        "rank_pattern": {"kv_proj": 5},
    },
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"], "r": 2},
    "gate and up only": {"target_parameters": ["gate_up_proj"], "r": 3, "use_rslora": True},
    "down only": {
        "target_parameters": ["model.layers.1.mlp.experts.down_proj"],
        "target_modules": ["self_attn.q_b_proj"],
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_reproduce_the_logits_of_adapters_from_peft(
    name: str, torch_model: Any, model: LanguageModel, tmp_path: Path
) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": []} | THEIRS[name]
    config = theirs.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    torch.manual_seed(1)
    wrapped = theirs.get_peft_model(copy.deepcopy(torch_model), config).eval()
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    expected = hf_models.logits(wrapped, TOKENS_BT)
    assert distance(expected, hf_models.logits(torch_model, TOKENS_BT)) > 1e-3
    loaded, factors = peft.load(tmp_path / "adapter", model.config)
    assert distance(logits(folded(model, loaded, factors)), expected) <= 1e-5
    peft.export(tmp_path / "again", model.config, loaded, factors)
    assert_same(peft.load(tmp_path / "again", model.config)[1], factors)


def test_adapters_share_the_base_and_leave_it_unchanged(
    model: LanguageModel, tmp_path: Path
) -> None:
    settings, cfg = SETTINGS["all"], model.config
    before = list(params.leaves(model.weights))
    changed = []
    for seed in range(2):
        adapter = training_runs.learned(cfg, settings, seed)
        peft.export(tmp_path / str(seed), cfg, settings, adapter)
        changed.append(model.with_adapter(tmp_path / str(seed)))
    for name, array in before:
        for adapted in changed:
            weight = dict(params.leaves(adapted.weights))[name]
            assert getattr(weight, "base", weight) is array
    again = changed[0].with_adapter(tmp_path / "1")
    np.testing.assert_array_equal(logits(again), logits(changed[1]))
    np.testing.assert_array_equal(logits(again.with_adapter(None)), logits(model))


def test_load_takes_an_adapter(directory: Path, model: LanguageModel, tmp_path: Path) -> None:
    settings = SETTINGS["all"]
    adapter = training_runs.learned(model.config, settings)
    peft.export(tmp_path / "adapter", model.config, settings, adapter)
    run = training_runs.write(tmp_path / "run", directory, settings, adapter)
    expected = logits(model.with_adapter(tmp_path / "adapter"))
    for path in (tmp_path / "adapter", run):
        loaded = v4jax.load(directory, dtype="float32", numerics="hf", adapter=path)
        np.testing.assert_array_equal(logits(loaded), expected)


def test_a_mesh_shards_the_adapter_as_training_does(directory: Path, tmp_path: Path) -> None:
    mesh = sharding.make_mesh(expert=8)
    settings = Lora("all", rank=2)
    base = v4jax.load(directory, dtype="float32", numerics="hf", mesh=mesh)
    adapter = training_runs.learned(base.config, settings)
    peft.export(tmp_path / "adapter", base.config, settings, adapter)
    leaves = dict(params.leaves(base.with_adapter(tmp_path / "adapter").weights))
    weight = leaves["stacks.0.experts.0.gate_EFD"]
    assert weight.a.sharding.mesh == mesh
    assert weight.a.sharding.spec[1] == weight.base.sharding.spec[1] is not None


def test_the_newest_or_the_best_state_of_a_run_is_read(
    directory: Path, model: LanguageModel, tmp_path: Path
) -> None:
    settings = Lora("attn+shared", rank=2)
    older, newer, best = (training_runs.learned(model.config, settings, seed) for seed in range(3))
    training_runs.write(tmp_path / "run", directory, settings, older, step_number=2, best=best)
    training_runs.write(tmp_path / "run", directory, settings, newer, step_number=11)
    # As an interrupted save leaves it.
    (tmp_path / "run" / runs.STATES / "12.orbax-checkpoint-tmp-1").mkdir()
    update = updates.read(tmp_path / "run", model.config)
    assert isinstance(update, updates.Adapted)
    assert update.settings == settings
    assert_same(update.factors, newer)
    update = updates.read(tmp_path / "run", model.config, best=True)
    assert isinstance(update, updates.Adapted)
    assert_same(update.factors, best)


def test_weights_of_a_run_replace_those_of_the_model(
    directory: Path, model: LanguageModel, tmp_path: Path
) -> None:
    leaves = dict(params.leaves(model.weights))
    bias = next(name for name in leaves if name.endswith("router.bias_E"))
    trained = {name: np.asarray(leaves[name]) + 1 for name in ("norm_D", "head_VD")}
    balanced = {bias: np.asarray(leaves[bias]) - 1}
    run = training_runs.write(tmp_path / "run", directory, Full(), trained, balanced)
    loaded = v4jax.load(directory, dtype="float32", numerics="hf", adapter=run)
    for name, value in params.leaves(loaded.weights):
        expected = (trained | balanced).get(name, leaves[name])
        np.testing.assert_array_equal(value, expected)
    with pytest.raises(CheckpointError, match="trained the weights in full"):
        model.with_adapter(run)


def no_state(run: Path) -> None:
    for file in (run / runs.STATES).iterdir():
        file.rename(run / file.name)


def half_a_state(run: Path) -> None:
    state = run / runs.STATES / "3" / "state"
    for file in state.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])


RUN_REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no state": (no_state, "no saved state yet"),
    "half a state": (half_a_state, "damaged"),
    "a recipe without either": (
        lambda run: (run / runs.RECIPE).write_text("{}"),
        "recipe.json: is damaged",
    ),
    "strange settings": (
        lambda run: (run / runs.RECIPE).write_text('{"adapter": {"size": 3}}'),
        "recipe.json: is damaged",
    ),
    "other settings": (
        lambda run: (run / runs.RECIPE).write_text('{"adapter": {"rank": 3}}'),
        "another model",
    ),
}


@pytest.mark.parametrize("name", RUN_REFUSALS)
def test_a_run_that_cannot_be_read_is_refused(
    name: str, directory: Path, model: LanguageModel, tmp_path: Path
) -> None:
    settings = Lora("attn", rank=2)
    adapter = training_runs.learned(model.config, settings)
    run = training_runs.write(tmp_path / "run", directory, settings, adapter)
    change, message = RUN_REFUSALS[name]
    change(run)
    with pytest.raises(CheckpointError, match=message):
        updates.read(run, model.config)


def test_newly_initialised_factors_survive_an_export(model: LanguageModel, tmp_path: Path) -> None:
    settings, cfg = Lora("all", rank=2), model.config
    adapter = jax.tree.map(np.asarray, lora.init(cfg, settings, jax.random.key(0)))
    peft.export(tmp_path / "adapter", cfg, settings, adapter)
    loaded, factors = peft.load(tmp_path / "adapter", cfg)
    assert loaded == settings
    assert_same(factors, adapter)
