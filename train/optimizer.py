"""Which rule moves which weight, and the optimiser that follows from it.

Source: the report, section 2.4 for the groups, 4.2.2 for the numbers.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec

from . import muon

Group = Literal["muon", "adamw", "balanced", "fixed"]
Rate = float | Callable[[Any], Any]
_DEAR = 0.3  # of a step's other work
# The report has 1e-20. XLA flushes what is below 1.2e-38 to zero, the second moment of gradients
# below 4.9e-19 too, which would be divided by 1e-20 alone: steps of up to 48 times the rate. This
# keeps them to the rate, and is below the rounding of gradients above 1e-11.
_EPS = 5e-19


def group(name: str, spec: ParamSpec) -> Group:
    """How a weight is trained, from its declaration.

    Muon moves matrices; AdamW the embedding, the head, norms, biases, sinks and the hyper-
    connections' biases and gates. Routers' biases are 'balanced' by a rule of their own, tables of
    expert ids are 'fixed'.
    """
    field = name.rsplit(".", 1)[-1]
    if spec.stored == "i64":
        return "fixed"
    if field == "bias_E":
        return "balanced"
    vector = len(spec.shape) - spec.stack_dims < 2
    return "adamw" if vector or "vocab" in spec.axes or field.startswith("bias_") else "muon"


def matrices(name: str, cfg: ModelConfig) -> int:
    """How many independent matrices stand one below the other in a weight."""
    return cfg.o_groups if name.endswith("attention.o_a_QP") else 1


def make(
    declared: dict[str, Any],
    cfg: ModelConfig,
    rate: Rate,
    *,
    rule: Literal["muon", "adamw"] = "muon",
    weight_decay: float = 0.1,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """The optimiser of a model's weights, or of a part of them.

    Args:
      declared: what is trained, as `trainable.declare` has it; gradients have its structure.
      cfg: the model's configuration.
      rate: learning rate, or a schedule.
      rule: 'adamw' moves everything by AdamW.
      weight_decay: per step and learning rate, on every weight that is trained.
      dtype: of the factors in Muon's products.
    """
    parts = lambda name: matrices(name, cfg)
    decayed = lambda scale: optax.chain(
        scale, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate)
    )
    return optax.partition(
        {
            "muon": decayed(muon.scale_by_muon(parts=parts, dtype=dtype)),
            "adamw": decayed(_wide(optax.scale_by_adam(b1=0.9, b2=0.95, eps=_EPS))),
        },
        {name: _labels(name, of_name, rule) for name, of_name in declared.items()},
    )


def _wide(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """With moments and updates in float32, also of weights and gradients in bfloat16."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    init: Any = lambda weights: rule.init(wide(weights))
    update: Any = lambda gradients, *rest: rule.update(wide(gradients), *rest)
    return optax.GradientTransformation(init, update)


def _labels(name: str, declared: Any, rule: str) -> Any:
    """Adapters' factors are moved by AdamW."""
    if not isinstance(declared, ParamSpec):
        return dict.fromkeys(declared, "adamw")
    return "adamw" if rule == "adamw" else group(name, declared)


def warn_of_cost(
    declared: dict[str, ParamSpec], cfg: ModelConfig, active: int, tokens: int
) -> float:
    """Muon's work over that of the model in one step; a warning if it is a large part.

    Args:
      declared: what is trained.
      cfg: the model's configuration.
      active: parameters that a token meets.
      tokens: of one step.
    """
    flops = sum(
        muon.newton_schulz_flops(spec.shape, matrices(name, cfg))
        for name, spec in declared.items()
        if group(name, spec) == "muon"
    )
    share = flops / (6 * active * tokens)
    if share > _DEAR:
        warnings.warn(
            f"Muon's Newton-Schulz iterations cost {share:.0%} of the rest of a step of"
            f" {tokens:,} tokens. Take more tokens per step, or AdamW.",
            stacklevel=2,
        )
    return share
