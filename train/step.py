"""One compiled training step: gradients accumulated over parts of a batch, then one update.

Axis letters: A parts of a batch, run one after another, B rows of a part, T tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32

from pallas_kernels.residuals import Remat
from v4jax.adapters.lora_settings import Lora
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.pytree import pytree

from . import balance, loss, trainable
from .trainable import Full, Parts

Metrics = dict[str, Array]
Batch = dict[str, Any]


@pytree
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes.

    Attributes:
      step: number of steps so far, int32.
      trained, balanced: see `trainable.Parts`.
      optimizer: the optimiser's state.
      key: raw random key, from which each step derives its randomness.
    """

    step: Int[Array, ""]
    trained: Any
    balanced: dict[str, Array]
    optimizer: Any
    key: UInt32[Array, " W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings compiled into a step.

    Attributes:
      cfg: the model's configuration.
      numerics: where rounding happens.
      what: which weights are trained.
      mtp_weight: weight of the MTP loss; 0 skips it.
      balance_weight: weight of the loss that keeps experts equally busy within a document.
      indexer_weight: weight of the indexers' divergence from attention; 0 skips it.
      bias_speed: how far a step moves each bias of the routers; 0 leaves them unchanged.
      clip: largest norm of the gradient; a longer one is scaled down to it.
      remat, unroll: as for `v4jax.model.transformer.forward_rows`.
    """

    cfg: ModelConfig
    numerics: Numerics
    what: Full | Lora
    mtp_weight: float = 0.0
    balance_weight: float = 0.0
    indexer_weight: float = 0.0
    bias_speed: float = 0.0
    clip: float = 1.0
    remat: Remat | tuple[Remat, ...] = "full"
    unroll: bool = False

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the computed losses, by name."""
        always = {"loss": 1.0, "balance_loss": self.balance_weight}
        optional = {"mtp_loss": self.mtp_weight, "indexer_loss": self.indexer_weight}
        return always | {name: weight for name, weight in optional.items() if weight}

    def sums(
        self,
        model: Any,
        batch: Batch,
        *,
        remat: Remat | Sequence[Remat] = "light",
        agreement: bool = False,
    ) -> Any:
        """`loss.sums` with these settings."""
        names = self.weights
        return loss.sums(
            model,
            self.cfg,
            self.numerics,
            batch,
            mtp="mtp_loss" in names,
            agreement=agreement,
            indexer="indexer_loss" in names,
            remat=remat,
            unroll=self.unroll,
        )


def begin(parts: Parts, rule: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step."""
    trained, balanced, _ = parts
    return State(
        jnp.int32(0),
        trained,
        balanced,
        rule.init(trained),
        jax.random.key_data(jax.random.key(seed)),
    )


def make(
    settings: Settings, rule: optax.GradientTransformation, *, like: State | None = None
) -> jax.stages.Wrapped:
    """The compiled step: (state, frozen, batch, limit) -> (state, metrics); the state is donated.

    A batch's arrays are [A, B, T]. Losses are means over all trained tokens of all parts and all
    hosts, so that neither the number of parts nor their padding changes the update. Weights whose
    gradient is zero everywhere, and biases of routers that did not run, are not updated. A step
    whose loss is above the limit, or whose loss or gradient is not finite, changes only the count
    and reports it in `skipped`.

    Args:
      settings: settings to compile into the step.
      rule: the optimiser.
      like: a state whose sharding all states have; None: a single device.
    """

    def step(state: State, frozen: Any, batch: Batch, limit: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, loads, metrics = _gradients(settings, state, frozen, batch, key)
        squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), gradients)
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        is_good = jnp.isfinite(norm) & (metrics["loss"] <= limit)
        old = state.trained, state.balanced, state.optimizer

        def update() -> Any:
            scale = jnp.minimum(1.0, settings.clip / jnp.maximum(norm, 1e-30))
            clipped = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
            updates, optimizer = rule.update(clipped, state.optimizer, state.trained)
            # Weight decay alone would shrink weights that get no gradient.
            updates = jax.tree.map(lambda u, s: u * (s > 0).astype(u.dtype), updates, squares)
            balanced = {
                name: balance.updated_biases(state.balanced[name], load_LE, settings.bias_speed)
                for name, load_LE in loads.items()
                if name in state.balanced
            }
            trained = optax.apply_updates(state.trained, updates)
            return trained, state.balanced | balanced, optimizer

        # Selecting between old and new with `where` would make XLA copy the optimiser's moments.
        trained, balanced, optimizer = jax.lax.cond(is_good, update, lambda: old)
        metrics |= {"gradient_norm": norm, "skipped": 1.0 - is_good.astype(jnp.float32)}
        violations = [balance.violation(load_LE) for load_LE in loads.values()]
        metrics["load_violation"] = jnp.max(jnp.stack(violations or [jnp.float32(0.0)]))
        return State(state.step + 1, trained, balanced, optimizer, state.key), metrics

    places = None if like is None else (jax.tree.map(lambda x: x.sharding, like), None)
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def evaluate(settings: Settings) -> Callable[[Parts, Batch], tuple[Metrics, Metrics]]:
    """The compiled evaluation: (parts, batch [B, T]) -> sums of losses, and their divisors."""

    def run(parts: Parts, batch: Batch) -> tuple[Metrics, Metrics]:
        model = trainable.join(parts, settings.cfg, settings.what)
        sums, _ = settings.sums(model, batch, agreement=True)
        return sums, loss.counts(batch, sums)

    return jax.jit(run)


def _gradients(
    settings: Settings, state: State, frozen: Any, batch: Batch, key: jax.Array
) -> tuple[Any, dict[str, Array], Metrics]:
    """Gradients of the entire batch's loss, accumulated over parts; experts' loads; losses."""
    weights = settings.weights
    counts = loss.counts(batch, weights)

    def objective(trained: Any, part: Any, key: jax.Array) -> tuple[Array, Any]:
        parts = Parts(trained, state.balanced, frozen)
        model = trainable.join(parts, settings.cfg, settings.what, key)
        sums, loads = settings.sums(model, part, remat=settings.remat)
        means = {name: sums[name] / jnp.maximum(counts[name], 1.0) for name in weights}
        total = jnp.sum(jnp.stack([weights[name] * means[name] for name in weights]))
        return total, (loads, means)

    # Jitted separately, so that `eval_shape` and the scan below trace it only once.
    @jax.jit
    def one_part(number: Any, part: Any) -> Any:
        differentiated = jax.grad(objective, has_aux=True)
        gradients, aux = differentiated(state.trained, part, jax.random.fold_in(key, number))
        return jax.tree.map(lambda x: x.astype(jnp.float32), (gradients, *aux))

    parts = len(batch["tokens"])
    if parts == 1:
        totals = one_part(jnp.int32(0), jax.tree.map(lambda x: x[0], batch))
    else:
        first = jax.eval_shape(one_part, jnp.int32(0), jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        add = lambda total, step: (jax.tree.map(jnp.add, total, one_part(*step)), None)
        totals, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), batch))
    gradients, loads, metrics = totals
    metrics |= {"tokens_trained": counts["loss"], "tokens_seen": counts["balance_loss"]}
    return gradients, loads, metrics
