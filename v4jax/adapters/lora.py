"""Low-rank adapters: which weights they change, how they are made and attached.

Axis letters: r rank, N output channels, K input channels of a matrix; layers L and experts E first.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul import LoraWeight
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.layers import Dropped
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model

# The linear modules of a layer by transformers' names, and our fields. Its grouped projection
# (`o_a_proj`) is not among them: PEFT has no factors for it.
_INDEXER = "self_attn.compressor.indexer"
MODULES = {
    "self_attn.q_a_proj": "attention.q_a_RD",
    "self_attn.q_b_proj": "attention.q_b_PR",
    "self_attn.kv_proj": "attention.kv_KD",
    "self_attn.o_b_proj": "attention.o_b_DQ",
    "self_attn.compressor.kv_proj": "attention.compressor.kv_CD",
    "self_attn.compressor.gate_proj": "attention.compressor.gate_CD",
    f"{_INDEXER}.kv_proj": "attention.indexer.compressor.kv_CD",
    f"{_INDEXER}.gate_proj": "attention.indexer.compressor.gate_CD",
    f"{_INDEXER}.q_b_proj": "attention.indexer.q_b_PR",
    f"{_INDEXER}.scorer.weights_proj": "attention.indexer.weights_ID",
    "mlp.shared_experts.gate_proj": "shared.gate_FD",
    "mlp.shared_experts.up_proj": "shared.up_FD",
    "mlp.shared_experts.down_proj": "shared.down_DF",
}
# Parameters of a module there, each of them all experts' matrices.
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PARAMETERS = {GATE_UP: ("gate_EFD", "up_EFD"), DOWN: ("down_EDF",)}
EXPERTS = ("gate_EFD", "up_EFD", "down_EDF")
_ATTENTION = ("attention.q_a_RD", "attention.q_b_PR", "attention.kv_KD", "attention.o_b_DQ")
_SHARED = ("shared.gate_FD", "shared.up_FD", "shared.down_DF")
# The fields that each set of targets stands for.
PRESETS: dict[str, tuple[str, ...]] = {
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
        'experts' those of each routed expert, 'all' of these; or ends of modules' names, as in
        PEFT: 'kv_proj' is attention's, and every compressor's and indexer's too. Several are a
        tuple. Routers, drafters and MTP blocks are never among them.
      rank: of the update.
      alpha: the update is multiplied by alpha / rank.
      expert_rank: of a routed expert's update; None: `rank`.
      dropout: share of the input channels that an update does not see in training; must be 0 where
        experts are among the targets, since other libraries cannot load such an adapter.
      rank_stabilized: multiply by alpha / sqrt(rank) instead.
    """

    targets: tuple[str, ...] | str = "attn"
    rank: int = 16
    alpha: float = 32.0
    expert_rank: int | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            # One form only, so that equal settings are equal: a name, or a tuple of several.
            names = tuple(self.targets)
            object.__setattr__(self, "targets", names[0] if len(names) == 1 else names)
        if not fields(self):
            raise ValueError("targets is empty; name what is to be trained.")
        for name in ("rank", "expert_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1.")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"alpha is {self.alpha}; it is a finite number other than 0.")
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
    return any(field in EXPERTS for field in fields(lora))


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _names(lora: Lora) -> tuple[str, ...]:
    return (lora.targets,) if isinstance(lora.targets, str) else lora.targets


def fields(lora: Lora) -> tuple[str, ...]:
    """The fields of a layer that the targets stand for, in a fixed order.

    Raises:
      ValueError: a target is none.
    """
    chosen = {field for target in _names(lora) for field in _fields(target)}
    return tuple(field for field in (*MODULES.values(), *EXPERTS) if field in chosen)


def _fields(target: str) -> tuple[str, ...]:
    """What one target stands for: a set, else modules, else parameters of experts."""
    if target in PRESETS:
        return PRESETS[target]
    named = lambda name: f".{name}".endswith(f".{target}")
    if modules := tuple(field for name, field in MODULES.items() if named(name)):
        return modules
    parameters = [fields for name, fields in PARAMETERS.items() if named(name)]
    if not parameters:
        raise ValueError(
            f"targets has {target!r}; it is one of {', '.join(PRESETS)}, or the end of one of these"
            f" names: {', '.join((*MODULES, *PARAMETERS))}."
        )
    return sum(parameters, ())


def targets(declared: Any, lora: Lora) -> dict[str, ParamSpec]:
    """The weights that get an update, by name.

    Raises:
      ValueError: the model has none of a target.
    """
    leaves = [(name, spec) for name, spec in params.leaves(declared) if not name.startswith("mtp.")]
    for target in _names(lora):
        ends = tuple(f".{field}" for field in _fields(target))
        if not any(name.endswith(ends) for name, _ in leaves):
            raise ValueError(f"targets has {target!r}, which no layer of this model has.")
    ends = tuple(f".{field}" for field in fields(lora))
    return {name: spec for name, spec in leaves if name.endswith(ends)}


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
            f"The adapter does not fit the model and targets {lora.targets!r}, rank {lora.rank}:"
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
