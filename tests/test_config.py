"""Configurations: both formats, presets and errors; and the division of layers into segments."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax import presets
from v4jax.model import config_json
from v4jax.model.config import LayerKind, ModelConfig, Yarn
from v4jax.model.segments import segments

FLASH = presets.get_json("flash")
TRANSFORMERS = {
    key: value
    for key, value in FLASH.items()
    if key not in ("compress_ratios", "num_hash_layers", "rope_scaling", "qk_rope_head_dim")
} | {
    "layer_types": ["sliding_attention"] * 2
    + ["compressed_sparse_attention", "heavily_compressed_attention"] * 20
    + ["compressed_sparse_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "partial_rotary_factor": 0.125,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
        "compress": {
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": 160000.0,
            "partial_rotary_factor": 0.125,
            "attention_factor": 1.0,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
}


def read(**changes: object) -> ModelConfig:
    return config_json.from_json(FLASH | changes)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_round_trips_through_json(name: str) -> None:
    cfg = presets.get(name)
    assert config_json.from_json(config_json.to_json(cfg)) == cfg
    hash(cfg)


def test_flash_and_pro_have_the_released_schedules() -> None:
    flash, pro = presets.get("flash"), presets.get("pro")
    assert [layer.ratio for layer in flash.layers] == [0, 0] + [4, 128] * 20 + [4]
    assert [layer.ratio for layer in pro.layers] == [128, 128] + [4, 128] * 29 + [4]
    assert [layer.ffn for layer in pro.layers].count("hash") == 3
    assert flash.yarn == Yarn(16.0, 65536)


def test_both_formats_give_the_same_configuration() -> None:
    assert config_json.from_json(TRANSFORMERS) == presets.get("flash")


def test_layer_types_allow_any_ratio_for_csa() -> None:
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 32}
    cfg = config_json.from_json(TRANSFORMERS | {"compress_rates": rates})
    assert cfg.layers[2] == LayerKind("csa", 8, "hash")
    assert cfg.layers[3] == LayerKind("hca", 32, "routed")
    assert config_json.from_json(config_json.to_json(cfg)) == cfg


def test_a_ratio_other_than_4_in_compress_ratios_is_hca() -> None:
    ratios = [0, 16, 4] + [0] * 40
    cfg = read(compress_ratios=ratios)
    assert [layer.attention for layer in cfg.layers[:3]] == ["sliding", "hca", "csa"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kv_source_layer_ids": [2, 8]}, "kv_source_layer_ids"),
        ({"index_topkk": 3}, "index_topk"),
        ({"model_type": "deepseek_v41"}, "model_type"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"compress_ratios": [0] * 43 + [4]}, "compress_ratios"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "original_max_position_embeddings"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"o_groups": 7}, "o_groups"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 256}, "index_head_dim"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok"),
        ({"swiglu_limit": -1.0}, "swiglu_limit"),
        ({"expert_dtype": "int8"}, "expert_dtype"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ({"partial_rotary_factor": 0.5}, "rotary"),
        ({"layer_types": ["sliding_attention"] * 43}, "layer_types"),
        ({"layer_types": ["full_attention"] * 43}, "full_attention"),
        ({"mlp_layer_types": ["moe"] * 42}, "mlp_layer_types"),
    ],
)
def test_unsupported_values_are_rejected_by_name(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        read(**changes)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("key", ["head_dim", "compress_ratios", "num_hidden_layers", "rope_theta"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        config_json.from_json({k: v for k, v in FLASH.items() if k != key})


def test_null_values_and_bookkeeping_keys_do_not_matter() -> None:
    assert read(pad_token_id=None, some_new_key=None, use_cache=False) == presets.get("flash")


def test_an_unknown_preset_raises_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"flash.*pro"):
        presets.get("mini")


KINDS = [
    LayerKind("sliding", 0, "hash"),
    LayerKind("csa", 4, "routed"),
    LayerKind("hca", 128, "routed"),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24))
def test_segments_concatenate_to_the_layers(layers: list[LayerKind]) -> None:
    parts = segments(tuple(layers))
    concatenated = [kind for part in parts for kind in part.pattern * part.repeats]
    assert concatenated == layers
    assert [part.first for part in parts] == [
        sum(earlier.length for earlier in parts[:i]) for i in range(len(parts))
    ]


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_program_for_all_layers_has_as_many_bodies_as_for_five(name: str) -> None:
    cfg = presets.get(name)
    bodies = lambda layers: sum(len(part.pattern) for part in segments(layers))
    assert bodies(cfg.layers) == bodies(cfg.layers[:5]) == 4


def test_layer_index_counts_across_repeats() -> None:
    part = segments(presets.get("flash").layers)[-1]
    assert (part.layer_index(0, 0), part.layer_index(1, 19)) == (3, 42)


def test_a_configuration_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.get("flash").hidden_size = 1  # pyright: ignore[reportAttributeAccessIssue]
