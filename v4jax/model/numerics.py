"""The two numerics that a checkpoint can be run in, by name."""

import dataclasses
from typing import Literal

Name = Literal["hf", "official"]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Where rounding happens. In float32, only `rounded_cache` changes results noticeably.

    Attributes:
      float32_islands: RoPE tables, router, compressor and hyper-connection weights stay float32;
        otherwise they are rounded to the model's dtype where transformers rounds them.
      rounded_cache: KV is rounded to FP8 (all but its rotary dims) and the indexer's queries and
        keys to FP4 after a Hadamard transform, as DeepSeek's runtime does.
      weight_first: an expert's routing weight multiplies its hidden activation, not its output.
    """

    float32_islands: bool
    rounded_cache: bool
    weight_first: bool


HF = Numerics(float32_islands=False, rounded_cache=False, weight_first=False)
OFFICIAL = Numerics(float32_islands=True, rounded_cache=True, weight_first=True)


def get(name: Name) -> Numerics:
    """`hf` matches transformers 5.23, `official` DeepSeek's own inference code.

    Raises:
      ValueError: the name is neither.
    """
    match name:
        case "hf":
            return HF
        case "official":
            return OFFICIAL
    raise ValueError(f"numerics is {name!r}; it must be 'hf' or 'official'.")
