"""adapter_config.json: what PEFT's file of settings says, and what of it we can do."""

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from v4jax import lora
from v4jax.lora import Lora
from v4jax.safetensors_file import CheckpointError

# transformers' names within a layer, and our fields.
MODULES = {
    "self_attn.q_a_proj": "attention.q_a_RD",
    "self_attn.q_b_proj": "attention.q_b_PR",
    "self_attn.kv_proj": "attention.kv_KD",
    "self_attn.o_b_proj": "attention.o_b_DQ",
    "mlp.shared_experts.gate_proj": "shared.gate_FD",
    "mlp.shared_experts.up_proj": "shared.up_FD",
    "mlp.shared_experts.down_proj": "shared.down_DF",
}
EXPERTS = "mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
# Settings with which an adapter is not just a sum of two factors' product and the matrix.
_REFUSED = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "kasa_config"),
    *("monteclora_config", "use_bdlora", "arrow_config"),
)
# Others begin with factors taken out of the base, which is then another one.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def modules(settings: Lora) -> list[str]:
    """The modules that an adapter changes, without the experts."""
    fields = lora.FIELDS[settings.targets]
    return [module for module, field in MODULES.items() if field in fields]


def make(settings: Lora, base: str) -> dict[str, Any]:
    """What PEFT is told of an adapter of ours."""
    found: dict[str, Any] = {
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
        "target_modules": modules(settings),
    }
    if lora.has_experts(settings):
        rank = settings.expert_rank or settings.rank
        # PEFT divides by the rank, of which gate's and up's is a half each.
        share = math.sqrt(2) if settings.rank_stabilized else 2
        found["target_parameters"] = [GATE_UP, DOWN]
        found["rank_pattern"] = {GATE_UP: 2 * rank, DOWN: rank}
        found["alpha_pattern"] = {GATE_UP: settings.alpha * share, DOWN: settings.alpha}
    return found


class Told(NamedTuple):
    """What a configuration says.

    Attributes:
      rank, alpha, dropout, rank_stabilized: as in `Lora`.
      ranks, alphas: patterns of modules and their own ranks and alphas.
      parameters: the experts' parameters that are changed, by the ends of their names.
    """

    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    ranks: dict[str, Any]
    alphas: dict[str, Any]
    parameters: tuple[str, ...]

    def scale(self, layer: int, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        name = f"model.layers.{layer}.{module}"
        rank, alpha = _matched(self.ranks, name, self.rank), _matched(self.alphas, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def wrapped(self, layer: int) -> dict[str, str]:
        """What the experts' names in the file stand for: PEFT nests one wrapper in the other."""
        found = [
            module
            for module in (GATE_UP, DOWN)
            if any(f".model.layers.{layer}.{module}".endswith(f".{t}") for t in self.parameters)
        ]
        places = (f"{EXPERTS}.base_layer", EXPERTS)[-len(found) :] if found else ()
        return dict(zip(places, found, strict=True))


def _matched(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a name, as PEFT finds it."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(name):
            return value
    return default


@functools.lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def read(found: dict[str, Any], where: Path) -> Told:
    """Take a configuration apart.

    Raises:
      CheckpointError: it is no LoRA adapter's, is damaged, or asks for what adapters here lack.
    """
    if found.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {found.get('peft_type')!r:.50}; adapters here are LORA."
        )
    asked = [name for name in _REFUSED if found.get(name)]
    if found.get("bias", "none") != "none":
        asked.append("bias")
    if found.get("init_lora_weights", True) not in _BEGINNINGS:
        asked.append(f"init_lora_weights {found['init_lora_weights']!r:.50}")
    if asked:
        raise CheckpointError(
            f"{where}: has {' and '.join(asked)}, which adapters here cannot have. Merge it with "
            "PEFT into the model instead."
        )
    try:
        told = Told(
            rank=found["r"],
            alpha=float(found["lora_alpha"]),
            dropout=float(found.get("lora_dropout") or 0.0),
            rank_stabilized=bool(found.get("use_rslora", False)),
            ranks=found.get("rank_pattern") or {},
            alphas=found.get("alpha_pattern") or {},
            parameters=tuple(found.get("target_parameters") or ()),
        )
        _check(told)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{where}: is damaged ({error!r:.100}).") from error
    return told


def _check(told: Told) -> None:
    for rank in (told.rank, *told.ranks.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank!r}")
    for alpha in (told.alpha, *told.alphas.values()):
        if not math.isfinite(alpha) or not alpha:
            raise ValueError(f"alpha {alpha!r}")
    if not 0.0 <= told.dropout < 1.0:
        raise ValueError(f"dropout {told.dropout!r}")
    for pattern in (*told.ranks, *told.alphas):
        _compiled(pattern)
    if not all(isinstance(name, str) for name in told.parameters):
        raise ValueError(f"target_parameters {told.parameters!r}")
