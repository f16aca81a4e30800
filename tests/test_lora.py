"""Low-rank adapters: what they add, what they target, what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import LoraWeight
from tests import models
from tests.models import CSA, HCA
from v4jax.adapters import lora, lora_settings
from v4jax.adapters.lora import Lora
from v4jax.decoding import steps
from v4jax.model import cache as caches
from v4jax.model import layers, params
from v4jax.model.numerics import HF
from v4jax.model.transformer import Model

CFG = models.config(CSA, HCA, hashed=0)
TOKENS = models.tokens(CFG, 2, 40)


def logits(model: Model) -> jax.Array:
    cache = caches.make(CFG, 2, TOKENS.shape[1], jnp.float32)
    count_B = jnp.full(len(TOKENS), TOKENS.shape[1], jnp.int32)
    return steps.logits(model, jnp.asarray(TOKENS), cache, count_B, cfg=CFG, numerics=HF)[0]


def learned(settings: Lora) -> lora.Adapter:
    """An adapter as if after some training: both factors are non-zero."""
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
    [
        Lora(("attn+shared", "kv_proj", "gate_proj", "indexer.q_b_proj", "weights_proj"), rank=3),
        Lora("all", rank=4, expert_rank=2, rank_stabilized=True),
    ],
    ids=["with compressors and indexers", "all"],
)
def test_an_attached_adapter_equals_merged_weights(settings: Lora) -> None:
    adapter, base = learned(settings), models.weights(CFG)
    actual = logits(lora.attach(base, CFG, settings, adapter))
    expected = logits(merged(settings, adapter))
    assert np.abs(actual - logits(base)).max() > 0.1 * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_float32_linear_applies_its_update_in_float32() -> None:
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.float32)
    weight = LoraWeight(draw(0, 6, 8).astype(jnp.bfloat16), draw(1, 2, 8), draw(2, 6, 2), 0.5)
    x_TK = draw(3, 5, 8).astype(jnp.bfloat16)
    merged_NK = weight.base.astype(jnp.float32) + 0.5 * weight.b @ weight.a
    actual = layers.linear_float32(x_TK, weight)
    np.testing.assert_allclose(actual, x_TK.astype(jnp.float32) @ merged_NK.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        ("kv_proj", 3),
        (("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"), 7),
        (("gate_proj", "down_proj"), 4),
        (("experts.down_proj", "gate_up_proj"), 3),
        (("attn", "self_attn.kv_proj"), 4),
        (("all",), 10),
    ],
)
def test_targets_are_sets_and_suffixes_of_names(targets: Any, fields: int) -> None:
    settings = Lora(targets)
    assert len(lora_settings.fields(settings)) == fields
    assert lora.declare(CFG, settings).keys() == {
        name
        for name, _ in params.leaves(Model(CFG))
        if name.endswith(tuple(f".{field}" for field in lora_settings.fields(settings)))
    }


@pytest.mark.parametrize("targets", ["kv_prj", "proj", "", (), ("attn", "lm_head"), "o_a_proj"])
def test_unknown_targets_are_named(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"targets (has|is empty)"):
        Lora(targets)


def test_targets_that_a_model_lacks_are_named() -> None:
    with pytest.raises(ValueError, match=r"'indexer\.kv_proj', which no layer of this model has"):
        lora.declare(models.config(HCA), Lora(("attn", "indexer.kv_proj")))


# Without full compilation the two programs differ by more than this.
@pytest.mark.full_compilation
def test_a_new_adapter_changes_nothing() -> None:
    settings, base = Lora("all"), models.weights(CFG)
    adapter = lora.init(CFG, settings, jax.random.key(1))
    actual = logits(lora.attach(base, CFG, settings, adapter))
    np.testing.assert_allclose(actual, logits(base), atol=1e-6)
