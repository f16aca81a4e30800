"""The update rule of each weight, and the optimiser built from these rules.

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
_EXPENSIVE = 0.3  # fraction of a step's other work
# The report has 1e-20. XLA flushes values below 1.2e-38 to zero, including the second moments of
# gradients below 4.9e-19, which would then be divided by 1e-20 alone: steps of up to 48 times the
# rate. This value limits them to the rate, and is below the rounding of gradients above 1e-11.
_EPS = 5e-19


def group(name: str, spec: ParamSpec) -> Group:
    """How a weight is trained, from its declaration.

    Muon updates matrices; AdamW the embedding, the head, norms, biases, sinks and the hyper-
    connections' biases and gates. Routers' biases are 'balanced' by a separate rule, tables of
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
    """The number of independent matrices stacked along the rows of a weight."""
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
      declared: declarations of the trained part from `trainable.declare`; gradients have its
        structure.
      cfg: the model's configuration.
      rate: learning rate, or a schedule.
      rule: 'muon' for the groups above, or 'adamw' for everything.
      weight_decay: decoupled weight decay, multiplied by the rate, of every trained weight.
      dtype: dtype of the factors in Muon's products.
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
        {name: _labels(name, spec, rule) for name, spec in declared.items()},
    )


def _wide(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule with float32 moments and updates, also for bfloat16 weights and gradients."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    init: Any = lambda weights: rule.init(wide(weights))
    update: Any = lambda gradients, *rest: rule.update(wide(gradients), *rest)
    return optax.GradientTransformation(init, update)


def _labels(name: str, declared: Any, rule: str) -> Any:
    """The group of a weight; the factors of adapters are updated by AdamW."""
    if not isinstance(declared, ParamSpec):
        return dict.fromkeys(declared, "adamw")
    return "adamw" if rule == "adamw" else group(name, declared)


def warn_of_cost(
    declared: dict[str, ParamSpec], cfg: ModelConfig, active: int, tokens: int
) -> float:
    """Muon's work in one step relative to the model's; warns if it is large.

    Args:
      declared: declarations of the trained weights.
      cfg: the model's configuration.
      active: number of parameters active per token.
      tokens: tokens per step.
    """
    flops = sum(
        muon.newton_schulz_flops(spec.shape, matrices(name, cfg))
        for name, spec in declared.items()
        if group(name, spec) == "muon"
    )
    share = flops / (6 * active * tokens)
    if share > _EXPENSIVE:
        warnings.warn(
            f"Muon's Newton-Schulz iterations cost {share:.0%} of the rest of a step of"
            f" {tokens:,} tokens. Use more tokens per step, or AdamW.",
            stacklevel=2,
        )
    return share
