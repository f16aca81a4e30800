"""Low-rank adapters: what they add, what learns, what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models
from tests.models import CSA, HCA
from v4jax import cache as caches
from v4jax import lora, params, steps
from v4jax.lora import Lora
from v4jax.model import Model
from v4jax.numerics import HF

CFG = models.config(CSA, HCA, hashed=0)
TOKENS = models.tokens(CFG, 2, 40)


def logits(model: Model) -> jax.Array:
    cache = caches.make(CFG, 2, TOKENS.shape[1], jnp.float32)
    count_B = jnp.full(len(TOKENS), TOKENS.shape[1], jnp.int32)
    return steps.logits(model, jnp.asarray(TOKENS), cache, count_B, cfg=CFG, numerics=HF)[0]


def learned(settings: Lora) -> lora.Adapter:
    """An adapter as after some training: both factors matter."""
    adapter = lora.init(CFG, settings, jax.random.key(0))
    filled = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(filled, adapter)


def merged(settings: Lora, adapter: lora.Adapter) -> Model:
    def fold(name: str, _: Any, weight: Any) -> Any:
        if name not in adapter:
            return weight
        a, b = (adapter[name][part] for part in "ab")
        return weight + settings.scale_of(name) * b @ a

    return params.map_leaves(fold, Model(CFG), models.weights(CFG))


@pytest.mark.parametrize(
    "settings",
    [Lora("attn+shared", rank=3), Lora("all", rank=4, expert_rank=2, rank_stabilized=True)],
    ids=["attn+shared", "all"],
)
def test_an_attached_adapter_is_the_sum_of_the_matrices(settings: Lora) -> None:
    adapter, base = learned(settings), models.weights(CFG)
    got = logits(lora.attach(base, CFG, settings, adapter))
    expected = logits(merged(settings, adapter))
    assert np.abs(got - logits(base)).max() > 0.1 * np.abs(expected).max()
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_new_adapter_changes_nothing() -> None:
    settings, base = Lora("all"), models.weights(CFG)
    adapter = lora.init(CFG, settings, jax.random.key(1))
    got = logits(lora.attach(base, CFG, settings, adapter))
    np.testing.assert_allclose(got, logits(base), atol=1e-6)
