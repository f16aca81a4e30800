"""The known keys of config.json, and how each is treated.

A key that no table names is rejected, as it could change the mathematics. Ignored are keys that
transformers, Unsloth and DeepSeek write for bookkeeping, generation settings, training losses and
how a program computes the same numbers, and keys that start with `_` or `unsloth_`.
"""

from typing import Any

# Fields of `ModelConfig` with the same name.
SAME_NAME = (
    *("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups"),
    *("o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk"),
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "hc_mult"),
    *("routed_scaling_factor", "swiglu_limit", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps"),
    *("rope_theta", "compress_rope_theta", "max_position_embeddings"),
)
FLOATS = frozenset(
    {"routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta"}
    | {"compress_rope_theta"}
)
# transformers' aliases: if both are given, they must agree.
ALIASES = {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"}
# The values that the model defines; others mean another model. The first is written.
FIXED: dict[str, tuple[Any, ...]] = {
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
# The same, but never written.
FIXED_IF_GIVEN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_dropout", "router_jitter_noise"), (0.0, 0)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False,)),
    "pruned_heads": ({}, []),
}
# Keys that config_json reads one by one, by their JSON type.
LISTS = frozenset({"compress_ratios", "layer_types", "mlp_layer_types", "dspark_target_layer_ids"})
OBJECTS = frozenset({"compress_rates", "rope_scaling", "rope_parameters", "quantization_config"})
OTHERS = frozenset(
    {"num_hidden_layers", "num_hash_layers", "qk_rope_head_dim", "expert_dtype"}
    | {"partial_rotary_factor", "num_nextn_predict_layers", "n_mtp_layers", "initializer_range"}
    | {"dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id", "bos_token_id"}
    | {"eos_token_id", "compress_rate_csa", "compress_rate_hca"}
)
_BOOKKEEPING = frozenset(
    {"architectures", "torch_dtype", "dtype", "transformers_version", "auto_map", "name", "license"}
    | {"tokenizer_class", "processor_class", "name_or_path", "finetuning_task", "problem_type"}
    | {"task_specific_params", "id2label", "label2id", "num_labels", "source_revision"}
    | {"reap_pruning", "trust_remote_code", "model_name", "base_model_name_or_path"}
    | {"adapters", "peft_type", "language", "tags", "library_name", "sep_token_id", "prefix"}
    | {"cls_token_id", "mask_token_id", "unk_token_id", "pad_token_id"}
)
_COMPUTING = frozenset(
    {"use_cache", "use_bfloat16", "torchscript", "chunk_size_feed_forward", "pretraining_tp"}
    | {"ep_size", "tp_size", "attn_implementation", "experts_implementation", "return_dict"}
    | {"output_hidden_states", "output_attentions", "output_router_logits", "is_decoder"}
    | {"gradient_checkpointing", "use_reentrant", "use_kernels", "tf_legacy_loss"}
)
_LOSSES = frozenset({"router_aux_loss_coef", "aux_loss_alpha", "seq_aux"})
_GENERATION = frozenset(
    {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time"}
    | {"stop_strings", "do_sample", "num_beams", "use_mtp", "cache_implementation", "cache_config"}
    | {"max_cache_len", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"}
    | {"epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty"}
    | {"length_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits"}
    | {"forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"}
    | {"exponential_decay_length_penalty", "begin_suppress_tokens", "sequence_bias"}
    | {"token_healing", "guidance_scale", "watermarking_config", "num_return_sequences"}
    | {"output_scores", "output_logits", "return_dict_in_generate", "decoder_start_token_id"}
    | {"encoder_no_repeat_ngram_size", "is_assistant", "num_assistant_tokens"}
    | {"num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit"}
    | {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind"}
    | {"target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config"}
    | {"disable_compile", "continuous_batching_config", "low_memory", "penalty_alpha"}
    | {"dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids"}
    | {"prefill_chunk_size", "generation_config"}
)
_IGNORED = _BOOKKEEPING | _COMPUTING | _LOSSES | _GENERATION
_NOTES = ("_", "unsloth_")
KNOWN = frozenset(
    {*SAME_NAME, *ALIASES, *FIXED, *FIXED_IF_GIVEN} | LISTS | OBJECTS | OTHERS | _IGNORED
)

# Keys of quantization_config: values that the model defines, and keys that may be present.
QUANTIZATION_FIXED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([128, 128],),
}
QUANTIZATION_KNOWN = frozenset(
    {*QUANTIZATION_FIXED, "expert_dtype", "scale_fmt", "modules_to_not_convert", "dequantize"}
    | {"modules_to_convert", "ignored_layers"}
)
ROPE_KNOWN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
YARN_KNOWN = ROPE_KNOWN | {"factor", "original_max_position_embeddings", "beta_fast"}
YARN_KNOWN |= {"beta_slow", "attention_factor", "truncate"}


def is_unknown(key: str) -> bool:
    """Whether a key is unknown, and so could change the mathematics."""
    return key not in KNOWN and not key.startswith(_NOTES)
