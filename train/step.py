"""One step of training, compiled: gradients of several parts of a batch, one update.

Axis letters: A parts of a batch that follow one another, B rows of a part, T tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from v4jax.config import ModelConfig
from v4jax.lora import Lora
from v4jax.numerics import Numerics

from . import loss, trainable
from .trainable import Full, Trained

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a step changes.

    Attributes:
      step: int32, how many have been made.
      trained: see `trainable`.
      optimizer: the optimiser's own.
      key: from which every step's randomness follows.
    """

    step: Any
    trained: Any
    optimizer: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled into a step.

    Attributes:
      cfg: the model's configuration.
      numerics: where rounding happens.
      what: which weights are trained.
      mtp_weight: of the MTP loss; 0 leaves it out.
      clip: gradients longer than this are shortened to it.
      remat: compute activations anew in the backward pass.
    """

    cfg: ModelConfig
    numerics: Numerics
    what: Full | Lora
    mtp_weight: float = 0.0
    clip: float = 1.0
    remat: bool = True


def begin(trained: Trained, rule: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), trained, rule.init(trained), jax.random.key(seed))


def make(
    settings: Settings, rule: optax.GradientTransformation
) -> Callable[[State, Any, dict[str, Array]], tuple[State, Metrics]]:
    """The compiled step: (state, frozen, batch) -> (state, metrics); the state is donated.

    A batch's arrays are [A, B, T]. Losses are means over all trained tokens of all parts and all
    hosts, so that neither the number of parts nor their padding changes the update. A step whose
    loss or gradient is not finite changes nothing but the count, and says so.
    """

    def step(state: State, frozen: Any, batch: dict[str, Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradients, metrics = _gradients(settings, state.trained, frozen, batch, key)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        shorter = jnp.minimum(1.0, settings.clip / jnp.maximum(norm, 1e-30))
        gradients = jax.tree.map(lambda g: g * shorter.astype(g.dtype), gradients)
        updates, moved = rule.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        trained, moved = keep(trained, state.trained), keep(moved, state.optimizer)
        metrics |= {"gradient_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
        return State(state.step + 1, trained, moved, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def _gradients(
    settings: Settings, trained: Trained, frozen: Any, batch: dict[str, Array], key: jax.Array
) -> tuple[Trained, Metrics]:
    """Gradients of the whole batch's loss, part by part."""
    cfg, mtp = settings.cfg, settings.mtp_weight > 0
    counts = loss.counts(batch, mtp=mtp)

    def objective(trained: Trained, part: Any, key: jax.Array) -> tuple[Array, Metrics]:
        model = trainable.join(trained, frozen, cfg, settings.what, key)
        sums = loss.sums(model, cfg, settings.numerics, part, mtp=mtp, remat=settings.remat)
        means = {name: sums[name] / jnp.maximum(counts[name], 1.0) for name in sums}
        return means["loss"] + settings.mtp_weight * means.get("mtp_loss", 0.0), means

    def one_part(total: Any, step: Any) -> tuple[Any, None]:
        part, number = step
        found = jax.grad(objective, has_aux=True)(trained, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, found), None

    nothing = lambda weight: jnp.zeros(weight.shape, jnp.float32)
    zeros = jax.tree.map(nothing, trained), dict.fromkeys(counts, jnp.float32(0.0))
    parts = len(batch["tokens"])
    (gradients, metrics), _ = jax.lax.scan(one_part, zeros, (batch, jnp.arange(parts)))
    return gradients, metrics | {"tokens": counts["loss"]}
