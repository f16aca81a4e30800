"""Adapters in the layout of Hugging Face's PEFT, with transformers' module names.

transformers stores the experts' gate and up matrices as one parameter, for which PEFT has one pair
of factors: it holds our pairs for gate and up side by side, so its rank is twice ours.
`peft_config.py` handles the configuration file.

Axis letters: L layers of a stack, E experts, r rank, N output channels, K input channels.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from v4jax.adapters import lora, lora_settings, peft_config
from v4jax.adapters.lora import Adapter
from v4jax.adapters.lora_settings import DOWN, GATE_UP, MODULES, PARAMETERS, Lora
from v4jax.adapters.peft_config import AdapterConfig
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
_HEAD = "model."  # absent if PEFT wrapped transformers' model without its head
_NAME = re.compile(r"base_model\.model\.((?:model\.)?layers\.(\d+)\..+)\.(lora_[AB])\.weight")
_EXPERTS = "mlp.experts"  # the module with `lora_settings.PARAMETERS`
_FLOATS = ("F32", "BF16", "F16")
# Models that differ only in these may share adapters: formats, drafters, tokens that end a text.
_MAY_DIFFER = {
    *("num_nextn_predict_layers", "dspark", "quantized", "expert_dtype", "bos_token_id"),
    *("eos_token_ids", "initializer_range", "max_position_embeddings"),
}


class Pair(NamedTuple):
    """One layer's factors of a module, float32: `a` [r, K] and `b` [N, r]; experts: E first."""

    a: np.ndarray
    b: np.ndarray


class _Layer(NamedTuple):
    """Location of a layer: prefixes of its leaves' names, and its index in the stack."""

    blocks: str
    experts: str
    repeat: int

    def leaf(self, field: str) -> str:
        return f"{self.experts if field in lora_settings.EXPERTS else self.blocks}.{field}"


class _Module(NamedTuple):
    """One layer's module or parameter: transformers' name in the layer, and `key`, in the model."""

    layer: int
    name: str
    key: str


def _layers(cfg: ModelConfig) -> dict[int, _Layer]:
    layers = {}
    for number, part in enumerate(segments(cfg.layers)):
        for position in range(len(part.pattern)):
            names = (f"stacks.{number}.{kind}.{position}" for kind in ("blocks", "experts"))
            blocks, experts = names
            for repeat in range(part.repeats):
                layers[part.layer_index(position, repeat)] = _Layer(blocks, experts, repeat)
    return dict(sorted(layers.items()))


def is_adapter(path: Path) -> bool:
    """Whether this is the directory of a PEFT adapter."""
    return (path / CONFIG).is_file()


def export(
    directory: Path, cfg: ModelConfig, settings: Lora, adapter: Adapter, *, base: str = ""
) -> None:
    """Write an adapter for PEFT; the directory appears once it is complete.

    Args:
      directory: directory to create.
      cfg: the model's configuration.
      settings: the adapter's settings.
      adapter: the factors.
      base: the base model's name, for those who load the adapter.

    Raises:
      CheckpointError: the directory exists.
    """
    directory = directory.absolute()
    targets = peft_config.modules(settings)
    modules = [module for module in _candidates(cfg, _HEAD) if module.name in targets]
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
    names_in_order = list(dict.fromkeys(module.name for module in modules))
    config = peft_config.make(settings, base, names_in_order)
    with unfinished.begin(directory, "export-adapter", "") as work:
        write_safetensors(work.directory / TENSORS, infos, read, metadata={"format": "pt"})
        disk.write_json(work.directory / CONFIG, config, indent=2)
        work.finish()


def _candidates(cfg: ModelConfig, head: str) -> list[_Module]:
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
    """The modules by the names under which PEFT stores their factors.

    PEFT wraps the two expert parameters in nested wrappers.
    """
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
    """One pair for both matrices, stacked along N: each uses its own half of the rank."""
    zeros = np.zeros_like(gate.b)
    return Pair(np.concatenate([gate.a, up.a], axis=1), np.block([[gate.b, zeros], [zeros, up.b]]))


def _flat(pair: Pair) -> Pair:
    """The experts' factors as matrices: [E, r, K] to [E * r, K], and [E, N, r] to [N, r * E]."""
    a, b = pair
    return Pair(a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1))


def load(directory: Path, cfg: ModelConfig) -> tuple[Lora, Adapter]:
    """Read an adapter written by PEFT or `export`.

    Modules that the adapter does not change get zero factors. If its modules differ in rank or
    scale, ranks are padded with zeros and the difference in scale is multiplied into `b`.

    Args:
      directory: the adapter's directory.
      cfg: configuration of the model.

    Returns:
      The settings, and the factors as NumPy arrays in float32.

    Raises:
      CheckpointError: the adapter is damaged, unsupported, or for another model.
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


# By a leaf's name and an index in its stack: the pair, and the scale of its product.
_Pairs = dict[tuple[str, int], tuple[Pair, float]]


def _settings(config: AdapterConfig, modules: list[_Module], pairs: _Pairs) -> Lora:
    """The smallest settings that hold all pairs."""
    ranks = {True: 0, False: 0}
    for (name, _), (pair, _) in pairs.items():
        expert = ".experts." in name
        ranks[expert] = max(ranks[expert], pair.a.shape[-2])
    changed = {module.name for module in modules}
    names = tuple(name for name in (*MODULES, *PARAMETERS) if name in changed)
    fields = lora_settings.fields(Lora(names))
    presets = (x for x in lora_settings.PRESETS if lora_settings.fields(Lora(x)) == fields)
    rank = ranks[False] or config.rank
    return Lora(
        targets=next(presets, names),
        rank=rank,
        alpha=config.alpha,
        expert_rank=ranks[True] if ranks[True] not in (0, rank) else None,
        dropout=0.0 if ranks[True] else config.dropout,
        rank_stabilized=config.rank_stabilized,
    )


def _read(directory: Path, cfg: ModelConfig) -> tuple[Lora, _Pairs]:
    if not is_adapter(directory) or not (directory / TENSORS).is_file():
        raise CheckpointError(f"{directory}: is not an adapter: expected {CONFIG} and {TENSORS}.")
    where = directory / CONFIG
    config = peft_config.read(disk.read_json(where), where)
    _check_base(config.base, cfg, where)
    layers = _layers(cfg)
    pairs: _Pairs = {}
    with open_safetensors(directory / TENSORS) as file:
        modules = _modules(file, config, cfg)
        for module, (a, b) in modules.items():
            pair = Pair(_values(file, a), _values(file, b))
            _check_rank(module, pair, config, file, cfg)
            layer = layers[module.layer]
            for field, part in _parts(module.name, pair, cfg):
                pairs[layer.leaf(field), layer.repeat] = part, config.scale(module.key)
        _check_shapes(file.path, cfg, pairs)
    return _settings(config, list(modules), pairs), pairs


def _check_base(base: str, cfg: ModelConfig, where: Path) -> None:
    """Reject an adapter whose base is on this machine and differs from this model."""
    file = (hub.TINY if base == "tiny" else Path(base).expanduser()) / safetensors_directory.CONFIG
    if not base or not file.is_file():
        return
    other = config_json.from_json(disk.read_json(file), where=str(file))
    for name in (field.name for field in dataclasses.fields(cfg) if field.name not in _MAY_DIFFER):
        if getattr(other, name) != getattr(cfg, name):
            raise CheckpointError(
                f"{where}: is for another model: the {name} of its base, {base}, is not that of "
                "this model."
            )


def _modules(
    file: SafetensorsFile, config: AdapterConfig, cfg: ModelConfig
) -> dict[_Module, tuple[str, str]]:
    """The names of each changed module's factors; they must be exactly those of the targets."""
    if not file.names:
        raise CheckpointError(f"{file.path}: has no factors. The adapter is damaged.")
    head = _HEAD if any(name.startswith(_PREFIX + _HEAD) for name in file.names) else ""
    targets = [module for module in _candidates(cfg, head) if config.changes(module.key)]
    places = _places(targets)
    names: dict[_Module, dict[str, str]] = {}
    for name in file.names:
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in places:
            raise CheckpointError(f"{file.path}: {_unexpected(name, match, cfg)}")
        names.setdefault(places[match[1]], {})[match[3]] = name
    for parts in names.values():
        if len(parts) < 2:
            raise CheckpointError(
                f"{file.path}: has '{next(iter(parts.values()))}' without its other factor. The "
                "adapter is damaged."
            )
    missing = [module.key for module in targets if module not in names]
    missing += config.unsupported([f"{head}layers.{n}" for n in _layers(cfg)], bool(head))
    if missing:
        raise CheckpointError(
            f"{file.path}: has no factors for '{missing[0]}', which is a target in {CONFIG}. The "
            "two files do not belong together, or are damaged."
        )
    return {module: (parts["lora_A"], parts["lora_B"]) for module, parts in names.items()}


def _unexpected(name: str, match: re.Match[str] | None, cfg: ModelConfig) -> str:
    """What is wrong with a tensor that belongs to no target."""
    supported = (*MODULES, _EXPERTS, f"{_EXPERTS}.base_layer")
    if match is None or not match[1].endswith(supported):
        return (
            f"has '{name}', which adapters here cannot change. Merge the adapter into the model "
            "with PEFT instead."
        )
    if int(match[2]) >= len(cfg.layers):
        return f"is for another model: it has '{name}', this model {len(cfg.layers)} layers."
    return (
        f"has factors for '{match[1]}', which is not a target in {CONFIG}. The two files do not "
        "belong together."
    )


def _values(file: SafetensorsFile, name: str) -> np.ndarray:
    info = file.info(name)
    if info.dtype not in _FLOATS or len(info.shape) != 2:
        raise CheckpointError(
            f"{file.path}: '{name}' is {info.dtype} {list(info.shape)}; a factor must be a matrix "
            f"of {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}."
        )
    values = file.read(name).astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{file.path}: '{name}' has values that are not finite. The adapter is damaged."
        )
    return values


def _check_rank(
    module: _Module, pair: Pair, config: AdapterConfig, file: SafetensorsFile, cfg: ModelConfig
) -> None:
    """Reject factors that match neither each other nor the configuration."""
    (rank_a, _), (_, rank_b) = pair.a.shape, pair.b.shape
    experts = cfg.n_routed_experts if module.name in PARAMETERS else 1
    if rank_a != rank_b or not rank_a or rank_a % experts:
        raise CheckpointError(
            f"{file.path}: the factors of {module.name} have ranks {rank_a} and {rank_b}; they "
            f"must be equal and a multiple of the {experts} matrices of this model."
        )
    if (rank := rank_a // experts) != (expected := config.rank_of(module.key)):
        raise CheckpointError(
            f"{file.path}: the factors of '{module.key}' have rank {rank}, but {CONFIG} says "
            f"{expected}. The two files do not belong together."
        )


def _parts(module: str, pair: Pair, cfg: ModelConfig) -> Iterator[tuple[str, Pair]]:
    """The fields of our model that make up a module, and their factors."""
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


def _check_shapes(path: PurePath, cfg: ModelConfig, pairs: _Pairs) -> None:
    """Reject factors whose channels differ from those of the model's matrices."""
    specs = dict(params.leaves(Model(cfg)))
    for (name, _), (pair, _) in pairs.items():
        expected = specs[name].shape[-2:]
        shape = (pair.b.shape[-2], pair.a.shape[-1])
        if shape != expected:
            raise CheckpointError(
                f"{path}: is for another model: its update of '{name}' has shape {list(shape)}, "
                f"the weight {list(expected)}."
            )
