"""The name table: our weights, the release's tensors, and transformers' two spellings of them.

The rest of the package uses release names (`layers.0.attn.wq_a.weight`). This file maps each to
the leaf that holds it, and to other files' spellings. The map is total in both directions.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np

from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.segments import segments
from v4jax.model.transformer import Model

_HYPER_HEAD = {
    "hyper_head.fn_NM": "hc_head_fn",
    "hyper_head.base_N": "hc_head_base",
    "hyper_head.scale_1": "hc_head_scale",
}
TOP = {
    "embed_VD": "embed.weight",
    "head_VD": "head.weight",
    "norm_D": "norm.weight",
    **_HYPER_HEAD,
}
_COMPRESSOR = {
    "kv_CD": "wkv.weight",
    "gate_CD": "wgate.weight",
    "bias_MC": "ape",
    "norm_K": "norm.weight",
}
BLOCK = {
    "attention_hyper.fn_QM": "hc_attn_fn",
    "attention_hyper.base_Q": "hc_attn_base",
    "attention_hyper.scale_3": "hc_attn_scale",
    "attention_norm_D": "attn_norm.weight",
    "attention.q_a_RD": "attn.wq_a.weight",
    "attention.q_norm_R": "attn.q_norm.weight",
    "attention.q_b_PR": "attn.wq_b.weight",
    "attention.kv_KD": "attn.wkv.weight",
    "attention.kv_norm_K": "attn.kv_norm.weight",
    "attention.sink_H": "attn.attn_sink",
    "attention.o_a_QP": "attn.wo_a.weight",
    "attention.o_b_DQ": "attn.wo_b.weight",
    **{f"attention.compressor.{a}": f"attn.compressor.{b}" for a, b in _COMPRESSOR.items()},
    "attention.indexer.q_b_PR": "attn.indexer.wq_b.weight",
    "attention.indexer.weights_ID": "attn.indexer.weights_proj.weight",
    **{
        f"attention.indexer.compressor.{a}": f"attn.indexer.compressor.{b}"
        for a, b in _COMPRESSOR.items()
    },
    "ffn_hyper.fn_QM": "hc_ffn_fn",
    "ffn_hyper.base_Q": "hc_ffn_base",
    "ffn_hyper.scale_3": "hc_ffn_scale",
    "ffn_norm_D": "ffn_norm.weight",
    "router.gate_ED": "ffn.gate.weight",
    "router.bias_E": "ffn.gate.bias",
    "router.expert_ids_VA": "ffn.gate.tid2eid",
    "shared.gate_FD": "ffn.shared_experts.w1.weight",
    "shared.up_FD": "ffn.shared_experts.w3.weight",
    "shared.down_DF": "ffn.shared_experts.w2.weight",
}
EXPERTS = {
    "gate_EFD": "ffn.experts.{e}.w1.weight",
    "up_EFD": "ffn.experts.{e}.w3.weight",
    "down_EDF": "ffn.experts.{e}.w2.weight",
}
MTP = {
    "embed_DD": "e_proj.weight",
    "streams_DD": "h_proj.weight",
    "embed_norm_D": "enorm.weight",
    "streams_norm_D": "hnorm.weight",
    "norm_D": "norm.weight",
    **_HYPER_HEAD,
}


def scale_name(weight: str) -> str:
    """The tensor that holds a quantised weight's scales."""
    return weight.removesuffix(".weight") + ".scale"


def are_scales(name: str) -> bool:
    """Whether a release tensor holds scales; see `scale_name`."""
    return name.endswith(".scale")


def are_ids(name: str) -> bool:
    """Whether a release tensor holds each token's expert ids."""
    return name.endswith(".tid2eid")


def release_names(leaf: str, cfg: ModelConfig) -> list[str] | list[list[str]] | str:
    """The release tensors that make up one leaf of the model.

    Args:
      leaf: a name from `params.leaves`, such as 'stacks.2.blocks.0.attention.q_a_RD'.
      cfg: the configuration.

    Returns:
      One name; one name per layer of the stack; or, for experts, one per layer and expert.
    """
    match leaf.split("."):
        case ["stacks", segment, *rest]:
            part = segments(cfg.layers)[int(segment)]
            position = int(rest[1])
            prefixes = [
                f"layers.{part.layer_index(position, repeat)}." for repeat in range(part.repeats)
            ]
            return _stacked(rest, prefixes, cfg)
        case ["mtp", index, "stack", *rest]:
            return _stacked(rest, [f"mtp.{index}."], cfg)
        case ["mtp", index, *rest]:
            return f"mtp.{index}.{MTP['.'.join(rest)]}"
    return TOP[leaf]


def _stacked(rest: list[str], prefixes: list[str], cfg: ModelConfig) -> list[str] | list[list[str]]:
    kind, _, *field = rest
    if kind == "blocks":
        return [prefix + BLOCK[".".join(field)] for prefix in prefixes]
    pattern = EXPERTS[".".join(field)]
    experts = range(cfg.n_routed_experts)
    return [[prefix + pattern.format(e=e) for e in experts] for prefix in prefixes]


def flatten(names: list[str] | list[list[str]] | str) -> Iterator[str]:
    """All names in the result of `release_names`, in the leaf's order."""
    if isinstance(names, str):
        yield names
        return
    for name in names:
        yield from flatten(name)


class Slot(NamedTuple):
    """Where a release tensor is held: leaf, index in the leaf's stack, and declaration."""

    leaf: str
    at: tuple[int, ...]
    spec: ParamSpec


def slots(cfg: ModelConfig) -> dict[str, Slot]:
    """The slot of every release tensor except scales and extras."""
    slot_of = {}
    for leaf, spec in params.leaves(Model(cfg)):
        names = flatten(release_names(leaf, cfg))
        for index, name in zip(np.ndindex(*spec.shape[: spec.stack_dims]), names, strict=True):
            slot_of[name] = Slot(leaf, index, spec)
    return slot_of


_MODULES = (
    (r"lm_head\.", "head."),
    (r"model\.embed_tokens\.", "embed."),
    (r"model\.norm\.", "norm."),
    (r"model\.hc_head\.hc_(\w+)", r"hc_head_\1"),
    (r"model\.layers\.", "layers."),
    (r"\.self_attn\.compressor\.indexer\.scorer\.", ".attn.indexer."),
    (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
    (r"\.self_attn\.compressor\.", ".attn.compressor."),
    (r"compressor\.kv_proj\.", "compressor.wkv."),
    (r"compressor\.gate_proj\.", "compressor.wgate."),
    (r"compressor\.position_bias$", "compressor.ape"),
    (r"compressor\.kv_norm\.", "compressor.norm."),
    (r"\.self_attn\.sinks$", ".attn.attn_sink"),
    (r"\.self_attn\.q_a_norm\.", ".attn.q_norm."),
    (r"\.self_attn\.kv_norm\.", ".attn.kv_norm."),
    (r"\.self_attn\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".attn.w\1."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.(\w+)$", r".hc_\1_\2"),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".ffn.gate.bias"),
    (r"\.mlp\.", ".ffn."),
    (r"(experts\.(?:\d+\.)?)gate_proj\.", r"\1w1."),
    (r"(experts\.(?:\d+\.)?)up_proj\.", r"\1w3."),
    (r"(experts\.(?:\d+\.)?)down_proj\.", r"\1w2."),
    (r"\.weight_scale_inv$", ".scale"),
)
# What transformers 5.23 saves: release names under `model.`, with these exceptions.
_SAVED = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.hc_head\.hc_(\w+)$", r"hc_head_\1"),
    (r"^model\.", ""),
    (r"\.attn\.norm\.weight$", ".attn.kv_norm.weight"),
    (r"\.weight_scale_inv$", ".scale"),
)
_FUSED = re.compile(r"^(layers\.\d+\.ffn\.experts\.)(gate_up_proj|down_proj)$")


def to_release(names: Collection[str]) -> Callable[[str], str]:
    """A translation of a checkpoint's names to release names; the names show the spelling.

    Fused experts keep their last part: `layers.0.ffn.experts.gate_up_proj` (see `of_fused`).
    """
    if any(".self_attn." in name for name in names):
        return lambda name: _rewrite(name, _MODULES)
    if any(name.startswith("model.") for name in names):
        return lambda name: _rewrite(name, _SAVED)
    return lambda name: name


def _rewrite(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def is_fused(name: str) -> bool:
    """Whether a tensor, under its name from `to_release`, holds the matrices of all experts."""
    return _FUSED.match(name) is not None


def of_fused(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, slice]]:
    """The release tensors inside fused experts: name, expert and rows; `w1` comes before `w3`."""
    fused = _FUSED.match(name)
    assert fused is not None
    matrices = ("w1", "w3") if fused[2] == "gate_up_proj" else ("w2",)
    height = shape[1] // len(matrices)
    for e in range(shape[0]):
        for i, matrix in enumerate(matrices):
            yield f"{fused[1]}{e}.{matrix}.weight", e, slice(i * height, (i + 1) * height)
