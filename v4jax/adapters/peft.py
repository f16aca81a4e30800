"""Adapters in the layout of Hugging Face's PEFT, with transformers' names of modules.

transformers holds the experts' gate and up as one parameter, and PEFT gives it one pair of factors:
ours for gate and up stand in it side by side, so its rank is twice ours. `peft_config.py` has what
their file of settings says.

Axis letters: L layers of a stack, E experts, r rank, N output channels, K input channels.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v4jax.adapters import lora, peft_config
from v4jax.adapters.lora import DOWN, GATE_UP, MODULES, PARAMETERS, Adapter, Lora
from v4jax.adapters.peft_config import Told
from v4jax.checkpoints import disk, hub, safetensors_directory, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import (
    SafetensorsFile,
    TensorInfo,
    open_safetensors,
    write_safetensors,
)
from v4jax.model import config_json, params
from v4jax.model.config import ModelConfig
from v4jax.model.segments import segments
from v4jax.model.transformer import Model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = "model."  # missing where PEFT wrapped transformers' model without its head
_NAME = re.compile(r"base_model\.model\.((?:model\.)?layers\.(\d+)\..+)\.(lora_[AB])\.weight")
_EXPERTS = "mlp.experts"  # the module that has `lora.PARAMETERS`
_FLOATS = ("F32", "BF16", "F16")
# What two models may differ in and share adapters all the same: formats, drafters, where texts end.
_APART = {
    *("num_nextn_predict_layers", "dspark", "quantized", "expert_dtype", "bos_token_id"),
    *("eos_token_ids", "initializer_range", "max_position_embeddings"),
}


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


class _Module(NamedTuple):
    """One layer's module or parameter, by transformers' name within the layer and in the model."""

    layer: int
    name: str
    key: str


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
    changed = peft_config.modules(settings)
    modules = [module for module in _present(cfg, _HEAD) if module.name in changed]
    names = {
        f"{_PREFIX}{place}.lora_{part}.weight": (module, part)
        for place, module in _places(modules).items()
        for part in "AB"
    }
    layers = _layers(cfg)

    def read(name: str) -> np.ndarray:
        module, part = names[name]
        pair = _pair(adapter, layers[module.layer], module.name)
        a, b = _flat(pair) if module.name in PARAMETERS else pair
        return np.ascontiguousarray(a if part == "A" else b)

    infos = {name: TensorInfo("F32", read(name).shape) for name in names}
    told = peft_config.make(settings, base, list(dict.fromkeys(module.name for module in modules)))
    with unfinished.begin(directory, "export-adapter", "") as work:
        write_safetensors(work.directory / TENSORS, infos, read, metadata={"format": "pt"})
        text = json.dumps(told, indent=2)
        (work.directory / CONFIG).write_text(text + "\n", encoding="utf-8")
        work.finish()


def _present(cfg: ModelConfig, head: str) -> list[_Module]:
    """All modules and parameters of the model that an adapter may change."""
    leaves = {name for name, _ in params.leaves(Model(cfg))}
    fields = MODULES | {name: parts[0] for name, parts in PARAMETERS.items()}
    return [
        _Module(number, name, f"{head}layers.{number}.{name}")
        for number, layer in _layers(cfg).items()
        for name, field in fields.items()
        if layer.leaf(field) in leaves
    ]


def _places(modules: Sequence[_Module]) -> dict[str, _Module]:
    """Where PEFT has the factors of these: around experts it nests one wrapper in the other."""
    keys = {module.key for module in modules}

    def place(module: _Module) -> str:
        if module.name not in PARAMETERS:
            return module.key
        layer = module.key.removesuffix(module.name)
        inside = module.name == GATE_UP and f"{layer}{DOWN}" in keys
        return f"{layer}{_EXPERTS}.base_layer" if inside else f"{layer}{_EXPERTS}"

    return {place(module): module for module in modules}


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
    settings, pairs = _read(directory, cfg)
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


def _settings(told: Told, modules: list[_Module], pairs: _Pairs) -> Lora:
    """The least settings that hold all pairs."""
    ranks = {True: 0, False: 0}
    for (name, _), (pair, _) in pairs.items():
        expert = ".experts." in name
        ranks[expert] = max(ranks[expert], pair.a.shape[-2])
    changed = {module.name for module in modules}
    names = tuple(name for name in (*MODULES, *PARAMETERS) if name in changed)
    alike = (name for name in lora.PRESETS if lora.fields(Lora(name)) == lora.fields(Lora(names)))
    rank = ranks[False] or told.rank
    return Lora(
        targets=next(alike, names),
        rank=rank,
        alpha=told.alpha,
        expert_rank=ranks[True] if ranks[True] not in (0, rank) else None,
        dropout=0.0 if ranks[True] else told.dropout,
        rank_stabilized=told.rank_stabilized,
    )


def _read(directory: Path, cfg: ModelConfig) -> tuple[Lora, _Pairs]:
    if not is_adapter(directory) or not (directory / TENSORS).is_file():
        raise CheckpointError(f"{directory}: is not an adapter: expected {CONFIG} and {TENSORS}.")
    where = directory / CONFIG
    told = peft_config.read(disk.read_json(where), where)
    _check_base(told.base, cfg, where)
    layers = _layers(cfg)
    pairs: _Pairs = {}
    with open_safetensors(directory / TENSORS) as file:
        modules = _modules(file, told, cfg)
        for module, (a, b) in modules.items():
            pair = Pair(_values(file, a), _values(file, b))
            _check_rank(module, pair, told, file, cfg)
            layer = layers[module.layer]
            for field, part in _parts(module.name, pair, cfg):
                pairs[layer.leaf(field), layer.repeat] = part, told.scale(module.key)
        _check(file.path, cfg, pairs)
    return _settings(told, list(modules), pairs), pairs


def _check_base(base: str, cfg: ModelConfig, where: Path) -> None:
    """Refuse an adapter whose base lies here and is another model than this one."""
    file = (hub.TINY if base == "tiny" else Path(base).expanduser()) / safetensors_directory.CONFIG
    if not base or not file.is_file():
        return
    other = config_json.from_json(disk.read_json(file), where=str(file))
    for name in (field.name for field in dataclasses.fields(cfg) if field.name not in _APART):
        if getattr(other, name) != getattr(cfg, name):
            raise CheckpointError(
                f"{where}: is of another model: the {name} of its base, {base}, is not that of "
                "this model."
            )


def _modules(file: SafetensorsFile, told: Told, cfg: ModelConfig) -> dict[_Module, tuple[str, str]]:
    """Of each module that is changed, the names of its factors: just those that are told of."""
    if not file.names:
        raise CheckpointError(f"{file.path}: holds no factors. The adapter is damaged.")
    head = _HEAD if any(name.startswith(_PREFIX + _HEAD) for name in file.names) else ""
    targets = [module for module in _present(cfg, head) if told.changes(module.key)]
    places = _places(targets)
    names: dict[_Module, dict[str, str]] = {}
    for name in file.names:
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in places:
            raise CheckpointError(f"{file.path}: {_strange(name, match, cfg)}")
        names.setdefault(places[match[1]], {})[match[3]] = name
    for parts in names.values():
        if len(parts) < 2:
            raise CheckpointError(
                f"{file.path}: has '{next(iter(parts.values()))}' without its other factor. The "
                "adapter is damaged."
            )
    missing = [module.key for module in targets if module not in names]
    missing += told.others([f"{head}layers.{number}" for number in _layers(cfg)], bool(head))
    if missing:
        raise CheckpointError(
            f"{file.path}: has no factors for '{missing[0]}', which is a target in {CONFIG}. The "
            "two files do not belong together, or are damaged."
        )
    return {module: (parts["lora_A"], parts["lora_B"]) for module, parts in names.items()}


def _strange(name: str, match: re.Match[str] | None, cfg: ModelConfig) -> str:
    """What is wrong with a name that belongs to no target."""
    known = (*MODULES, _EXPERTS, f"{_EXPERTS}.base_layer")
    if match is None or not match[1].endswith(known):
        return (
            f"changes '{name}', which adapters here leave as it is. Merge it with PEFT into the "
            "model instead."
        )
    if int(match[2]) >= len(cfg.layers):
        return f"is of another model: it has '{name}', and this model {len(cfg.layers)} layers."
    return (
        f"has factors for '{match[1]}', which is no target in {CONFIG}. The two files do not "
        "belong together."
    )


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


def _check_rank(
    module: _Module, pair: Pair, told: Told, file: SafetensorsFile, cfg: ModelConfig
) -> None:
    """Refuse factors that do not fit together, or not what is told of them."""
    (wide, _), (_, rank) = pair.a.shape, pair.b.shape
    experts = cfg.n_routed_experts if module.name in PARAMETERS else 1
    if wide != rank or not wide or wide % experts:
        raise CheckpointError(
            f"{file.path}: the factors of {module.name} have ranks {wide} and {rank}; they must be "
            f"alike and a multiple of the {experts} matrices of this model."
        )
    if (own := wide // experts) != (wanted := told.rank_of(module.key)):
        raise CheckpointError(
            f"{file.path}: the factors of '{module.key}' have rank {own}, and {CONFIG} says "
            f"{wanted}. The two files do not belong together."
        )


def _parts(module: str, pair: Pair, cfg: ModelConfig) -> Iterator[tuple[str, Pair]]:
    """The fields of our model that a module is, and their factors."""
    if module in MODULES:
        yield MODULES[module], pair
        return
    experts = cfg.n_routed_experts
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
    specs = dict(params.leaves(Model(cfg)))
    for (name, _), (pair, _) in pairs.items():
        wanted = specs[name].shape[-2:]
        found = (pair.b.shape[-2], pair.a.shape[-1])
        if found != wanted:
            raise CheckpointError(
                f"{path}: is of another model: it changes '{name}' by a matrix of {list(found)}; "
                f"here it is {list(wanted)}."
            )
