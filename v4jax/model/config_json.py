"""`ModelConfig` from and to `config.json`, in DeepSeek's or transformers' spelling."""

import difflib
from collections.abc import Mapping
from typing import Any

from v4jax.model import config_keys as keys
from v4jax.model import config_ranges
from v4jax.model.config import DSpark, ExpertDtype, LayerKind, ModelConfig, Yarn

_LAYER_TYPES = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_FFN_TYPES = {"hash_moe": "hash", "moe": "routed"}
_CSA_RATIO, _HCA_RATIO = 4, 128
_DSPARK = ("block_size", "markov_rank", "noise_token_id", "target_layer_ids")


def from_json(raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Read a configuration in either spelling; whatever is given twice must agree.

    In `compress_ratios`, 0 means sliding, 4 CSA (overlapping windows, indexer) and any other ratio
    HCA, as in DeepSeek's runtime. With `layer_types`, each kind has its ratio in `compress_rates`,
    by default 4 for CSA and 128 for HCA.

    Raises:
      ValueError: a key is missing, has a value that the model does not define, or is unknown.
    """
    raw = _without_nulls(raw)
    try:
        _refuse_other_models(raw)
        return ModelConfig(
            **_same_names(raw),
            qk_rope_head_dim=_rope_dim(raw),
            yarn=_yarn(raw),
            layers=_layers(raw),
            num_nextn_predict_layers=_mtp_layers(raw),
            dspark=_dspark(raw),
            quantized="quantization_config" in raw,
            expert_dtype=_expert_dtype(raw),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=end_tokens(raw.get("eos_token_id", []), raw["vocab_size"]),
            initializer_range=_number(raw, "initializer_range", 0.02),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """The configuration as a `config.json` in DeepSeek's spelling, which transformers reads too.

    Layers that `compress_ratios` or `num_hash_layers` cannot express are written in transformers'
    spelling. Raises ValueError for compression ratios that neither spelling can express.
    """
    out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"]}
    eos = list(cfg.eos_token_ids)
    out |= {key: allowed[0] for key, allowed in keys.FIXED.items()}
    out |= {key: getattr(cfg, key) for key in keys.SAME_NAME}
    out |= {
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_nextn_predict_layers": 1 if cfg.dspark else cfg.num_nextn_predict_layers,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "initializer_range": cfg.initializer_range,
        "torch_dtype": "bfloat16",
    }
    out |= _layers_json(cfg)
    if cfg.yarn:
        out["rope_scaling"] = {"type": "yarn"} | vars(cfg.yarn)
    if cfg.quantized:
        out["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    if cfg.expert_dtype:
        out["expert_dtype"] = cfg.expert_dtype
    if cfg.dspark:
        out |= {f"dspark_{field}": getattr(cfg.dspark, field) for field in _DSPARK}
        out["dspark_target_layer_ids"] = list(cfg.dspark.target_layer_ids)
    return out


def end_tokens(value: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokens of an `eos_token_id`, one or a list; raises ValueError for anything else."""
    listed = value if isinstance(value, list) else [value]
    for token in listed:
        config_ranges.check_token("eos_token_id", token, vocab_size)
    return tuple(listed)


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    for key, allowed in (keys.FIXED | keys.FIXED_IF_GIVEN).items():
        if key in raw:
            _check_fixed(key, raw[key], allowed)
    for key, kind in (*((k, list | tuple) for k in keys.LISTS), *((k, dict) for k in keys.OBJECTS)):
        if key in raw and not isinstance(raw[key], kind):
            config_ranges.refuse(key, raw[key], "an object" if kind is dict else "a list")
    for key in filter(keys.is_unknown, raw):
        near = difflib.get_close_matches(key, keys.KNOWN, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "this model does not define it."
        raise ValueError(
            f"unknown key '{key}' ({raw[key]!r:.100}) could change the mathematics; "
            f"{hint} Remove it, or prefix it with '_', if it is only a note."
        )
    for alias, key in keys.ALIASES.items():
        if alias in raw and raw[alias] != _need(raw, key):
            raise ValueError(f"{alias} is {raw[alias]!r} and {key} {raw[key]!r}; remove {alias}.")


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth: null is the same as no key."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}


def _check_fixed(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # Types too: JSON's true equals 1 in Python.
    if not any(type(value) is type(item) and value == item for item in allowed):
        raise ValueError(
            f"{key} is {value!r:.100}; DeepSeek-V4 defines {allowed[0]!r} only. "
            "Use a DeepSeek-V4 checkpoint."
        )


def _refuse_unknown(part: Mapping[str, Any], known: frozenset[str], name: str) -> None:
    unknown = [key for key in part if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(f"{name} has unknown keys {sorted(unknown)}; remove them.")


def _same_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in keys.SAME_NAME:
        config_ranges.check(key, _need(raw, key))
        values[key] = float(raw[key]) if key in keys.FLOATS else raw[key]
    return values


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise ValueError(f"'{key}' is missing; this configuration needs it.")
    return raw[key]


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    config_ranges.check(key, raw.get(key, default))
    return float(raw.get(key, default))


def _rope_dim(raw: Mapping[str, Any]) -> int:
    sizes = {}
    if "qk_rope_head_dim" in raw:
        config_ranges.check("qk_rope_head_dim", raw["qk_rope_head_dim"])
        sizes["qk_rope_head_dim"] = raw["qk_rope_head_dim"]
    parts = {f"rope_parameters.{label}": part for label, part in _nested_rope(raw).items()}
    for label, part in {"config.json": raw, **parts}.items():
        if "partial_rotary_factor" in part:
            factor = _number(part, "partial_rotary_factor", 1.0)
            sizes[f"{label}: partial_rotary_factor x head_dim"] = int(raw["head_dim"] * factor)
    if not sizes:
        raise ValueError("neither qk_rope_head_dim nor partial_rotary_factor is given.")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"different values of the rotary size are given: {sizes}.")
    return next(iter(sizes.values()))


def _nested_rope(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The nested parts of `rope_parameters`: "main" for sliding layers, "compress" for others."""
    rope = raw.get("rope_parameters") or {}
    parts = {label: rope[label] for label in ("main", "compress") if label in rope}
    for label, part in parts.items():
        if not isinstance(part, dict):
            config_ranges.refuse(f"rope_parameters.{label}", part, "an object")
    if parts:
        _refuse_unknown(rope, frozenset({"main", "compress"}), "rope_parameters")
    return parts


def _yarn(raw: Mapping[str, Any]) -> Yarn | None:
    nested = _nested_rope(raw)
    for label, theta in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        value = nested.get(label, {}).get("rope_theta", raw[theta])
        if value != raw[theta]:
            raise ValueError(
                f"rope_parameters.{label}.rope_theta is {value}, but {theta} is "
                f"{raw[theta]}; remove one."
            )
    if "main" in nested:
        main_type = _rope_type(nested["main"])
        if main_type != "default":
            raise ValueError(f"sliding layers use plain RoPE, not '{main_type}'.")
        _refuse_unknown(nested["main"], keys.ROPE_KNOWN, "rope_parameters.main")
    flat = {} if nested else raw.get("rope_parameters") or {}
    parts = [part for part in (nested.get("compress"), raw.get("rope_scaling"), flat) if part]
    scalings = [_scaling(part) for part in parts]
    if any(scaling != scalings[0] for scaling in scalings):
        raise ValueError("RoPE scaling is given twice, differently; remove one.")
    return scalings[0] if scalings else None


def _rope_type(part: Mapping[str, Any]) -> Any:
    kinds = [part[key] for key in ("rope_type", "type") if key in part] or ["default"]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"RoPE has rope_type {kinds[0]!r} but type {kinds[1]!r}; remove one.")
    return kinds[0]


def _scaling(part: Mapping[str, Any]) -> Yarn | None:
    """The scaling in `rope_scaling` or in a part of `rope_parameters`."""
    kind = _rope_type(part)
    if kind not in ("default", "yarn"):
        raise ValueError(f"RoPE scaling '{kind}'; DeepSeek-V4 defines 'yarn' only.")
    known = keys.YARN_KNOWN if kind == "yarn" else keys.ROPE_KNOWN
    _refuse_unknown(part, known, f"RoPE scaling '{kind}'")
    if kind == "default":
        return None
    if part.get("attention_factor", 1.0) != 1.0 or part.get("truncate", True) is not True:
        raise ValueError("DeepSeek-V4's YaRN needs attention_factor 1 and truncate true.")
    _need(part, "factor")
    return Yarn(
        factor=_number(part, "factor", 1.0),
        original_max_position_embeddings=_need(part, "original_max_position_embeddings"),
        beta_fast=_number(part, "beta_fast", 32.0),
        beta_slow=_number(part, "beta_slow", 1.0),
    )


def _layers(raw: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    count = _need(raw, "num_hidden_layers")
    config_ranges.check("num_hidden_layers", count)
    ffn = _ffn_kinds(raw, count)
    attention = _attention_kinds(raw, count)
    return tuple(LayerKind(kind, ratio, f) for (kind, ratio), f in zip(attention, ffn, strict=True))


def _ffn_kinds(raw: Mapping[str, Any], count: int) -> list[Any]:
    by_number = None
    if "num_hash_layers" in raw:
        config_ranges.check("num_hash_layers", raw["num_hash_layers"])
        hashed = min(raw["num_hash_layers"], count)
        by_number = ["hash"] * hashed + ["routed"] * (count - hashed)
    by_name = _named_kinds(raw, "mlp_layer_types", _FFN_TYPES, count)
    return _agree(by_number, by_name, "num_hash_layers", "mlp_layer_types")


def _attention_kinds(raw: Mapping[str, Any], count: int) -> list[Any]:
    rates, by_number = _compress_rates(raw), None
    if "compress_ratios" in raw:
        ratios = raw["compress_ratios"]
        for ratio in ratios:
            config_ranges.check("ratio", ratio, name="A number in compress_ratios")
        if len(ratios) < count:
            raise ValueError(
                f"compress_ratios has {len(ratios)} numbers, but num_hidden_layers is "
                f"{count}; it must have one per layer."
            )
        if any(ratios[count:]):
            raise ValueError(
                f"compress_ratios has {ratios[count:]} after its {count} layers; the rest "
                "must be 0, as MTP layers are sliding."
            )
        kind_of = {0: "sliding", _CSA_RATIO: "csa"}
        by_number = [(kind_of.get(ratio, "hca"), ratio) for ratio in ratios[:count]]
        if wrong := {(k, ratio) for k, ratio in by_number if ratio != rates.get(k, ratio)}:
            raise ValueError(
                f"compress_ratios has {sorted(wrong)}, but the compression rates given "
                f"are {rates}; remove one."
            )
    names = _named_kinds(raw, "layer_types", _LAYER_TYPES, count)
    by_name = None
    if names is not None:
        ratio_of = {"sliding": 0, "csa": _CSA_RATIO, "hca": _HCA_RATIO} | rates
        by_name = [(kind, ratio_of[kind]) for kind in names]
    return _agree(by_number, by_name, "compress_ratios", "layer_types")


def _compress_rates(raw: Mapping[str, Any]) -> dict[str, int]:
    """The compression ratios that are given per kind of attention."""
    given = {"csa": raw.get("compress_rate_csa"), "hca": raw.get("compress_rate_hca")}
    for name, rate in raw.get("compress_rates", {}).items():
        if name not in _LAYER_TYPES:
            raise ValueError(f"compress_rates names '{name}'; known: {list(_LAYER_TYPES)}.")
        given[_LAYER_TYPES[name]] = rate
    rates = {kind: rate for kind, rate in given.items() if rate is not None}
    for kind, rate in rates.items():
        config_ranges.check("ratio", rate, name=f"The compression rate of '{kind}'")
    return rates


def _named_kinds(
    raw: Mapping[str, Any], key: str, names: dict[str, str], count: int
) -> list[str] | None:
    if key not in raw:
        return None
    listed = raw[key]
    if bad := sorted({str(name) for name in listed} - names.keys()):
        raise ValueError(f"{key} has {bad}; known: {list(names)}.")
    if len(listed) != count:
        raise ValueError(f"{key} has {len(listed)} entries, but num_hidden_layers is {count}.")
    return [names[name] for name in listed]


def _agree(
    first: list[Any] | None, second: list[Any] | None, first_key: str, second_key: str
) -> list[Any]:
    if first is None and second is None:
        raise ValueError(f"neither {first_key} nor {second_key} is given.")
    if first is not None and second is not None and first != second:
        raise ValueError(f"{first_key} and {second_key} disagree; remove one.")
    kinds = first if first is not None else second
    assert kinds is not None
    return kinds


def _mtp_layers(raw: Mapping[str, Any]) -> int:
    layers = raw.get("num_nextn_predict_layers", raw.get("n_mtp_layers", 0))
    config_ranges.check("num_nextn_predict_layers", layers)
    return 0 if "dspark_block_size" in raw else layers


def _dspark(raw: Mapping[str, Any]) -> DSpark | None:
    if "dspark_block_size" not in raw:
        return None
    numbers = {field: _need(raw, f"dspark_{field}") for field in _DSPARK}
    numbers["target_layer_ids"] = tuple(numbers["target_layer_ids"])
    numbers["stages"] = raw.get("n_mtp_layers", 3)
    return DSpark(**numbers)


def _expert_dtype(raw: Mapping[str, Any]) -> ExpertDtype | None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    for key, allowed in keys.QUANTIZATION_FIXED.items():
        if quantization.get(key) is not None:
            _check_fixed(f"quantization_config.{key}", quantization[key], allowed)
    _refuse_unknown(quantization, keys.QUANTIZATION_KNOWN, "quantization_config")
    # The first release of April 2026 has FP4 experts but no key for it.
    dtype = raw.get("expert_dtype", quantization.get("expert_dtype", "fp4"))
    if dtype not in ("fp4", "fp8"):
        raise ValueError(f"expert_dtype is {dtype!r}; known: 'fp4', 'fp8'.")
    return dtype


def _layers_json(cfg: ModelConfig) -> dict[str, Any]:
    attention = [(layer.attention, layer.ratio) for layer in cfg.layers]
    ffn = [layer.ffn for layer in cfg.layers]
    hashed = ffn.count("hash")
    plain = all((kind == "csa") == (ratio == _CSA_RATIO) for kind, ratio in attention)
    out: dict[str, Any] = {}
    if plain:
        tail = [0] * (cfg.dspark.stages if cfg.dspark else cfg.num_nextn_predict_layers)
        out["compress_ratios"] = [ratio for _, ratio in attention] + tail
    else:
        names = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
        out["layer_types"] = [names[kind] for kind, _ in attention]
        rates: dict[str, int] = {}
        for kind, ratio in attention:
            if ratio and rates.setdefault(names[kind], ratio) != ratio:
                raise ValueError(
                    f"config.json cannot express {kind} ratios {rates[names[kind]]} and {ratio}: a "
                    "kind must have one ratio, unless exactly the csa layers have ratio 4."
                )
        out["compress_rates"] = rates
    if ffn[:hashed] == ["hash"] * hashed:
        out["num_hash_layers"] = hashed
    else:
        names = {ours: theirs for theirs, ours in _FFN_TYPES.items()}
        out["mlp_layer_types"] = [names[kind] for kind in ffn]
    return out
