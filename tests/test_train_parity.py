"""Losses, gradients and one step of AdamW against transformers and torch, from the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import v4jax
from tests import hf_models
from v4jax.checkpoints import tensor_names
from v4jax.model import params
from v4jax.model.numerics import HF
from v4jax.model.transformer import Model
from v4jax_train import optimizer, step, trainable
from v4jax_train.trainable import Full

LENGTH, RATE, DECAY = 256, 1e-3, 0.1


@pytest.fixture(scope="module")
def theirs() -> Any:
    return hf_models.make([0, 0, 4, 128, 4], 11)


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = hf_models.save(theirs, tmp_path_factory.mktemp("transformers") / "model")
    return v4jax.load(path, dtype="float32", numerics="hf")


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 128, (2, LENGTH), np.int32),
        "trained": rng.random((2, LENGTH)) < 0.7,
        "document": np.ones((2, LENGTH), np.int32),
    }


def their_loss(model: Any, batch: dict[str, np.ndarray]) -> Any:
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    labels = torch.where(torch.tensor(batch["trained"]), tokens, -100)
    logits = model(tokens, use_cache=False).logits[:, :-1].reshape(-1, 128)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))


def by_release_name(values: dict[str, Any], cfg: Any) -> dict[str, np.ndarray]:
    """Tensors of the release by name, from stacked leaves."""
    specs = dict(params.leaves(Model(cfg)))
    tensors = {}
    for leaf, value in values.items():
        names = list(tensor_names.flatten(tensor_names.release_names(leaf, cfg)))
        shape = specs[leaf].shape[specs[leaf].stack_dims :]
        tensors |= dict(zip(names, np.asarray(value).reshape(len(names), *shape), strict=True))
    return tensors


def their_tensors(named: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of torch by their release names, with experts separated."""
    rename = tensor_names.to_release(named)
    tensors = {}
    for name, tensor in named.items():
        array, ours = tensor.detach().numpy(), rename(name)
        if tensor_names.is_fused(ours):
            places = tensor_names.of_fused(ours, array.shape)
            tensors |= {matrix: array[e, rows] for matrix, e, rows in places}
        else:
            tensors[ours] = array
    return tensors


@pytest.fixture(scope="module")
def gradients(theirs: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    theirs.zero_grad()
    their_loss(theirs, batch).backward()
    named = dict(theirs.named_parameters())
    return their_tensors({n: p.grad for n, p in named.items() if p.grad is not None})


@pytest.fixture(scope="module")
def stepped(ours: Any, batch: dict[str, np.ndarray]) -> Any:
    """Trained weights before an AdamW step, the model and state after it, and its metrics."""
    cfg, what = ours.config, Full()
    parts = trainable.split(ours.weights, cfg, what, jax.random.key(0))
    rule = optimizer.make(trainable.declare(cfg, what), cfg, RATE, rule="adamw", weight_decay=DECAY)
    settings = step.Settings(cfg=cfg, numerics=HF, what=what, clip=1e9, remat="light")
    placed = {name: jnp.asarray(x)[None] for name, x in batch.items()}
    trained, balanced = jax.tree.map(jnp.copy, parts[:2])
    state = step.begin(parts._replace(trained=trained, balanced=balanced), rule, 0)
    run = step.make(settings, rule)
    # optax mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = run(state, parts.frozen, placed, np.float32(np.inf))
    after = trainable.Parts(state.trained, state.balanced, parts.frozen)
    return parts.trained, trainable.join(after, cfg, what), state, metrics


@pytest.mark.slow
def test_loss_and_every_gradient_match_torch(
    theirs: Any, ours: Any, batch: Any, stepped: Any, gradients: dict[str, np.ndarray]
) -> None:
    _, _, state, metrics = stepped
    expected = their_loss(theirs, batch).item()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    # After the first step AdamW's mean of gradients is a tenth of that step's gradient.
    mean = optax.tree.get(state.optimizer, "mu")
    ours_by_name = {name: x / (1 - 0.9) for name, x in by_release_name(mean, ours.config).items()}
    # torch has no gradient where nothing depends on a weight; ours is zero there.
    for name in ours_by_name.keys() - gradients.keys():
        assert not np.any(ours_by_name[name]), name
    for name, their_gradient in gradients.items():
        if name not in ours_by_name:
            assert ".indexer." in name or name.endswith("gate.bias")
            continue
        bar = 1e-4 * np.abs(their_gradient).max() + 1e-8
        assert np.abs(ours_by_name[name] - their_gradient).max() <= bar, name


@pytest.mark.slow
def test_one_adamw_step_matches_torch(
    ours: Any, stepped: Any, gradients: dict[str, np.ndarray]
) -> None:
    trained, moved, state, metrics = stepped
    before, after = (by_release_name(x, ours.config) for x in (trained, state.trained))
    assert metrics["skipped"] == 0
    for name, their_gradient in gradients.items():
        if name not in after:
            continue
        weight = torch.nn.Parameter(torch.tensor(before[name].copy()))
        weight.grad = torch.tensor(their_gradient)
        adamw = torch.optim.AdamW([weight], RATE, betas=(0.9, 0.95), eps=1e-20, weight_decay=DECAY)
        adamw.step()
        # The first step is as long as the rate for any gradient, so the sign has to be certain.
        clear = np.abs(their_gradient) > 1e-3 * np.abs(their_gradient).max()
        difference = np.abs(after[name] - weight.detach().numpy())[clear]
        assert difference.max() <= 1e-3 * RATE, name
    # Nothing else is reached by gradients or decay.
    old, new = (dict(params.leaves(model)) for model in (ours.weights, moved))
    frozen = old.keys() - state.trained.keys()
    for name in frozen:
        np.testing.assert_array_equal(new[name], old[name], name)
    assert {name.rsplit(".", 1)[-1] for name in frozen} >= {"bias_E", "expert_ids_VA"}
    assert any(".indexer." in name for name in frozen)
