"""Floating-point operations of training V4; a multiplication and an addition count as two.

Only operations that the mathematics needs count, not recomputation to save memory.
"""

from typing import Any

from v4jax.adapters.lora import Lora
from v4jax.model import params
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.transformer import Model

from . import trainable
from .trainable import Full

# Dense bfloat16 operations per second according to the vendor, by JAX's device kind.
PEAK = {
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak(device: Any) -> float | None:
    """The device's peak operations per second; None if unknown."""
    kind = device.device_kind
    return max((value for name, value in PEAK.items() if kind.startswith(name)), default=None)


def per_token(
    cfg: ModelConfig, what: Full | Lora, length: float, *, mtp: bool, indexer: bool
) -> float:
    """Operations of a training step for one token.

    Args:
      cfg: the model's configuration.
      what: what is trained; frozen weights need no gradient.
      length: tokens of a document, averaged over tokens.
      mtp: whether the MTP blocks run.
      indexer: whether the indexers are trained.
    """
    total = 0.0
    trained = set(trainable.declare(cfg, what))
    for name, spec in params.leaves(Model(cfg)):
        if spec.stored == "i64" or name == "embed_VD" or (name.startswith("mtp.") and not mtp):
            continue
        if len(spec.shape) - spec.stack_dims < 2:
            continue
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if spec.stored == "expert" else 1.0
        # Forward; backward to the input; backward to the weight.
        passes = 3 if isinstance(what, Full) and name in trained else 2
        if ".indexer." in name:
            passes = 3 if indexer else 1
        total += 2 * spec.size * share * passes
    if mtp:
        total += 3 * 2 * cfg.vocab_size * cfg.hidden_size
    if isinstance(what, Lora):
        total += _adapter(cfg, what)
    return total + sum(attention(cfg, kind, length, indexer=indexer) for kind in cfg.layers)


def attention(cfg: ModelConfig, kind: LayerKind, length: float, *, indexer: bool) -> float:
    """Operations of one layer's attention for one token, without projections."""
    entries = length / 2 / kind.ratio if kind.ratio else 0.0
    attended = min(entries, cfg.index_topk) if kind.attention == "csa" else entries
    keys = min(length / 2, cfg.sliding_window) + attended
    # Products with keys and with values, once forward and twice backward.
    core = 3 * 2 * 2 * cfg.num_attention_heads * cfg.head_dim * keys
    if kind.attention != "csa" or (entries <= cfg.index_topk and not indexer):
        return core
    passes = 3 if indexer else 1
    return core + passes * 2 * cfg.index_n_heads * cfg.index_head_dim * entries


def _adapter(cfg: ModelConfig, what: Lora) -> float:
    total = 0.0
    for name, factors in trainable.declare(cfg, what).items():
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if ".experts." in name else 1.0
        total += 3 * 2 * share * sum(spec.size for spec in factors.values())
    return total
