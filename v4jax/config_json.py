"""`ModelConfig` from and to `config.json`, in DeepSeek's spelling and in transformers'."""

import difflib
from collections.abc import Mapping
from typing import Any

from v4jax.config import DSpark, ExpertDtype, LayerKind, ModelConfig, Yarn

_SAME_NAME = (
    *("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups"),
    *("o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk"),
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "hc_mult"),
    *("routed_scaling_factor", "swiglu_limit", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps"),
    *("rope_theta", "compress_rope_theta", "max_position_embeddings"),
)
_FLOATS = frozenset(
    {"routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta"}
    | {"compress_rope_theta"}
)
# Keys with one value that the model defines; any other value is another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
}
# Read below, each by the function that knows what it means.
_READ = frozenset(
    {"num_hidden_layers", "compress_ratios", "layer_types", "compress_rates", "num_hash_layers"}
    | {"mlp_layer_types", "rope_scaling", "rope_parameters", "qk_rope_head_dim", "expert_dtype"}
    | {"partial_rotary_factor", "num_nextn_predict_layers", "n_mtp_layers", "quantization_config"}
    | {"dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id"}
    | {"dspark_target_layer_ids", "bos_token_id", "eos_token_id", "initializer_range"}
    | {"compress_rate_csa", "compress_rate_hca"}
)
# Known not to change a forward pass.
_IGNORED = frozenset(
    {"architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map"}
    | {"attention_dropout", "pad_token_id", "output_router_logits", "router_aux_loss_coef"}
    | {"router_jitter_noise", "_name_or_path", "output_hidden_states", "output_attentions"}
    | {"return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id"}
    | {"problem_type", "tokenizer_class", "task_specific_params", "_attn_implementation"}
    | {"_commit_hash", "ep_size", "pretraining_tp", "aux_loss_alpha", "seq_aux", "reap_pruning"}
    | {"source_revision", "experts_implementation", "name", "license"}
)
_LAYER_TYPES = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_FFN_TYPES = {"hash_moe": "hash", "moe": "routed"}
_CSA_RATIO, _HCA_RATIO = 4, 128


def from_json(raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Read a configuration in either spelling; facts told twice must agree.

    A ratio of 4 in `compress_ratios` means CSA (overlapping windows, indexer) and any other ratio
    above 0 means HCA, as in DeepSeek's runtime; with `layer_types` the type decides and
    `compress_rates` gives any ratio.

    Raises:
      ValueError: a key is missing, has a value that the model does not define, or is unknown.
    """
    raw = {key: value for key, value in raw.items() if value is not None}
    _refuse_other_models(raw, where)
    values: dict[str, Any] = {}
    for key in _SAME_NAME:
        value = _need(raw, key, where)
        _check_number(key, value, where)
        values[key] = float(value) if key in _FLOATS else value
    try:
        return ModelConfig(
            **values,
            qk_rope_head_dim=_rope_dim(raw, where),
            yarn=_yarn(raw, where),
            layers=_layers(raw, where),
            num_nextn_predict_layers=0 if "dspark_block_size" in raw else _mtp_layers(raw),
            dspark=_dspark(raw, where),
            quantized="quantization_config" in raw,
            expert_dtype=_expert_dtype(raw, where),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_eos(raw.get("eos_token_id", ())),
            initializer_range=float(raw.get("initializer_range", 0.02)),
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(message if where in message else f"{where}: {message}") from None


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """The configuration as a `config.json` that both DeepSeek's tools and transformers read.

    Layer lists are written as `compress_ratios` and `num_hash_layers` where those can say it, else
    in transformers' spelling.
    """
    out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"]}
    out |= {key: allowed[0] for key, allowed in _FIXED.items()}
    out |= {key: getattr(cfg, key) for key in _SAME_NAME}
    out |= {
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_nextn_predict_layers": 1 if cfg.dspark else cfg.num_nextn_predict_layers,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_ids[0]
        if len(cfg.eos_token_ids) == 1
        else list(cfg.eos_token_ids),
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
        out |= {
            "dspark_block_size": cfg.dspark.block_size,
            "dspark_markov_rank": cfg.dspark.markov_rank,
            "dspark_noise_token_id": cfg.dspark.noise_token_id,
            "dspark_target_layer_ids": list(cfg.dspark.target_layer_ids),
        }
    return out


def _refuse_other_models(raw: Mapping[str, Any], where: str) -> None:
    for key, allowed in _FIXED.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(
                f"{where}: {key} is {raw[key]!r}; DeepSeek-V4 defines {allowed[0]!r} only. "
                "Use a DeepSeek-V4 checkpoint."
            )
    known = {*_SAME_NAME, *_FIXED, *_READ, *_IGNORED}
    for key in raw.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "this model does not define it."
        raise ValueError(
            f"{where}: unknown key '{key}' ({raw[key]!r}) could change the mathematics; {hint} "
            "Remove it if it is a note."
        )


def _need(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in raw:
        raise ValueError(f"{where}: '{key}' is missing; every DeepSeek-V4 configuration has it.")
    return raw[key]


def _check_number(key: str, value: Any, where: str) -> None:
    kinds = (int, float) if key in _FLOATS else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{where}: {key} is {value!r}; expected a number.")


def _rope_dim(raw: Mapping[str, Any], where: str) -> int:
    head_dim = _need(raw, "head_dim", where)
    told = {}
    if "qk_rope_head_dim" in raw:
        told["qk_rope_head_dim"] = raw["qk_rope_head_dim"]
    if "partial_rotary_factor" in raw:
        told["partial_rotary_factor x head_dim"] = int(head_dim * raw["partial_rotary_factor"])
    for label, part in _nested_rope(raw).items():
        if "partial_rotary_factor" in part:
            told[f"rope_parameters.{label}"] = int(head_dim * part["partial_rotary_factor"])
    if not told:
        raise ValueError(f"{where}: neither qk_rope_head_dim nor partial_rotary_factor is given.")
    if len(set(told.values())) > 1:
        raise ValueError(f"{where}: the rotary size is told twice, differently: {told}.")
    return next(iter(told.values()))


def _nested_rope(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    rope = raw.get("rope_parameters") or {}
    return {label: rope[label] for label in ("main", "compress") if label in rope}


def _yarn(raw: Mapping[str, Any], where: str) -> Yarn | None:
    nested = _nested_rope(raw)
    for label, theta in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        told = nested.get(label, {}).get("rope_theta", raw[theta])
        if told != raw[theta]:
            raise ValueError(
                f"{where}: rope_parameters.{label} says theta {told}, {theta} {raw[theta]}."
            )
    main_type = nested.get("main", {}).get("rope_type", "default")
    if main_type != "default":
        raise ValueError(f"{where}: sliding layers use plain RoPE, not '{main_type}'.")
    scaling = nested.get("compress") or raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"{where}: RoPE scaling '{kind}'; DeepSeek-V4 defines 'yarn' only.")
    known = {"rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast"}
    known |= {"beta_slow", "rope_theta", "partial_rotary_factor", "attention_factor", "truncate"}
    if extra := sorted(scaling.keys() - known):
        raise ValueError(f"{where}: RoPE scaling has unknown keys {extra}; remove them.")
    if scaling.get("attention_factor", 1.0) != 1.0 or scaling.get("truncate", True) is not True:
        raise ValueError(
            f"{where}: DeepSeek-V4's YaRN has attention_factor 1 and truncated bounds."
        )
    return Yarn(
        factor=float(_need(scaling, "factor", where)),
        original_max_position_embeddings=_need(scaling, "original_max_position_embeddings", where),
        beta_fast=float(scaling.get("beta_fast", 32)),
        beta_slow=float(scaling.get("beta_slow", 1)),
    )


def _layers(raw: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    count = _need(raw, "num_hidden_layers", where)
    _check_number("num_hidden_layers", count, where)
    ffn = _ffn_kinds(raw, count, where)
    attention = _attention_kinds(raw, count, where)
    return tuple(LayerKind(kind, ratio, f) for (kind, ratio), f in zip(attention, ffn, strict=True))


def _ffn_kinds(raw: Mapping[str, Any], count: int, where: str) -> list[Any]:
    hashed = raw.get("num_hash_layers")
    by_number = None if hashed is None else ["hash"] * min(hashed, count)
    if by_number is not None:
        by_number += ["routed"] * (count - len(by_number))
    by_name = _named_kinds(raw, "mlp_layer_types", _FFN_TYPES, count, where)
    return _agree(by_number, by_name, "num_hash_layers", "mlp_layer_types", where)


def _attention_kinds(raw: Mapping[str, Any], count: int, where: str) -> list[Any]:
    by_number = None
    if "compress_ratios" in raw:
        ratios = raw["compress_ratios"]
        if not all(isinstance(r, int) and r >= 0 for r in ratios) or len(ratios) < count:
            raise ValueError(
                f"{where}: compress_ratios must hold {count} or more whole numbers, one a layer "
                f"(MTP layers last); it is {ratios}."
            )
        if any(ratios[count:]):
            raise ValueError(
                f"{where}: MTP layers are sliding; compress_ratios ends {ratios[count:]}."
            )
        kinds = {0: "sliding", _CSA_RATIO: "csa"}
        by_number = [(kinds.get(ratio, "hca"), ratio) for ratio in ratios[:count]]
    names = _named_kinds(raw, "layer_types", _LAYER_TYPES, count, where)
    by_name = None
    if names is not None:
        ratio = {"sliding": 0} | _compress_rates(raw, where)
        by_name = [(kind, ratio[kind]) for kind in names]
    return _agree(by_number, by_name, "compress_ratios", "layer_types", where)


def _compress_rates(raw: Mapping[str, Any], where: str) -> dict[str, int]:
    rates = {"csa": raw.get("compress_rate_csa", _CSA_RATIO), "hca": _HCA_RATIO}
    rates["hca"] = raw.get("compress_rate_hca", _HCA_RATIO)
    for name, rate in raw.get("compress_rates", {}).items():
        if name not in _LAYER_TYPES:
            raise ValueError(
                f"{where}: compress_rates names '{name}'; known: {list(_LAYER_TYPES)}."
            )
        rates[_LAYER_TYPES[name]] = rate
    return rates


def _named_kinds(
    raw: Mapping[str, Any], key: str, names: dict[str, str], count: int, where: str
) -> list[str] | None:
    if key not in raw:
        return None
    listed = raw[key]
    if bad := sorted({str(name) for name in listed} - names.keys()):
        raise ValueError(f"{where}: {key} has {bad}; known: {list(names)}.")
    if len(listed) != count:
        raise ValueError(f"{where}: {key} lists {len(listed)} layers, num_hidden_layers {count}.")
    return [names[name] for name in listed]


def _agree(
    first: list[Any] | None, second: list[Any] | None, first_key: str, second_key: str, where: str
) -> list[Any]:
    if first is None and second is None:
        raise ValueError(f"{where}: neither {first_key} nor {second_key} is given.")
    if first is not None and second is not None and first != second:
        raise ValueError(f"{where}: {first_key} and {second_key} disagree; remove one.")
    found = first if first is not None else second
    assert found is not None
    return found


def _mtp_layers(raw: Mapping[str, Any]) -> int:
    return raw.get("num_nextn_predict_layers", raw.get("n_mtp_layers", 0))


def _dspark(raw: Mapping[str, Any], where: str) -> DSpark | None:
    if "dspark_block_size" not in raw:
        return None
    return DSpark(
        block_size=raw["dspark_block_size"],
        markov_rank=_need(raw, "dspark_markov_rank", where),
        noise_token_id=_need(raw, "dspark_noise_token_id", where),
        target_layer_ids=tuple(_need(raw, "dspark_target_layer_ids", where)),
        stages=raw.get("n_mtp_layers", 3),
    )


def _expert_dtype(raw: Mapping[str, Any], where: str) -> ExpertDtype | None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    for key, value in expected.items():
        if quantization.get(key, value) != value:
            raise ValueError(
                f"{where}: quantization_config.{key} is {quantization[key]!r}, not {value!r}."
            )
    # The first release of April 2026 has FP4 experts and no key that says so.
    dtype = raw.get("expert_dtype", quantization.get("expert_dtype", "fp4"))
    if dtype not in ("fp4", "fp8"):
        raise ValueError(f"{where}: expert_dtype is {dtype!r}; known: 'fp4', 'fp8'.")
    return dtype


def _eos(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


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
                    f"config.json cannot tell two {kind} ratios with a CSA ratio not 4."
                )
        out["compress_rates"] = rates
    if ffn[:hashed] == ["hash"] * hashed:
        out["num_hash_layers"] = hashed
    else:
        names = {ours: theirs for theirs, ours in _FFN_TYPES.items()}
        out["mlp_layer_types"] = [names[kind] for kind in ffn]
    return out
