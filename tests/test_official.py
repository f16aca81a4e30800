"""Official numerics and MTP against the independent NumPy oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models, oracle
from v4jax.decoding import steps
from v4jax.model import cache as caches
from v4jax.model import config_json, transformer
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import HF, OFFICIAL, Numerics
from v4jax.model.transformer import Model

LENGTH = 260


def make(
    ratios: list[int], seed: int, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any], ModelConfig, Model]:
    raw = oracle.tiny_config(compress_ratios=[*ratios, 0], num_hidden_layers=len(ratios), **changes)
    release = oracle.random_weights(raw, seed)
    cfg = config_json.from_json(raw)
    return raw, release, cfg, models.from_release(release, cfg)


def run(
    model: Model, cfg: ModelConfig, numerics: Numerics, tokens_BT: np.ndarray
) -> tuple[np.ndarray, Any]:
    batch, length = tokens_BT.shape
    cache = caches.make(cfg, batch, length, jnp.float32, mtp=True)
    count_B = jnp.full(batch, length, jnp.int32)

    @jax.jit
    def program(model: Model, tokens_BT: Any, cache: Any) -> Any:
        streams, cache, _ = transformer.forward(model, cfg, numerics, tokens_BT, cache, count_B)
        return transformer.head(model, transformer.hidden(model, cfg, streams)), (streams, cache)

    logits, state = program(model, jnp.asarray(tokens_BT, jnp.int32), cache)
    return np.asarray(logits), state


def agreement(actual_BTV: np.ndarray, expected_BTV: np.ndarray) -> float:
    """The share of positions whose logits agree to float32 rounding.

    If float32 noise flips one E4M3 or E2M1 rounding, or the choice of one entry, all logits that
    depend on it move: positions either agree or are far off.
    """
    off_BT = np.abs(actual_BTV - expected_BTV).max(-1)
    return float((off_BT <= 1e-4 * np.abs(expected_BTV).max()).mean())


# With two layers, even float32 and float64 runs of the same code agree at only 0.95 of positions.
@pytest.mark.parametrize(
    ("ratios", "share"),
    [([0], 0.98), ([4], 0.98), ([128], 0.98), ([0, 4], 0.85), ([4, 128], 0.85)],
    ids=str,
)
def test_official_numerics_equal_the_oracle(ratios: list[int], share: float) -> None:
    raw, release, cfg, model = make(ratios, len(ratios), num_hash_layers=0)
    tokens_BT = models.tokens(cfg, 2, LENGTH)
    expected = oracle.forward(release, raw, tokens_BT, numerics="official").logits
    actual, _ = run(model, cfg, OFFICIAL, tokens_BT)
    assert agreement(actual, expected) >= share


@pytest.mark.parametrize("ratios", [[0], [4], [128]], ids=str)
def test_the_comparison_detects_a_missing_rounding(ratios: list[int]) -> None:
    raw, release, cfg, model = make(ratios, 1, num_hash_layers=0)
    tokens_BT = models.tokens(cfg, 2, LENGTH)
    expected = oracle.forward(release, raw, tokens_BT, numerics="official").logits
    actual, _ = run(model, cfg, HF, tokens_BT)
    assert agreement(actual, expected) < 0.1


@pytest.mark.parametrize("ratios", [[0, 4, 128], [4, 4]], ids=str)
def test_hf_numerics_equal_the_oracle(ratios: list[int]) -> None:
    raw, release, cfg, model = make(ratios, 3, num_hash_layers=1)
    tokens_BT = models.tokens(cfg, 2, LENGTH)
    expected = oracle.forward(release, raw, tokens_BT, numerics="hf").logits
    actual, _ = run(model, cfg, HF, tokens_BT)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def draft(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    state: Any,
    next_BT: np.ndarray,
    sizes: list[int],
) -> np.ndarray:
    """MTP logits with the tokens fed in chunks of the given sizes."""
    streams, cache = state
    batch, at, parts = len(next_BT), 0, []
    for size in sizes:
        logits_BTV, _, cache = steps.draft(
            model,
            streams[:, at : at + size],
            jnp.asarray(next_BT[:, at : at + size], jnp.int32),
            cache,
            jnp.full(batch, at, jnp.int32),
            jnp.full(batch, size, jnp.int32),
            cfg=cfg,
            numerics=numerics,
        )
        parts.append(np.asarray(logits_BTV))
        at += size
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "sizes", [[40], [9, 1, 3, 27], [1] * 40], ids=["whole", "chunks", "one by one"]
)
def test_mtp_equals_the_oracle(sizes: list[int]) -> None:
    raw, release, cfg, model = make([0, 4], 7)
    tokens_BT = models.tokens(cfg, 2, 41)
    backbone = oracle.forward(release, raw, tokens_BT[:, :40], numerics="hf")
    expected = oracle.mtp_forward(
        release, raw, backbone.streams, tokens_BT[:, 1:], numerics="hf"
    ).logits
    _, state = run(model, cfg, HF, tokens_BT[:, :40])
    actual = draft(model, cfg, HF, state, tokens_BT[:, 1:], sizes)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_mtp_rounds_its_keys_in_official_numerics() -> None:
    raw, release, cfg, model = make([0], 8)
    tokens_BT = models.tokens(cfg, 2, 41)
    streams = oracle.forward(release, raw, tokens_BT[:, :40], numerics="hf").streams
    expected = oracle.mtp_forward(
        release, raw, streams, tokens_BT[:, 1:], numerics="official"
    ).logits
    flat = jnp.asarray(streams.reshape(2, 40, -1), jnp.float32)
    cache = caches.make(cfg, 2, 40, jnp.float32, mtp=True)
    actual = draft(model, cfg, OFFICIAL, (flat, cache), tokens_BT[:, 1:], [40])
    assert agreement(actual, expected) >= 0.98
