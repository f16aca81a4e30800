"""Every number in config.json has a range, and unknown keys are ignored only if harmless."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from v4jax import presets
from v4jax.checkpoints import config_file
from v4jax.model import config_json, config_keys, config_ranges
from v4jax.model.config import DSpark, LayerKind, ModelConfig, Yarn
from v4jax.text.demo_tokenizer import build_demo_tokenizer

FLASH = presets.get_json("flash")
DRAFTED = presets.get_json("flash-0731")
NUMBERS = [k for k, v in FLASH.items() if type(v) in (int, float) and k != "attention_dropout"]
LISTS = sorted(config_keys.LISTS - {"dspark_target_layer_ids"})
NOT_NUMBERS = [math.nan, math.inf, -math.inf, -1, "1", True, [1], {"a": 1}, 10**400, 1e39, 1.5e-46]


def assert_rejected(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        config_json.from_json(raw)
    assert str(caught.value).startswith("config.json: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_must_be_in_its_range(key: str) -> None:
    for value in NOT_NUMBERS:
        if (key, value) not in (("eos_token_id", [1]), ("initializer_range", 1.5e-46)):
            assert_rejected(FLASH | {key: value}, key)


@pytest.mark.parametrize("key", sorted({*LISTS, *config_keys.OBJECTS}))
def test_every_list_and_object_must_have_its_type(key: str) -> None:
    for value in (7, "yarn", True, 1.5, [[]], ["a"], [math.nan], {"a": 1}):
        assert_rejected(FLASH | {key: value}, f"{key}|RoPE")


@pytest.mark.parametrize(
    "key", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"]
)
def test_numbers_of_rope_scaling_must_be_in_their_range(key: str) -> None:
    for value in (math.nan, math.inf, -1, 0, "16", True, [], 10**400):
        assert_rejected(FLASH | {"rope_scaling": FLASH["rope_scaling"] | {key: value}}, key)


def test_a_partial_rotary_factor_must_be_a_fraction() -> None:
    for value in (math.nan, 0, -0.5, 1.5, "half", True, [0.5]):
        assert_rejected(FLASH | {"partial_rotary_factor": value}, "partial_rotary_factor")
        nested = {"main": {"partial_rotary_factor": value}}
        assert_rejected(FLASH | {"rope_parameters": nested}, "partial_rotary_factor")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dspark_block_size", 0),
        ("dspark_markov_rank", 1.5),
        ("dspark_noise_token_id", 129280),
        ("dspark_noise_token_id", -1),
        ("dspark_target_layer_ids", [40, 43]),
        ("dspark_target_layer_ids", [True]),
        ("dspark_target_layer_ids", 40),
        ("n_mtp_layers", math.nan),
    ],
)
def test_numbers_of_the_drafter_must_be_in_their_range(key: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=key.removeprefix("dspark_").replace("n_mtp_layers", "stages")
    ):
        config_json.from_json(DRAFTED | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9, "num_hash_layers": 10**9}, "num_hidden_layers"),
        ({"num_hash_layers": -1}, "num_hash_layers"),
        ({"num_hash_layers": True}, "num_hash_layers"),
        ({"compress_ratios": [0, 4.0] + [0] * 42}, "compress_ratios"),
        ({"compress_ratios": [0, True] + [0] * 42}, "compress_ratios"),
        ({"compress_rate_csa": math.nan}, "compression rate"),
        ({"compress_rate_csa": 8}, "compress_ratios"),
        ({"compress_rates": {"compressed_sparse_attention": "4"}}, "compression rate"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"intermediate_size": 1}, "intermediate_size"),
        ({"num_key_value_heads": True}, "num_key_value_heads"),
        ({"attention_bias": 0}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"router_jitter_noise": math.nan}, "router_jitter_noise"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"rope_type": "default"}}, "rope_type"),
        ({"rope_scaling": {"type": "default", "factor": 4}}, "factor"),
        ({"rope_parameters": FLASH["rope_scaling"] | {"factor": 8}}, "twice"),
        ({"rope_parameters": {"main": [], "compress": {}}}, r"rope_parameters\.main"),
        ({"rope_parameters": {"main": {"factor": 2}}}, "factor"),
        ({"rope_parameters": {"main": {}, "mscale": 2}}, "mscale"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast"),
        ({"quantization_config": {"activation_scheme": "static"}}, "activation_scheme"),
        ({"quantization_config": {"bits": 4}}, "bits"),
    ],
)
def test_wrong_and_contradictory_values_are_rejected(changes: dict[str, Any], message: str) -> None:
    assert_rejected(FLASH | changes, message)


def test_every_number_of_a_configuration_has_a_range() -> None:
    for record in (ModelConfig, LayerKind, Yarn, DSpark):
        numbers = {f.name for f in dataclasses.fields(record) if f.type in (int, float)}
        assert numbers
        assert numbers <= config_ranges.RANGES.keys()


def test_a_configuration_created_in_python_is_checked_too() -> None:
    flash = presets.get("flash")
    for changes in ({"rms_norm_eps": math.nan}, {"rope_theta": -1.0}, {"bos_token_id": 129280}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            dataclasses.replace(flash, **changes)


HARMLESS = {
    "unsloth_fixed": True,
    "unsloth_version": "2026.11.3",
    "_name_or_path": "somebody/model",
    "_attn_implementation": "eager",
    "_attn_implementation_autoset": True,
    "_comment": {"of": "mine"},
    "transformers_version": "5.23.0",
    "use_cache": False,
    "output_attentions": True,
    "pad_token_id": 2,
    "temperature": 0.6,
    "max_new_tokens": 20,
    "torch_dtype": "float32",
    "dtype": "bfloat16",
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0"},
    "num_local_experts": 256,
    "pruned_heads": {},
    "attention_dropout": 0,
    "per_layer_config": None,
}


def test_keys_that_cannot_change_the_model_are_ignored() -> None:
    assert config_json.from_json(FLASH | HARMLESS) == presets.get("flash")
    quantization = FLASH["quantization_config"] | {"modules_to_not_convert": None, "_note": 1}
    assert config_json.from_json(FLASH | {"quantization_config": quantization})


def test_every_key_that_transformers_writes_is_known() -> None:
    import transformers

    written = transformers.AutoConfig.for_model("deepseek_v4").to_dict()
    written |= transformers.PreTrainedConfig().to_dict() | transformers.GenerationConfig().to_dict()
    assert len(written) > 100
    assert not list(filter(config_keys.is_unknown, written))


@pytest.mark.parametrize("key", ["sliding_windows", "mscale", "rope_interleaved", "logit_softcap"])
def test_an_unknown_key_that_might_change_the_model_is_rejected(key: str) -> None:
    assert_rejected(FLASH | {key: 1.0}, f"unknown key '{key}'.*'_'")


def test_a_wrong_end_token_is_rejected() -> None:
    assert config_json.from_json(FLASH | {"eos_token_id": [7, 1]}).eos_token_ids == (7, 1)
    for value in (-1, 129280, True, "1", 1.0, [1, -1], [1, True], [[1]], [None], {"a": 1}):
        assert_rejected(FLASH | {"eos_token_id": value}, "eos_token_id")


TINY = presets.get_json("tiny")
WITHOUT = {key: value for key, value in TINY.items() if key != "eos_token_id"}


def write_configs(path: Path, raw: dict[str, Any], **files: Any) -> Path:
    """Write config.json and other JSON files into a directory; returns the path of config.json."""
    for name, value in {"config": raw, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path / "config.json"


def write_tokenizer(path: Path) -> None:
    build_demo_tokenizer(TINY["vocab_size"]).save(str(path / "tokenizer.json"))


def ends_of(file: Path) -> tuple[int, ...]:
    return config_file.end_tokens(file.parent, config_file.read(file))


def test_end_tokens_come_from_the_first_file_that_has_them(tmp_path: Path) -> None:
    ends = lambda raw, **files: ends_of(write_configs(tmp_path, raw, **files))
    assert ends(WITHOUT) == ()
    write_tokenizer(tmp_path)
    assert ends(WITHOUT) == (1,)
    assert ends(WITHOUT, tokenizer_config={"eos_token": "<think>"}) == (5,)
    assert ends(WITHOUT, tokenizer_config={"eos_token": {"content": "</think>"}}) == (6,)
    assert ends(WITHOUT | {"eos_token_id": None}, generation_config={"eos_token_id": [3, 1]}) == (
        3,
        1,
    )
    assert ends(WITHOUT | {"eos_token_id": []}, generation_config={"eos_token_id": 4}) == (4,)
    assert ends(WITHOUT | {"eos_token_id": [1, 2]}) == (1, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"eos_token_id": 5000}}, "generation_config.json: eos_token_id"),
        ({"generation_config": {"eos_token_id": True}}, "generation_config.json: eos_token_id"),
        ({"generation_config": []}, "generation_config.json: not a JSON object"),
        (
            {"tokenizer_config": {"eos_token": "<nothing>"}},
            "has no token '<nothing>'.*eos_token_id",
        ),
        ({"tokenizer_config": {"eos_token": 7}}, "tokenizer_config.json: eos_token is 7"),
        ({"special_tokens_map": {"eos_token": {}, "pad": 1}}, None),
    ],
)
def test_a_wrong_end_token_in_another_file_is_rejected(
    tmp_path: Path, files: dict[str, Any], message: str | None
) -> None:
    write_tokenizer(tmp_path)
    file = write_configs(tmp_path, WITHOUT, **files)
    if message is None:
        assert ends_of(file) == (1,)
        return
    with pytest.raises(ValueError, match=message):
        ends_of(file)
