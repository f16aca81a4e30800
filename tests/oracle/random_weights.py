"""Small configurations and random weights, both under the names of DeepSeek's releases."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.oracle.model import layer_kinds

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json of a model with every kind of layer, small enough to run in a second.

    `compress_ratios` ends with the MTP module's entry, as released; `num_hidden_layers` follows
    from it unless given.
    """
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "index_head_dim": 32,
        "index_n_heads": 16,
        "index_topk": 8,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 8,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128,
    } | overrides
    n_layers = len(config["compress_ratios"]) - config["num_nextn_predict_layers"]
    return {"num_hidden_layers": n_layers} | config


def _hyper_shapes(config: Mapping[str, Any], name: str) -> Shapes:
    n = config["hc_mult"]
    rows, scales = (n, 1) if name == "head" else (n * (n + 2), 3)
    yield f"hc_{name}_fn", (rows, n * config["hidden_size"])
    yield f"hc_{name}_base", (rows,)
    yield f"hc_{name}_scale", (scales,)


def _compressor_shapes(d: int, ratio: int, head_dim: int, *, overlap: bool) -> Shapes:
    channels = head_dim * (2 if overlap else 1)
    yield "compressor.ape", (ratio, channels)
    yield "compressor.wkv.weight", (channels, d)
    yield "compressor.wgate.weight", (channels, d)
    yield "compressor.norm.weight", (head_dim,)


def _attention_shapes(c: Mapping[str, Any], kind: str, ratio: int) -> Shapes:
    d, heads, head_dim, rank = (
        c[k] for k in ("hidden_size", "num_attention_heads", "head_dim", "q_lora_rank")
    )
    low = c["o_lora_rank"] * c["o_groups"]
    yield "attn_sink", (heads,)
    yield "q_norm.weight", (rank,)
    yield "kv_norm.weight", (head_dim,)
    yield "wq_a.weight", (rank, d)
    yield "wq_b.weight", (heads * head_dim, rank)
    yield "wkv.weight", (head_dim, d)
    yield "wo_a.weight", (low, heads * head_dim // c["o_groups"])
    yield "wo_b.weight", (d, low)
    if kind != "sliding":
        yield from _compressor_shapes(d, ratio, head_dim, overlap=kind == "csa")
    if kind == "csa":
        yield "indexer.wq_b.weight", (c["index_n_heads"] * c["index_head_dim"], rank)
        yield "indexer.weights_proj.weight", (c["index_n_heads"], d)
        for name, shape in _compressor_shapes(d, ratio, c["index_head_dim"], overlap=True):
            yield f"indexer.{name}", shape


def _expert_shapes(d: int, inner: int) -> Shapes:
    yield "w1.weight", (inner, d)
    yield "w2.weight", (d, inner)
    yield "w3.weight", (inner, d)


def _ffn_shapes(c: Mapping[str, Any], *, hashed: bool) -> Shapes:
    d, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    yield "gate.weight", (experts, d)
    if hashed:
        yield "gate.tid2eid", (c["vocab_size"], c["num_experts_per_tok"])
    else:
        yield "gate.bias", (experts,)
    for e in range(experts):
        yield from ((f"experts.{e}.{name}", shape) for name, shape in _expert_shapes(d, inner))
    shared = _expert_shapes(d, inner * c["n_shared_experts"])
    yield from ((f"shared_experts.{name}", shape) for name, shape in shared)


def _block_shapes(c: Mapping[str, Any], kind: str, ratio: int, *, hashed: bool) -> Shapes:
    yield "attn_norm.weight", (c["hidden_size"],)
    yield "ffn_norm.weight", (c["hidden_size"],)
    yield from _hyper_shapes(c, "attn")
    yield from _hyper_shapes(c, "ffn")
    yield from ((f"attn.{name}", shape) for name, shape in _attention_shapes(c, kind, ratio))
    yield from ((f"ffn.{name}", shape) for name, shape in _ffn_shapes(c, hashed=hashed))


def _mtp_shapes(c: Mapping[str, Any]) -> Shapes:
    d = c["hidden_size"]
    yield from _block_shapes(c, "sliding", 0, hashed=False)
    yield from _hyper_shapes(c, "head")
    yield from ((f"{name}.weight", (d, d)) for name in ("e_proj", "h_proj"))
    yield from ((f"{name}.weight", (d,)) for name in ("enorm", "hnorm", "norm"))


def release_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and dequantised shapes of all tensors of a preview release, MTP included."""
    d, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {"embed.weight": (vocab, d), "head.weight": (vocab, d), "norm.weight": (d,)}
    shapes |= dict(_hyper_shapes(config, "head"))
    for i, (kind, ratio) in enumerate(layer_kinds(config)):
        names = _block_shapes(config, kind, ratio, hashed=i < config["num_hash_layers"])
        shapes |= {f"layers.{i}.{name}": shape for name, shape in names}
    for i in range(config["num_nextn_predict_layers"]):
        shapes |= {f"mtp.{i}.{name}": shape for name, shape in _mtp_shapes(config)}
    return shapes


def _draw(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], n_experts: int, scale: float
) -> np.ndarray:
    if name.endswith("tid2eid"):
        order = np.argsort(rng.random((shape[0], n_experts)), axis=1)
        return order[:, : shape[1]].astype(np.int64)
    noise = rng.standard_normal(shape)
    if "norm." in name or name.endswith("_scale"):
        value = 1 + 0.2 * noise
    elif name.endswith("gate.bias"):
        value = 0.1 * noise
    elif name == "embed.weight" or len(shape) == 1 or name.endswith("ape"):
        value = noise
    else:
        value = noise * scale * shape[1] ** -0.5
    return value.astype(np.float32)


def random_weights(
    config: Mapping[str, Any], seed: int, scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Random float32 weights (int64 `tid2eid`) under release names.

    Matrices preserve the magnitude of their inputs, times `scale`: at 1 every gate, score and
    router logit is of order one, and neither routing nor the choice of entries is degenerate. Each
    row of `tid2eid` holds distinct experts.
    """
    rng = np.random.default_rng(seed)
    n_experts = config["n_routed_experts"]
    return {
        name: _draw(rng, name, shape, n_experts, scale)
        for name, shape in release_shapes(config).items()
    }
