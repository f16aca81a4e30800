"""Adapters in the layout of Hugging Face's PEFT, with transformers' names of modules.

transformers holds the experts' gate and up as one parameter, and PEFT gives it one pair of factors:
ours for gate and up stand in it side by side, so its rank is twice ours. `peft_config.py` has what
their file of settings says.

Axis letters: L layers of a stack, E experts, r rank, N output channels, K input channels.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v4jax import checkpoint_files, lora, peft_config, unfinished
from v4jax.config import ModelConfig
from v4jax.lora import Adapter, Lora, Preset
from v4jax.peft_config import DOWN, EXPERTS, GATE_UP, MODULES
from v4jax.plan import segments
from v4jax.safetensors_file import (
    CheckpointError,
    SafetensorsFile,
    TensorInfo,
    open_safetensors,
    write_safetensors,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers."
# The second `model.` is missing where PEFT wrapped transformers' model without its head.
_NAME = re.compile(r"base_model\.model\.(?:model\.)?layers\.(\d+)\.(.+)\.(lora_[AB])\.weight")
_FLOATS = ("F32", "BF16", "F16")


class Pair(NamedTuple):
    """The factors of one module of one layer, float32: `a` [r, K] or [E, r, K], `b` alike."""

    a: np.ndarray
    b: np.ndarray


class _Layer(NamedTuple):
    """Where a layer lies: its parts of a leaf's name, and its place in the stack."""

    blocks: str
    experts: str
    repeat: int

    def leaf(self, field: str) -> str:
        return f"{self.experts if field in lora.EXPERTS else self.blocks}.{field}"


def _layers(cfg: ModelConfig) -> dict[int, _Layer]:
    found = {}
    for number, part in enumerate(segments(cfg.layers)):
        for position in range(len(part.pattern)):
            names = (f"stacks.{number}.{kind}.{position}" for kind in ("blocks", "experts"))
            blocks, experts = names
            for repeat in range(part.repeats):
                found[part.layer_index(position, repeat)] = _Layer(blocks, experts, repeat)
    return dict(sorted(found.items()))


def is_adapter(path: Path) -> bool:
    """Whether this is the directory of a PEFT adapter."""
    return (path / CONFIG).is_file()


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
      CheckpointError: the directory exists.
    """
    directory = directory.absolute()
    layers = _layers(cfg)
    names = {
        f"{_PREFIX}{number}.{wrapped}.lora_{part}.weight": (layer, module, part)
        for number, layer in layers.items()
        for module, wrapped in _wrapped(settings).items()
        for part in "AB"
    }

    def read(name: str) -> np.ndarray:
        layer, module, part = names[name]
        pair = _pair(adapter, layer, module)
        a, b = _flat(pair) if module.startswith(EXPERTS) else pair
        return np.ascontiguousarray(a if part == "A" else b)

    infos = {name: TensorInfo("F32", read(name).shape) for name in names}
    with unfinished.begin(directory, "export-adapter", "") as work:
        write_safetensors(work.directory / TENSORS, infos, read, metadata={"format": "pt"})
        text = json.dumps(peft_config.make(settings, base), indent=2)
        (work.directory / CONFIG).write_text(text + "\n", encoding="utf-8")
        work.finish()


def _wrapped(settings: Lora) -> dict[str, str]:
    """The modules that an adapter changes, and where PEFT has their factors."""
    modules = {module: module for module in peft_config.modules(settings)}
    # PEFT wraps a module once for each of its parameters: the first one is inside.
    inside = {GATE_UP: f"{EXPERTS}.base_layer", DOWN: EXPERTS}
    return modules | (inside if lora.has_experts(settings) else {})


def _pair(adapter: Adapter, layer: _Layer, module: str) -> Pair:
    def of(field: str) -> Pair:
        factors = adapter[layer.leaf(field)]
        return Pair(*(np.asarray(factors[part][layer.repeat], np.float32) for part in "ab"))

    if module == GATE_UP:
        return _side_by_side(of("gate_EFD"), of("up_EFD"))
    return of("down_EDF") if module == DOWN else of(MODULES[module])


def _side_by_side(gate: Pair, up: Pair) -> Pair:
    """One pair for both matrices, one above the other: each has its own part of the rank."""
    none = np.zeros_like(gate.b)
    return Pair(np.concatenate([gate.a, up.a], axis=1), np.block([[gate.b, none], [none, up.b]]))


def _flat(pair: Pair) -> Pair:
    """Of experts: [E, r, K] to [E * r, K], and [E, N, r] to [N, r * E]."""
    a, b = pair
    return Pair(a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1))


def load(directory: Path, cfg: ModelConfig) -> tuple[Lora, Adapter]:
    """Read an adapter that PEFT or `export` wrote.

    Modules that it leaves as they are get factors of zeros. Where its modules differ in rank or
    scale, ranks are filled up with zeros and `b` takes what the scale lacks.

    Args:
      directory: of the adapter.
      cfg: of the model that it is for.

    Returns:
      Settings, and factors as NumPy arrays in float32.

    Raises:
      CheckpointError: it is damaged, changes what adapters here cannot, or is of another model.
    """
    told, pairs = _read(directory, cfg)
    settings = _settings(told, pairs)
    adapter: Adapter = {}
    for name, factors in lora.declare(cfg, settings).items():
        a, b = (np.zeros(factors[part].shape, np.float32) for part in "ab")
        for repeat in range(len(a)):
            if (name, repeat) in pairs:
                pair, scale = pairs[name, repeat]
                rank, share = pair.a.shape[-2], np.float32(scale / settings.scale_of(name))
                a[repeat, ..., :rank, :], b[repeat, ..., :rank] = pair.a, pair.b * share
        adapter[name] = {"a": a, "b": b}
    return settings, adapter


# Of a leaf and its place in the stack: the pair, and what the pair's product is multiplied by.
_Pairs = dict[tuple[str, int], tuple[Pair, float]]


def _settings(told: peft_config.Told, pairs: _Pairs) -> Lora:
    """The least settings that hold all pairs."""
    ranks = {True: 0, False: 0}
    for (name, _), (pair, _) in pairs.items():
        expert = ".experts." in name
        ranks[expert] = max(ranks[expert], pair.a.shape[-2])
    shared = any(".shared." in name for name, _ in pairs)
    targets: Preset = "attn+shared" if shared else "attn"
    if ranks[True]:
        targets = "all" if ranks[False] else "experts"
    rank = ranks[False] or told.rank
    return Lora(
        targets=targets,
        rank=rank,
        alpha=told.alpha,
        expert_rank=ranks[True] if ranks[True] not in (0, rank) else None,
        dropout=0.0 if ranks[True] else told.dropout,
        rank_stabilized=told.rank_stabilized,
    )


def _read(directory: Path, cfg: ModelConfig) -> tuple[peft_config.Told, _Pairs]:
    if not is_adapter(directory) or not (directory / TENSORS).is_file():
        raise CheckpointError(f"{directory}: is not an adapter: expected {CONFIG} and {TENSORS}.")
    where = directory / CONFIG
    told = peft_config.read(checkpoint_files.read_json(where), where)
    layers = _layers(cfg)
    pairs: _Pairs = {}
    with open_safetensors(directory / TENSORS) as file:
        for (number, module), (a, b) in _modules(file, told, layers).items():
            for field, pair in _parts(module, Pair(_values(file, a), _values(file, b)), file, cfg):
                layer = layers[number]
                pairs[layer.leaf(field), layer.repeat] = pair, told.scale(number, module)
        _check(file.path, cfg, pairs)
    if not pairs:
        raise CheckpointError(f"{file.path}: holds no factors. The adapter is damaged.")
    return told, pairs


def _modules(
    file: SafetensorsFile, told: peft_config.Told, layers: dict[int, _Layer]
) -> dict[tuple[int, str], tuple[str, str]]:
    """Of each layer and module that is changed, the names of its factors."""
    names: dict[tuple[int, str], dict[str, str]] = {}
    for name in file.names:
        match = _NAME.fullmatch(name)
        number, inside = (int(match[1]), match[2]) if match else (-1, "")
        module = told.wrapped(number).get(inside, inside)
        known = module in MODULES or module in (GATE_UP, DOWN)
        if match is None or not known:
            raise CheckpointError(
                f"{file.path}: changes '{name}', which adapters here leave as it is. Merge it with "
                "PEFT into the model instead."
            )
        if number not in layers:
            raise CheckpointError(
                f"{file.path}: is of another model: it has '{name}', and this model "
                f"{len(layers)} layers."
            )
        names.setdefault((number, module), {})[match[3]] = name
    for parts in names.values():
        if len(parts) < 2:
            raise CheckpointError(
                f"{file.path}: has '{next(iter(parts.values()))}' without its other factor. The "
                "adapter is damaged."
            )
    return {key: (parts["lora_A"], parts["lora_B"]) for key, parts in names.items()}


def _values(file: SafetensorsFile, name: str) -> np.ndarray:
    info = file.info(name)
    if info.dtype not in _FLOATS or len(info.shape) != 2:
        raise CheckpointError(
            f"{file.path}: '{name}' is {info.dtype} {list(info.shape)}; a factor is a matrix in "
            f"one of {', '.join(_FLOATS)}."
        )
    values = file.read(name).astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{file.path}: '{name}' has values that are no finite numbers. The adapter is damaged."
        )
    return values


def _parts(
    module: str, pair: Pair, file: SafetensorsFile, cfg: ModelConfig
) -> Iterator[tuple[str, Pair]]:
    """The fields of our model that a module is, and their factors."""
    (wide, _), (_, rank) = pair.a.shape, pair.b.shape
    experts = cfg.n_routed_experts if module in (GATE_UP, DOWN) else 1
    if wide != rank or not wide or wide % experts:
        raise CheckpointError(
            f"{file.path}: the factors of {module} have ranks {wide} and {rank}; they must be "
            f"alike and a multiple of the {experts} matrices of this model."
        )
    if module in MODULES:
        yield MODULES[module], pair
        return
    a = pair.a.reshape(experts, -1, pair.a.shape[-1])
    b = pair.b.reshape(len(pair.b), -1, experts).transpose(2, 0, 1)
    if module == DOWN:
        yield "down_EDF", Pair(a, b)
        return
    gate, up = np.split(b, 2, axis=1) if len(pair.b) % 2 == 0 else (b, b)
    half = a.shape[1] // 2
    if a.shape[1] % 2 == 0 and not gate[..., half:].any() and not up[..., :half].any():
        yield "gate_EFD", Pair(a[:, :half], gate[..., :half])
        yield "up_EFD", Pair(a[:, half:], up[..., half:])
        return
    yield "gate_EFD", Pair(a, gate)
    yield "up_EFD", Pair(a, up)


def _check(path: Path, cfg: ModelConfig, pairs: _Pairs) -> None:
    """Refuse factors whose channels are not those of the model's matrices."""
    declared = lora.declare(cfg, Lora("all", rank=1))
    for (name, _), (pair, _) in pairs.items():
        specs = declared[name]
        wanted = (specs["b"].shape[-2], specs["a"].shape[-1])
        found = (pair.b.shape[-2], pair.a.shape[-1])
        if found != wanted:
            raise CheckpointError(
                f"{path}: is of another model: it changes '{name}' by a matrix of {list(found)}; "
                f"here it is {list(wanted)}."
            )
