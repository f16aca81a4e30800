"""Norms, rotary embedding, hyper-connections and compression against plain formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compress, hyper
from v4jax import presets
from v4jax.model import layers
from v4jax.model.numerics import HF, OFFICIAL

FLASH = presets.get("flash")
# Rounding of a sum of a few hundred float32 terms.
CLOSE: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6}


def test_rms_norm_multiplies_by_its_weight_before_the_cast() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 8), jnp.bfloat16)
    scale = jnp.linspace(0.5, 1.5, 8, dtype=jnp.bfloat16)
    x64, scale64 = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * scale64
    actual = layers.rms_norm(x, scale, 1e-6)
    assert actual.dtype == jnp.bfloat16
    # One rounding to bfloat16: half an ulp, 2^-9.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2.0**-8)


def test_flash_frequencies_are_stretched_between_pairs_15_and_25() -> None:
    plain = np.array(layers.inverse_frequencies(64, FLASH.compress_rope_theta, None))
    scaled = np.array(layers.inverse_frequencies(64, FLASH.compress_rope_theta, FLASH.yarn))
    np.testing.assert_array_equal(scaled[:16], plain[:16])
    np.testing.assert_allclose(scaled[25:], plain[25:] / 16, rtol=1e-7)
    assert np.all((scaled < plain)[16:])
    assert np.all((scaled > plain / 16)[16:25])


def test_rotation_affects_the_last_pairs_only_and_has_an_inverse() -> None:
    position_BT = jnp.array([[0, 5, 1_000_003]], jnp.int32)
    table = layers.rope_table(position_BT, FLASH, OFFICIAL, jnp.float32, compressed=False)
    x = jax.random.normal(jax.random.key(1), (1, 3, 4, 512))
    rotated = layers.rotate(x, table)
    frequency = np.array(layers.inverse_frequencies(64, 10000.0, None), np.float32)
    angle = np.asarray(position_BT)[..., None].astype(np.float32) * frequency
    pairs = np.asarray(x, np.float64)[..., 448:].reshape(1, 3, 4, 32, 2)
    expected = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle.astype(np.float64))[
        :, :, None
    ]
    actual = np.asarray(rotated)[..., 448:].reshape(1, 3, 4, 32, 2)
    np.testing.assert_allclose(actual[..., 0] + 1j * actual[..., 1], expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(rotated[..., :448], x[..., :448])
    np.testing.assert_allclose(layers.rotate(rotated, table, inverse=True), x, rtol=1e-5, atol=2e-6)


def test_only_official_numerics_keep_tables_in_float32() -> None:
    position_BT = jnp.zeros((1, 2), jnp.int32)
    for numerics, dtype in ((HF, jnp.bfloat16), (OFFICIAL, jnp.float32)):
        cos, _ = layers.rope_table(position_BT, FLASH, numerics, jnp.bfloat16, compressed=True)
        assert cos.dtype == dtype


def plain_sinkhorn(logits: np.ndarray, steps: int, eps: float) -> np.ndarray:
    m = np.exp(logits - logits.max(-1, keepdims=True))
    m = m / m.sum(-1, keepdims=True) + eps
    m = m / (m.sum(-2, keepdims=True) + eps)
    for _ in range(steps - 1):
        m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return m


@pytest.mark.parametrize(("streams", "steps"), [(4, 20), (2, 1), (3, 5), (1, 4)])
def test_sinkhorn_equals_its_definition(streams: int, steps: int) -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(2, 5, streams, streams))
    actual = hyper.sinkhorn(jnp.asarray(logits, jnp.float32), steps=steps, eps=1e-6)
    np.testing.assert_allclose(actual, plain_sinkhorn(logits, steps, 1e-6), **CLOSE)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1), st.floats(0.1, 4.0))
def test_sinkhorn_columns_sum_to_one_and_rows_nearly(seed: int, spread: float) -> None:
    logits = spread * jax.random.normal(jax.random.key(seed), (1, 7, 4, 4))
    m = np.asarray(hyper.sinkhorn(logits, steps=20, eps=1e-6))
    np.testing.assert_allclose(m.sum(-2), 1, atol=1e-5)
    assert np.abs(m.sum(-1) - 1).max() < 0.2
    assert m.min() >= 0


def test_hyper_connections_contract_the_first_index_of_comb() -> None:
    rng = np.random.default_rng(3)
    x, output = rng.normal(size=(1, 2, 4, 6)), rng.normal(size=(1, 2, 6))
    post, comb = rng.normal(size=(1, 2, 4)), rng.normal(size=(1, 2, 4, 4))
    expected = post[..., None] * output[:, :, None] + np.einsum("btjk,btjd->btkd", comb, x)
    as32 = lambda a: jnp.asarray(a, jnp.float32)
    actual = hyper.post(as32(output), as32(x.reshape(1, 2, 24)), as32(post), as32(comb))
    np.testing.assert_allclose(actual.reshape(1, 2, 4, 6), expected, **CLOSE)


def test_pre_collapses_streams_by_their_weights() -> None:
    rng = np.random.default_rng(4)
    x, fn = rng.normal(size=(1, 3, 4, 6)), rng.normal(size=(24, 24))
    base, scale = rng.normal(size=24), rng.normal(size=3)
    flat = x.reshape(1, 3, 24)
    mix = flat @ fn.T / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-5)
    weight = 1 / (1 + np.exp(-(mix[..., :4] * scale[0] + base[:4]))) + 1e-6
    expected_post = 2 / (1 + np.exp(-(mix[..., 4:8] * scale[1] + base[4:8])))
    as32 = lambda a: jnp.asarray(a, jnp.float32)
    collapsed, post, comb = hyper.pre(
        as32(flat), as32(fn), as32(base), as32(scale), streams=4, steps=20, eps=1e-6, norm_eps=1e-5
    )
    np.testing.assert_allclose(collapsed, (weight[..., None] * x).sum(2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(post, expected_post, rtol=1e-5, atol=1e-5)
    logits = (mix[..., 8:] * scale[2] + base[8:]).reshape(1, 3, 4, 4)
    np.testing.assert_allclose(comb, plain_sinkhorn(logits, 20, 1e-6), rtol=1e-4, atol=1e-5)


def plain_entry(kv: np.ndarray, gate: np.ndarray) -> np.ndarray:
    weights = np.exp(gate - gate.max(0))
    return (weights / weights.sum(0) * kv).sum(0)


@pytest.mark.parametrize(
    ("ratio", "overlap", "first"), [(4, 2, 0), (4, 2, 3), (8, 1, 0), (3, 2, 0)]
)
def test_an_entry_pools_its_window_and_the_first_half_of_the_previous_one(
    ratio: int, overlap: int, first: int
) -> None:
    rng = np.random.default_rng(ratio)
    count, dim = 3, 5
    kv, gate = rng.normal(size=(2, 1, (count + overlap - 1) * ratio, overlap * dim))
    bias = rng.normal(size=(ratio, overlap * dim))
    kv_BXC, gate_BXC, bias_MC = (jnp.asarray(a, jnp.float32) for a in (kv, gate, bias))
    actual = compress.pool(
        kv_BXC, gate_BXC, bias_MC, jnp.array([first], jnp.int32), overlap=overlap
    )
    for i in range(count):
        parts = []
        for series in range(overlap):
            if series < overlap - 1 and first + i == 0:
                continue
            rows = slice((i + series) * ratio, (i + series + 1) * ratio)
            channels = slice(series * dim, (series + 1) * dim)
            parts.append((kv[0, rows, channels], gate[0, rows, channels] + bias[:, channels]))
        expected = plain_entry(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        np.testing.assert_allclose(actual[0, i], expected, rtol=1e-5, atol=1e-6)


def test_rows_before_the_text_do_not_reach_window_zero() -> None:
    kv = jnp.full((1, 8, 2), math.nan).at[:, 4:].set(1.0)
    gate = jnp.zeros((1, 8, 2)).at[:, :4].set(math.nan)
    actual = compress.pool(kv, gate, jnp.zeros((4, 2)), jnp.array([0], jnp.int32), overlap=2)
    np.testing.assert_allclose(actual, 1.0)
