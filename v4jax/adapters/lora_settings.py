"""Settings of low-rank adapters, and the weights that their targets select; imports no JAX."""

import dataclasses
import math

# A layer's linear modules: transformers' names to our fields. The grouped projection (`o_a_proj`)
# is missing: PEFT has no factors for it.
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
# transformers' parameters that stack the matrices of all experts.
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PARAMETERS = {GATE_UP: ("gate_EFD", "up_EFD"), DOWN: ("down_EDF",)}
EXPERTS = ("gate_EFD", "up_EFD", "down_EDF")
_ATTENTION = ("attention.q_a_RD", "attention.q_b_PR", "attention.kv_KD", "attention.o_b_DQ")
_SHARED = ("shared.gate_FD", "shared.up_FD", "shared.down_DF")
# Sets of targets by name.
PRESETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+shared": _ATTENTION + _SHARED,
    "experts": EXPERTS,
    "all": _ATTENTION + _SHARED + EXPERTS,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of a low-rank adapter.

    Attributes:
      targets: which matrices get an update. 'attn': attention's projections; 'attn+shared': the
        shared expert's too; 'experts': those of the routed experts; 'all': all of these. Or
        suffixes of module names, as in PEFT: 'kv_proj' matches attention's and every compressor's
        and indexer's. A list combines several. Routers and MTP blocks are never included.
      rank: rank of the update.
      alpha: the update is scaled by alpha / rank.
      expert_rank: rank of a routed expert's update; unset: `rank`.
      dropout: share of input channels dropped from an update in training; must be 0 if experts are
        among the targets, since other libraries cannot load such an adapter.
      rank_stabilized: scale by alpha / sqrt(rank) instead.
    """

    targets: tuple[str, ...] | str = "attn"
    rank: int = 16
    alpha: float = 32.0
    expert_rank: int | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            # A single form, so that equal settings compare equal: a name, or a tuple of several.
            several = tuple(self.targets)
            object.__setattr__(self, "targets", several[0] if len(several) == 1 else several)
        if not fields(self):
            raise ValueError("targets is empty; name at least one.")
        for name in ("rank", "expert_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"alpha is {self.alpha}; it must be a finite number other than 0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be from 0 to below 1.")
        if self.dropout and has_experts(self):
            raise ValueError(f"dropout must be 0 with targets {self.targets!r}.")

    def rank_of(self, name: str) -> int:
        """The rank of a weight's update."""
        return self.expert_rank or self.rank if _is_expert(name) else self.rank

    def scale_of(self, name: str) -> float:
        """The scale of a weight's update."""
        rank = self.rank_of(name)
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def has_experts(lora: Lora) -> bool:
    """Whether routed experts are among the targets."""
    return any(field in EXPERTS for field in fields(lora))


def _is_expert(name: str) -> bool:
    return ".experts." in name


def names(lora: Lora) -> tuple[str, ...]:
    """The targets as a tuple."""
    return (lora.targets,) if isinstance(lora.targets, str) else lora.targets


def fields(lora: Lora) -> tuple[str, ...]:
    """The fields of a layer that the targets select, in a fixed order.

    Raises:
      ValueError: a target is unknown.
    """
    chosen = {field for target in names(lora) for field in fields_of(target)}
    return tuple(field for field in (*MODULES.values(), *EXPERTS) if field in chosen)


def fields_of(target: str) -> tuple[str, ...]:
    """The fields that one target selects: a named set, else modules, else expert parameters.

    Raises:
      ValueError: the target is unknown.
    """
    if target in PRESETS:
        return PRESETS[target]
    matches = lambda name: f".{name}".endswith(f".{target}")
    if modules := tuple(field for name, field in MODULES.items() if matches(name)):
        return modules
    parameters = [fields for name, fields in PARAMETERS.items() if matches(name)]
    if not parameters:
        raise ValueError(
            f"targets has {target!r}; a target must be one of {', '.join(PRESETS)}, or a suffix of"
            f" one of these names: {', '.join((*MODULES, *PARAMETERS))}."
        )
    return sum(parameters, ())
