"""PEFT's adapter_config.json: written, and read as far as it is supported here.

Settings that change what an adapter adds to the model are honoured or rejected by name. Those about
training, the initial factors and the libraries that wrote the file are ignored. Unknown settings
are rejected unless their value is false, empty or null.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from v4jax.adapters import lora_settings
from v4jax.adapters.lora_settings import DOWN, GATE_UP, MODULES, PARAMETERS, Lora
from v4jax.checkpoints.disk import CheckpointError

# Linear layers of transformers' model that PEFT can target and adapters here cannot.
_OTHERS = ("self_attn.o_a_proj",)
_OTHERS_OF_MODEL = ("lm_head", "model.embed_tokens")
_HONOURED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "base_model_name_or_path", "auto_mapping", "init_lora_weights"),
    "lora_dropout",
}
_IGNORED = {
    # The file's purpose and origin.
    *("task_type", "inference_mode", "revision", "peft_version", "transformers_version"),
    *("unsloth_version", "unsloth_fixed", "_name_or_path", "torch_dtype", "dtype"),
    # The initial factors, and how they were trained.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("runtime_config", "ensure_weight_tying"),
    # Details of features that are rejected when enabled.
    *("megatron_core", "qalora_group_size"),
}
# Other initialisations take the factors out of the base, which changes the base.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def make(settings: Lora, base: str, modules: list[str]) -> dict[str, Any]:
    """PEFT's configuration of an adapter of ours that changes these modules and parameters."""
    config: dict[str, Any] = {
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
        "target_modules": [name for name in modules if name in MODULES],
    }
    if parameters := [name for name in modules if name in PARAMETERS]:
        rank = settings.expert_rank or settings.rank
        # PEFT divides by the full rank, of which gate and up use one half each.
        share = math.sqrt(2) if settings.rank_stabilized else 2
        ranks, alphas = {GATE_UP: 2, DOWN: 1}, {GATE_UP: share, DOWN: 1}
        config["target_parameters"] = parameters
        config["rank_pattern"] = {name: ranks[name] * rank for name in parameters}
        config["alpha_pattern"] = {name: alphas[name] * settings.alpha for name in parameters}
    return config


class AdapterConfig(NamedTuple):
    """A parsed configuration.

    Attributes:
      rank, alpha, dropout, rank_stabilized: as in `Lora`.
      ranks, alphas: ranks and alphas of modules whose names match a pattern.
      modules: modules to change, by name suffixes or by one regular expression.
      excluded: modules not to change, in the same form.
      layers: layers whose modules are changed; None: all.
      stacks: names that may precede a layer's number; empty: any.
      parameters: expert parameters to change, by name suffixes.
      base: path or Hub id of the base model.
    """

    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    modules: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    stacks: tuple[str, ...]
    parameters: tuple[str, ...]
    base: str

    def rank_of(self, key: str) -> int:
        """The rank of a module's factors; `key` is its name in transformers' model."""
        return _matched(self.ranks, key, self.rank)

    def scale(self, key: str) -> float:
        """The scale of the product of a module's factors."""
        rank, alpha = self.rank_of(key), _matched(self.alphas, key, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def changes(self, key: str) -> bool:
        """Whether PEFT would change a module or a parameter."""
        if key.endswith(tuple(f".{name}" for name in PARAMETERS)):
            return _named(self.parameters, key)
        if _named(self.excluded, key) or not _named(self.modules, key):
            return False
        return self.layers is None or key in self.modules or _layer(key, self.stacks) in self.layers

    def unsupported(self, layers: list[str], head: bool) -> list[str]:
        """Targets that adapters here cannot change; `head`: the base is the model with its head."""
        keys = [f"{layer}.{module}" for layer in layers for module in _OTHERS]
        keys += _OTHERS_OF_MODEL if head else ("embed_tokens",)
        return [key for key in keys if self.changes(key)]


def _named(names: str | tuple[str, ...], key: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(f".{key}".endswith(f".{name}") for name in names)


def _layer(key: str, stacks: tuple[str, ...]) -> int | None:
    patterns = [rf"(?:^|.*?\.){stack}" for stack in stacks] or [r".*?\.[^.]*"]
    matches = (re.match(rf"{pattern}\.(\d+)\.", key) for pattern in patterns)
    return next((int(match[1]) for match in matches if match), None)


def _matched(patterns: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, as in PEFT."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(key):
            return value
    return default


@functools.lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def read(raw: dict[str, Any], where: Path) -> AdapterConfig:
    """Parse a configuration.

    Raises:
      CheckpointError: it is not a LoRA adapter's, is damaged, or uses an unsupported feature.
    """
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {raw.get('peft_type')!r:.50}; it must be 'LORA'."
        )
    if unsupported := _unsupported(raw):
        raise CheckpointError(
            f"{where}: has {' and '.join(unsupported)}, which adapters here do not support. Merge "
            "the adapter into the model with PEFT instead."
        )
    _check_class(raw.get("auto_mapping"), where)
    try:
        return _parse(raw)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{where}: is damaged ({error!r:.100}).") from error


def _unsupported(raw: dict[str, Any]) -> list[str]:
    """The settings with an effect that adapters here do not support."""
    names = [name for name, value in raw.items() if value and name not in _HONOURED | _IGNORED]
    if raw.get("bias", "none") != "none":
        names.append("bias")
    if raw.get("init_lora_weights", True) not in _INITIALISATIONS:
        names.append(f"init_lora_weights {raw['init_lora_weights']!r:.50}")
    return names


def _check_class(mapping: Any, where: Path) -> None:
    """Reject an adapter whose base model has another class."""
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(name, str) and name.endswith("ForCausalLM") and "DeepseekV4" not in name:
        raise CheckpointError(f"{where}: is for another model: its base is a {name:.50}.")


def _parse(raw: dict[str, Any]) -> AdapterConfig:
    layers = raw.get("layers_to_transform")
    config = AdapterConfig(
        rank=_rank(raw["r"]),
        alpha=_alpha(raw["lora_alpha"]),
        dropout=_number("lora_dropout", raw.get("lora_dropout") or 0.0),
        rank_stabilized=raw.get("use_rslora") or False,
        ranks={name: _rank(rank) for name, rank in (raw.get("rank_pattern") or {}).items()},
        alphas={name: _alpha(alpha) for name, alpha in (raw.get("alpha_pattern") or {}).items()},
        modules=_strings(raw, "target_modules", expression=True),
        excluded=_strings(raw, "exclude_modules", expression=True) or (),
        # PEFT treats an empty list as unset.
        layers=None if layers in (None, []) else tuple(_integers(layers)),
        stacks=tuple(_listed(_strings(raw, "layers_pattern", expression=True))),
        parameters=tuple(_strings(raw, "target_parameters")),
        base=raw.get("base_model_name_or_path") or "",
    )
    if not config.modules and not config.parameters:
        raise ValueError("no target_modules and no target_parameters")
    if isinstance(config.modules, str) and config.layers is not None:
        raise ValueError("layers_to_transform with a regular expression in target_modules")
    if not isinstance(config.rank_stabilized, bool):
        raise ValueError(f"use_rslora {config.rank_stabilized!r}")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"lora_dropout {config.dropout!r}")
    if not isinstance(config.base, str):
        raise ValueError(f"base_model_name_or_path {config.base!r}")
    for pattern in (*config.ranks, *config.alphas, *_expressions(config)):
        _compiled(pattern)
    return config


def _expressions(config: AdapterConfig) -> list[str]:
    """The regular expressions among the names."""
    single = [names for names in (config.modules, config.excluded) if isinstance(names, str)]
    return [*single, *config.stacks]


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"rank {value!r}")
    return value


def _alpha(value: Any) -> float:
    alpha = _number("alpha", value)
    if not math.isfinite(alpha) or not alpha:
        raise ValueError(f"alpha {value!r}")
    return alpha


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} {value!r}")
    return float(value)


def _strings(raw: dict[str, Any], name: str, *, expression: bool = False) -> Any:
    """A list of names as a tuple; with `expression`, or a regular expression."""
    value = raw.get(name) or []
    if expression and isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError(f"{name} {value!r}")
    return tuple(value)


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in values):
        raise ValueError(f"layers_to_transform {value!r}")
    return values


def modules(settings: Lora) -> list[str]:
    """The modules and parameters that an adapter changes."""
    fields = lora_settings.fields(settings)
    names = [name for name, field in MODULES.items() if field in fields]
    return names + [name for name, parts in PARAMETERS.items() if parts[0] in fields]
