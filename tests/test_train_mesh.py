"""A training step on meshes: the gradients of one device, and nothing large moves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import exchanges, models, training_runs
from v4jax.adapters.lora import Lora
from v4jax.model import sharding
from v4jax.model.config import LayerKind
from v4jax.model.numerics import HF
from v4jax.model.transformer import Model
from v4jax_train import preparation, step, trainable
from v4jax_train.trainable import Parts

# CSA routed by token id, and HCA with a ratio that makes the size of its pool unique.
CFG = dataclasses.replace(
    exchanges.CFG, layers=(LayerKind("csa", 4, "hash"), LayerKind("hca", 2, "routed"))
)
ADAPTER = Lora("all", rank=4)
LENGTH = 256


def batch(mesh: Mesh | None) -> dict[str, Any]:
    """Eight rows with two documents each: the share of this process."""
    rows = np.array(preparation.packs_here(8, 1, mesh))
    document = np.where(np.arange(LENGTH) < 128, 1, 2)
    local = {
        "tokens": models.tokens(CFG, 8, LENGTH)[rows],
        "trained": np.ones((8, LENGTH), np.bool_)[rows],
        "document": np.tile(document.astype(np.int32), (8, 1))[rows],
    }
    return preparation.place_batch(local, 1, mesh)


def parts_of(mesh: Mesh | None) -> Parts:
    """A model with an adapter that is not at its initial values."""
    model, factors = models.weights(CFG), training_runs.learned(CFG, ADAPTER)
    factors = jax.tree.map(jnp.asarray, factors)
    if mesh is not None:
        model = jax.device_put(model, sharding.shardings(Model(CFG), mesh, model))
        places = sharding.shardings(trainable.declare(CFG, ADAPTER), mesh, factors)
        factors = jax.device_put(factors, places)
    return trainable.split(model, CFG, ADAPTER, jax.random.key(0))._replace(trained=factors)


def updated(mesh: Mesh | None) -> tuple[Any, float, str]:
    """The trained weights minus their gradient, the loss and the program."""
    rule = optax.sgd(1.0)
    parts = parts_of(mesh)
    state = step.begin(parts, rule, 0)
    if mesh is not None:
        replicated = NamedSharding(mesh, PartitionSpec())
        on_mesh = lambda x: isinstance(x.sharding, NamedSharding)
        state = jax.tree.map(lambda x: x if on_mesh(x) else jax.device_put(x, replicated), state)
    settings = step.Settings(cfg=CFG, numerics=HF, what=ADAPTER, clip=1e9)
    args = (state, parts.frozen, batch(mesh), np.float32(np.inf))
    with sharding.on(mesh), jax.numpy_dtype_promotion("standard"):
        program = step.make(settings, rule, like=state if mesh else None).lower(*args).compile()
        after, metrics = program(*args)
    return jax.device_get(after.trained), float(metrics["loss"]), str(program.as_text())


@pytest.fixture(scope="module")
def alone() -> tuple[Any, float, str]:
    return updated(None)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", exchanges.MESHES.values(), ids=exchanges.MESHES.keys())
def test_gradients_equal_those_of_one_device_and_nothing_large_moves(
    sizes: dict[str, int], alone: tuple[Any, float, str]
) -> None:
    trained, loss, program = updated(sharding.make_mesh(**sizes))
    expected, expected_loss, _ = alone
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    before = training_runs.learned(CFG, ADAPTER)
    for name, factors in expected.items():
        for part, theirs in factors.items():
            gradient = np.asarray(theirs) - before[name][part]
            ours = np.asarray(trained[name][part]) - before[name][part]
            np.testing.assert_allclose(ours, gradient, atol=2e-5 * np.abs(gradient).max() + 1e-7)
    moved = exchanges.large(program)
    if "tensor" in sizes:
        # All heads read an entry, and each has a part of its gradient: one sum per layer.
        sums = moved.pop("pools")
        assert sum(exchange.times for exchange in sums) <= len(CFG.layers)
        assert {exchange.kind for exchange in sums} == {"all-reduce"}
    assert not moved
