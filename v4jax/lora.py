"""Low-rank adapters: which weights they change, how they are made and attached.

Axis letters: r rank, N output channels, K input channels of a matrix; layers L and experts E first.
"""

import dataclasses
import math
import zlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul import LoraWeight
from v4jax import params
from v4jax.config import ModelConfig
from v4jax.layers import Dropped
from v4jax.model import Model
from v4jax.params import ParamSpec

Preset = Literal["attn", "attn+shared", "experts", "all"]
_ATTENTION = ("attention.q_a_RD", "attention.q_b_PR", "attention.kv_KD", "attention.o_b_DQ")
_SHARED = ("shared.gate_FD", "shared.up_FD", "shared.down_DF")
EXPERTS = ("gate_EFD", "up_EFD", "down_EDF")
# The fields that each set of targets stands for.
FIELDS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+shared": _ATTENTION + _SHARED,
    "experts": EXPERTS,
    "all": _ATTENTION + _SHARED + EXPERTS,
}

Adapter = dict[str, dict[str, Any]]  # of a weight's dotted name: its factors "a" and "b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter changes, and how much.

    Attributes:
      targets: 'attn' the projections around attention, 'attn+shared' the shared expert's too,
        'experts' those of each routed expert, 'all'. Compressors, indexers, routers and drafters
        are never among them.
      rank: of the update.
      alpha: the update is multiplied by alpha / rank.
      expert_rank: of a routed expert's update; None: `rank`.
      dropout: share of the input channels that an update does not see in training; must be 0 where
        experts are among the targets, since other libraries cannot load such an adapter.
      rank_stabilized: multiply by alpha / sqrt(rank) instead.
    """

    targets: Preset = "attn"
    rank: int = 16
    alpha: float = 32.0
    expert_rank: int | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.targets not in get_args(Preset):
            raise ValueError(f"targets is {self.targets!r}; it is one of {get_args(Preset)}.")
        for name in ("rank", "expert_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1.")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it is a finite number above 0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it is from 0 to below 1.")
        if self.dropout and has_experts(self):
            raise ValueError(f"dropout must be 0 with targets {self.targets!r}.")

    def rank_of(self, name: str) -> int:
        """The rank of a weight's update."""
        return self.expert_rank or self.rank if _is_expert(name) else self.rank

    def scale_of(self, name: str) -> float:
        """What a weight's update is multiplied by."""
        rank = self.rank_of(name)
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def has_experts(lora: Lora) -> bool:
    """Whether routed experts are among the targets."""
    return lora.targets in ("experts", "all")


def _is_expert(name: str) -> bool:
    return ".experts." in name


def targets(declared: Any, lora: Lora) -> dict[str, ParamSpec]:
    """The weights that get an update, by name."""
    fields = tuple(f".{field}" for field in FIELDS[lora.targets])
    return {
        name: spec
        for name, spec in params.leaves(declared)
        if name.endswith(fields) and not name.startswith("mtp.")
    }


def declare(cfg: ModelConfig, lora: Lora) -> dict[str, dict[str, ParamSpec]]:
    """The factors' declarations: shapes and axes, in float32; `b` begins at zero."""
    found = {}
    for name, spec in targets(Model(cfg), lora).items():
        *stack, n, k = spec.shape
        *axes, out, into = spec.axes
        rank = lora.rank_of(name)
        found[name] = {
            "a": ParamSpec((*stack, rank, k), (*axes, None, into), "f32", scale=k**-0.5),
            "b": ParamSpec((*stack, n, rank), (*axes, out, None), "f32", "constant", 0.0),
        }
    return found


def init(cfg: ModelConfig, lora: Lora, key: jax.Array) -> Adapter:
    """Factors in float32 that change nothing yet. Their values depend on key and names only."""

    def fill(name: str, spec: ParamSpec) -> Array:
        if spec.init == "constant":
            return jnp.zeros(spec.shape, jnp.float32)
        of_name = jax.random.fold_in(key, zlib.crc32(name.encode()))
        # As wide as torch's default for linear maps, so that rates found elsewhere serve.
        bound = spec.scale
        return jax.random.uniform(of_name, spec.shape, jnp.float32, -bound, bound)

    return {
        name: {part: fill(f"{name}.{part}", spec) for part, spec in factors.items()}
        for name, factors in declare(cfg, lora).items()
    }


def attach(
    model: Model, cfg: ModelConfig, lora: Lora, adapter: Adapter, key: jax.Array | None = None
) -> Model:
    """The model with its updates; it shares all arrays with what it is made of.

    Args:
      model: the base, its matrices arrays or quantised.
      cfg: its configuration.
      lora: what the adapter was made with.
      adapter: the factors.
      key: for dropout; None leaves everything in.

    Raises:
      ValueError: the adapter is not of this model and these settings.
    """
    declared = Model(cfg)
    expected = {
        name: {part: spec.shape for part, spec in factors.items()}
        for name, factors in declare(cfg, lora).items()
    }
    found = {
        name: {part: tuple(x.shape) for part, x in factors.items()}
        for name, factors in adapter.items()
    }
    if found != expected:
        wrong = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
        raise ValueError(
            f"The adapter does not fit the model and targets '{lora.targets}', rank {lora.rank}:"
            f" {len(wrong)} weights differ, the first is '{wrong[0]}'."
        )

    def updated(name: str, _: ParamSpec, weight: Any) -> Any:
        if name not in adapter:
            return weight
        a, b = (adapter[name][part] for part in "ab")
        if lora.dropout and key is not None:
            of_name = jax.random.fold_in(key, zlib.crc32(name.encode()))
            keys = jax.random.key_data(jax.random.split(of_name, a.shape[:-2]))
            a = Dropped(a, keys, lora.dropout)
        return LoraWeight(weight, a, b, lora.scale_of(name))

    return params.map_leaves(updated, declared, model)
