"""Adapters in the layout of Hugging Face's PEFT, with transformers' names of modules.

transformers holds the experts' gate and up as one parameter, and PEFT gives it one pair of factors:
ours for gate and up stand in it side by side, so its rank is twice ours.

Axis letters: L layers of a stack, E experts, r rank, N output channels, K input channels.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from v4jax import lora, params, unfinished
from v4jax.config import ModelConfig
from v4jax.lora import Adapter, Lora, Preset
from v4jax.model import Model
from v4jax.plan import segments
from v4jax.safetensors_file import (
    CheckpointError,
    TensorInfo,
    open_safetensors,
    parse_json,
    write_safetensors,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers."
_MODULES = {
    "attention.q_a_RD": "self_attn.q_a_proj",
    "attention.q_b_PR": "self_attn.q_b_proj",
    "attention.kv_KD": "self_attn.kv_proj",
    "attention.o_b_DQ": "self_attn.o_b_proj",
    "shared.gate_FD": "mlp.shared_experts.gate_proj",
    "shared.up_FD": "mlp.shared_experts.up_proj",
    "shared.down_DF": "mlp.shared_experts.down_proj",
}
_EXPERTS = "mlp.experts"
_GATE_UP, _DOWN = f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj"
# PEFT wraps a module once for each of its parameters: the first one is inside.
_WRAPPED = {_GATE_UP: f"{_EXPERTS}.base_layer", _DOWN: _EXPERTS}


class Pair(NamedTuple):
    """The factors of one module of one layer, float32: `a` [r, K] or [E, r, K], `b` alike."""

    a: np.ndarray
    b: np.ndarray


def export(
    directory: Path, cfg: ModelConfig, settings: Lora, adapter: Adapter, *, base: str = ""
) -> None:
    """Write an adapter for PEFT; the directory appears when it is complete.

    Args:
      directory: to be made.
      cfg: of the model.
      settings: what the adapter was made with.
      adapter: the factors.
      base: the model's name, for whoever loads the adapter.

    Raises:
      ValueError: the directory exists.
    """
    unfinished.refuse_existing(directory)
    tensors = dict(_tensors(cfg, settings, adapter))
    infos = {name: TensorInfo("F32", array.shape) for name, array in tensors.items()}
    with unfinished.begin(directory, "export-adapter", json.dumps(sorted(tensors))) as work:
        path = work.directory / TENSORS
        write_safetensors(path, infos, tensors.__getitem__, metadata={"format": "pt"})
        text = json.dumps(config(settings, base), indent=2)
        (work.directory / CONFIG).write_text(text + "\n", encoding="utf-8")
        work.finish()


def config(settings: Lora, base: str) -> dict[str, Any]:
    """What adapter_config.json says."""
    fields = {name.rsplit(".", 1)[-1] for name in lora.fields(settings.targets)}
    modules = [m for field, m in _MODULES.items() if field.rsplit(".", 1)[-1] in fields]
    experts = "gate_EFD" in fields
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    if experts:
        rank = settings.expert_rank or settings.rank
        ranks = {_GATE_UP: 2 * rank, _DOWN: rank}
        # PEFT divides by the rank, of which ours is a part.
        share = 2**0.5 if settings.rank_stabilized else 2
        alphas = {_GATE_UP: settings.alpha * share, _DOWN: settings.alpha}
        found |= {
            "target_parameters": [_GATE_UP, _DOWN],
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
    return found


def _layers(cfg: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Of each layer: its stack's and block's part of a leaf's name, its place, its number."""
    for number, part in enumerate(segments(cfg.layers)):
        for position in range(len(part.pattern)):
            for repeat in range(part.repeats):
                where = f"stacks.{number}.{{}}.{position}"
                yield where, repeat, part.layer_index(position, repeat)


def _tensors(
    cfg: ModelConfig, settings: Lora, adapter: Adapter
) -> Iterator[tuple[str, np.ndarray]]:
    for where, repeat, layer in _layers(cfg):
        for module, pair in _modules(where, repeat, adapter):
            name = f"{_PREFIX}{layer}.{_WRAPPED.get(module, module)}"
            a, b = pair
            if module in _WRAPPED:
                # [E, r, K] to [E * r, K], and [E, N, r] to [N, r * E].
                a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
            yield f"{name}.lora_A.weight", np.ascontiguousarray(a)
            yield f"{name}.lora_B.weight", np.ascontiguousarray(b)


def _modules(where: str, repeat: int, adapter: Adapter) -> Iterator[tuple[str, Pair]]:
    """The modules of one layer that the adapter changes."""

    def pair(leaf: str) -> Pair | None:
        factors = adapter.get(leaf)
        if factors is None:
            return None
        return Pair(*(np.asarray(factors[part][repeat], np.float32) for part in "ab"))

    for field, module in _MODULES.items():
        if (found := pair(f"{where.format('blocks')}.{field}")) is not None:
            yield module, found
    experts = where.format("experts")
    gate, up, down = (pair(f"{experts}.{f}") for f in ("gate_EFD", "up_EFD", "down_EDF"))
    if gate is not None and up is not None and down is not None:
        yield _GATE_UP, _side_by_side(gate, up)
        yield _DOWN, down


def _side_by_side(gate: Pair, up: Pair) -> Pair:
    """One pair for both matrices, one above the other: each has its own part of the rank."""
    nothing = np.zeros_like
    b = np.block([[gate.b, nothing(up.b)], [nothing(gate.b), up.b]])
    return Pair(np.concatenate([gate.a, up.a], axis=1), b)


def load(directory: Path, cfg: ModelConfig) -> tuple[Lora, Adapter]:
    """Read an adapter that PEFT or `export` wrote.

    Modules that it leaves as they are get factors of zeros. Where its modules differ in rank or
    scale, ranks are filled up with zeros and `b` takes the scales.

    Args:
      directory: of the adapter.
      cfg: of the model that it is for.

    Raises:
      CheckpointError: it is not an adapter, changes what ours cannot, or is not of this model.
    """
    pairs = _read(directory, cfg)
    settings = _settings(pairs)
    adapter: Adapter = {}
    for name, factors in lora.declare(cfg, settings).items():
        a, b = (np.zeros(factors[part].shape, np.float32) for part in "ab")
        for repeat in range(len(a)):
            if (name, repeat) in pairs:
                pair, scale = pairs[name, repeat]
                rank, share = pair.a.shape[-2], np.float32(scale / settings.scale_of(name))
                a[repeat, ..., :rank, :], b[repeat, ..., :rank] = pair.a, pair.b * share
        adapter[name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return settings, adapter


def _settings(pairs: _Pairs) -> Lora:
    """The least settings that hold all pairs."""
    ranks = {True: 0, False: 0}
    for (name, _), (pair, _) in pairs.items():
        expert = ".experts." in name
        ranks[expert] = max(ranks[expert], pair.a.shape[-2])
    targets: Preset = "all" if all(ranks.values()) else "experts" if ranks[True] else "attn"
    if targets == "attn" and any(".shared." in name for name, _ in pairs):
        targets = "attn+shared"
    rank = ranks[False] or ranks[True]
    expert_rank = ranks[True] if ranks[True] not in (0, rank) else None
    scales = {scale for _, scale in pairs.values()}
    # One alpha serves all where rank and scale are the same everywhere.
    alpha = rank * scales.pop() if len(scales) == 1 and expert_rank is None else float(rank)
    return Lora(targets=targets, rank=rank, alpha=alpha, expert_rank=expert_rank)


def _read(directory: Path, cfg: ModelConfig) -> _Pairs:
    """Each leaf's and layer's pair of factors, and what their product is multiplied by."""
    path = directory / CONFIG
    if not path.is_file() or not (directory / TENSORS).is_file():
        raise CheckpointError(f"{directory}: is not an adapter: expected {CONFIG} and {TENSORS}.")
    found = parse_json(path.read_bytes(), path)
    for name in ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication"):
        if found.get(name):
            raise CheckpointError(f"{path}: has {name}, which no adapter here can have.")
    if found.get("peft_type") != "LORA" or found.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: is not a LoRA adapter without biases.")
    leaves = {layer: (where, repeat) for where, repeat, layer in _layers(cfg)}
    with open_safetensors(directory / TENSORS) as file:
        tensors = {name: np.asarray(file.read(name), np.float32) for name in file.names}
    pairs: _Pairs = {}
    for name in sorted(n for n in tensors if n.endswith(".lora_A.weight")):
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(\d+)\.(.+)\.lora_A\.weight", name)
        module = _UNWRAPPED.get(match[2], match[2]) if match else ""
        if match is None or int(match[1]) not in leaves or module not in _KNOWN:
            raise CheckpointError(f"{directory / TENSORS}: '{name}' is no module of this model.")
        pair = Pair(tensors[name], tensors[name.replace("lora_A", "lora_B")])
        scale = _scale(found, module)
        where, repeat = leaves[int(match[1])]
        for leaf, part in _parts(module, pair, cfg):
            pairs[where.format(leaf.split(".")[0].replace("attention", "blocks")), repeat] = part, scale
    return pairs
