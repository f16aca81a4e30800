"""The oracle's weights and configs in transformers' DeepseekV4ForCausalLM (needs torch)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

from tests.oracle.model import layer_kinds
from tests.oracle.primitives import Weights

HF_NAMES = [
    (r"^embed\.weight", "model.embed_tokens.weight"),
    (r"^head\.weight", "lm_head.weight"),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn\.attn_sink", ".self_attn.sinks"),
    (r"\.attn\.indexer\.(compressor\.)?", ".self_attn.compressor.indexer."),
    (r"\.attn\.", ".self_attn."),
    (r"\.indexer\.weights_proj", ".indexer.scorer.weights_proj"),
    (r"\.ape$", ".position_bias"),
    (r"(compressor|indexer)\.norm\.", r"\1.kv_norm."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.w(q_a|q_b|kv|gate|o_a|o_b)\.", r".\1_proj."),
    (r"\.ffn\.gate\.bias", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.", ".mlp."),
    (r"shared_experts\.w1\.", "shared_experts.gate_proj."),
    (r"shared_experts\.w3\.", "shared_experts.up_proj."),
    (r"shared_experts\.w2\.", "shared_experts.down_proj."),
]


LAYER_TYPES = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def hf_name(name: str) -> str:
    """The name in transformers of a tensor that it stores unchanged."""
    for pattern, replacement in HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def hf_state(weights: Weights, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict for transformers: experts stacked, `w1` above `w3`, without MTP."""
    state = {
        hf_name(name): w
        for name, w in weights.items()
        if not name.startswith("mtp.") and ".experts." not in name
    }
    for i in range(config["num_hidden_layers"]):
        w1, w2, w3 = (
            np.stack(
                [
                    weights[f"layers.{i}.ffn.experts.{e}.{matrix}.weight"]
                    for e in range(config["n_routed_experts"])
                ]
            )
            for matrix in ("w1", "w2", "w3")
        )
        experts = f"model.layers.{i}.mlp.experts."
        state[f"{experts}gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        state[f"{experts}down_proj"] = w2
    return {name: torch.from_numpy(w) for name, w in state.items()}


def hf_model(
    weights: Weights, config: Mapping[str, Any], dtype: torch.dtype
) -> DeepseekV4ForCausalLM:
    """A transformers model with these weights, in evaluation mode.

    transformers has one ratio for all CSA layers and one for all HCA layers.
    """
    kinds = layer_kinds(config)
    oracle_only = ("architectures", "layer_kinds", "compress_ratios", "expert_dtype")
    settings = {k: v for k, v in config.items() if k not in oracle_only}
    hf_config = DeepseekV4Config(
        **settings,
        layer_types=[LAYER_TYPES[kind] for kind, _ in kinds],
        compress_rates={LAYER_TYPES[kind]: ratio for kind, ratio in kinds},
    )
    model = AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    )
    model.load_state_dict(hf_state(weights, config), strict=True)
    return model.eval()
