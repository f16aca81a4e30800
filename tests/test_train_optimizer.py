"""The size of AdamW's steps, and what a step leaves unchanged."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import models
from tests.models import CSA, HCA, SLIDING
from v4jax.model.numerics import HF
from v4jax.model.params import ParamSpec
from v4jax_train import optimizer, step, trainable
from v4jax_train.trainable import Full

CFG = models.config(SLIDING, CSA, HCA, num_nextn_predict_layers=1)
RATE = 1e-3
# From float32 subnormals to values whose squares overflow.
SIZES = np.geomspace(1e-42, 1e18, 6001).astype(np.float32)
HISTORIES = {
    "the same": np.ones(12),
    "one, then none": np.eye(60)[0],
    "none, then one": np.eye(30)[-1],
    "signs change": np.resize([1.0, -1.0], 12),
    "smaller and smaller": np.geomspace(1e6, 1e-6, 40),
    "larger and larger": np.geomspace(1e-6, 1e6, 40),
}


def steps(
    rule: optax.GradientTransformation, gradients: np.ndarray, dtype: Any = jnp.float32
) -> np.ndarray:
    """The steps of one vector, divided by the rate."""
    weight = {"norm_D": jnp.zeros(gradients.shape[1], dtype)}
    state, update, updates = rule.init(weight), jax.jit(rule.update), []
    for gradient in gradients:
        changes: Any
        # optax mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            changes, state = update({"norm_D": jnp.asarray(gradient, dtype)}, state, weight)
        updates.append(np.asarray(changes["norm_D"], np.float32) / RATE)
    return np.array(updates)


def adamw(kind: Literal["adamw", "muon"]) -> optax.GradientTransformation:
    declared = {"norm_D": ParamSpec((len(SIZES),), (None,))}
    return optimizer.make(declared, CFG, RATE, rule=kind, weight_decay=0.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("history", HISTORIES)
def test_no_step_is_longer_than_the_rate_allows(history: str, dtype: Any, kind: Any) -> None:
    with np.errstate(under="ignore", over="ignore"):
        gradients = HISTORIES[history][:, None].astype(np.float32) * SIZES
    lengths = np.abs(steps(adamw(kind), gradients, dtype))
    assert np.isfinite(lengths).all()
    assert lengths[0].max() <= 1 + 1e-5
    # A mean over few gradients against one over more: Adam's own bound, by Cauchy-Schwarz.
    assert lengths.max() <= 0.1 / np.sqrt(0.05 * (1 - 0.81 / 0.95))
    if history == "the same":
        np.testing.assert_allclose(
            lengths[:, SIZES > 1e-12], 1.0, rtol=1e-2 if dtype != jnp.float32 else 1e-5
        )


def test_steps_of_ordinary_gradients_equal_those_with_an_epsilon_of_1e_20() -> None:
    rng = np.random.default_rng(0)
    noise = np.where(rng.random((20, len(SIZES))) < 0.5, 1, -1) * rng.uniform(0.5, 2.0, (20, 1))
    gradients = (noise * np.geomspace(1e-10, 1e4, len(SIZES))).astype(np.float32)
    plain = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-20), optax.scale(-RATE))
    np.testing.assert_allclose(steps(adamw("adamw"), gradients), steps(plain, gradients), rtol=1e-6)


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """All weights in a run with Muon, without MTP and indexer losses.

    Before it, after a step on documents shorter than HCA's windows, and after one on longer ones;
    then the router biases after both.
    """
    what = Full(indexers=True)
    parts = trainable.split(models.weights(CFG), CFG, what, jax.random.key(0))
    rule = optimizer.make(trainable.declare(CFG, what), CFG, RATE)
    settings = step.Settings(cfg=CFG, numerics=HF, what=what, bias_speed=0.1, remat="light")
    run = step.make(settings, rule)
    tokens = jnp.asarray(models.tokens(CFG, 2, 128))[None]
    state, weights = step.begin(jax.tree.map(jnp.copy, parts), rule, 0), []
    for length in (12, 128):
        document = jnp.zeros(tokens.shape, jnp.int32).at[..., :length].set(1)
        batch = {"tokens": tokens, "trained": document > 0, "document": document}
        # optax mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            state, metrics = run(state, parts.frozen, batch, np.float32(np.inf))
        assert not metrics["skipped"]
        weights.append(jax.device_get(state.trained))
    return jax.device_get(parts.trained), *weights, jax.device_get(state.balanced)


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if np.array_equal(before[name], after[name])}


def test_weights_without_a_gradient_are_neither_decayed_nor_moved(trained: Any) -> None:
    before, short, long, _ = trained
    untrained = {name for name in before if name.startswith("mtp.") or ".indexer." in name}
    assert any(name.startswith("mtp.") for name in untrained)
    assert any(".indexer." in name for name in untrained)
    # A document of twelve tokens has no complete window of sixteen.
    compressors = {name for name in before if ".compressor." in name} - untrained
    ratio = lambda name: before[f"{name.rpartition('.')[0]}.bias_MC"].shape[-2]
    hca = {name for name in compressors if ratio(name) == 16}
    assert hca
    assert unchanged(before, short) == untrained | hca
    assert unchanged(before, long) == untrained


def test_biases_of_routers_that_did_not_run_are_unchanged(trained: Any) -> None:
    balanced = trained[-1]
    assert len(balanced) == 3
    for name, bias in balanced.items():
        assert np.any(bias) != name.startswith("mtp."), name
