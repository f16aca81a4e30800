"""The range of each number in a configuration: one table for config.json and Python alike."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, NoReturn

_MAX_INTEGER = 2**31 - 1  # int32
_MAX_REAL, _MIN_REAL = 3.4028234663852886e38, 1.1754943508222875e-38  # normal float32
_MAX_COUNT = 10_000  # for things of which Python creates an object each


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; integers only if `whole`."""

    least: int | float
    most: int | float
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        least = "above 0" if self.least == _MIN_REAL else f"of {self.least:g} or more"
        most = "" if self.most in (_MAX_INTEGER, _MAX_REAL) else f", at most {self.most:g}"
        return f"{kind} {least}{most}"

    def __contains__(self, value: Any) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number: Any = value
        return bool(self.least <= number <= self.most)


def _whole(least: int, most: int = _MAX_INTEGER) -> Range:
    return Range(least, most, whole=True)


_SIZE, _COUNT = _whole(1), _whole(1, _MAX_COUNT)
_POSITIVE = Range(_MIN_REAL, _MAX_REAL)
_FRACTION = Range(_MIN_REAL, 1)
# Fields of `ModelConfig` and its parts, and keys that are read into them.
RANGES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "head_dim", "qk_rope_head_dim"), _SIZE),
    **dict.fromkeys(("q_lora_rank", "o_groups", "o_lora_rank", "sliding_window"), _SIZE),
    **dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "moe_intermediate_size"), _SIZE),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), _SIZE),
    **dict.fromkeys(("block_size", "markov_rank"), _SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_routed_experts", "num_experts_per_tok"), _COUNT),
    **dict.fromkeys(("hc_mult", "hc_sinkhorn_iters", "stages"), _COUNT),
    **dict.fromkeys(("num_nextn_predict_layers", "num_hash_layers"), _whole(0, _MAX_COUNT)),
    **dict.fromkeys(("ratio", "target_layer_ids", "noise_token_id"), _whole(0)),
    **dict.fromkeys(("routed_scaling_factor", "swiglu_limit"), _POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow"), _POSITIVE),
    **dict.fromkeys(("hc_eps", "rms_norm_eps", "partial_rotary_factor"), _FRACTION),
    **dict.fromkeys(("rope_theta", "compress_rope_theta", "factor"), Range(1, _MAX_REAL)),
    "initializer_range": Range(0, _MAX_REAL),
}


def check(field: str, value: Any, *, name: str = "") -> None:
    """Raise ValueError unless a field's value is in its range; the message uses `name` if given."""
    if value not in RANGES[field]:
        refuse(name or field, value, str(RANGES[field]))


def check_all(values: Mapping[str, Any]) -> None:
    """Check those values, numbers or tuples of numbers, whose fields are in the table."""
    for field in values.keys() & RANGES.keys():
        value = values[field]
        for item in value if isinstance(value, tuple) else (value,):
            check(field, item)


def check_token(name: str, value: Any, vocab_size: int) -> None:
    """Raise ValueError unless a value is a token id of the vocabulary."""
    if value not in _whole(0, vocab_size - 1):
        refuse(name, value, f"a token id, a whole number from 0 to {vocab_size - 1}")


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise a ValueError that says what a value must be."""
    raise ValueError(f"{name} is {value!r:.100}; it must be {expected}.")
