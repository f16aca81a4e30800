"""Muon against float64 NumPy, and its cost where experts are split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from v4jax import aot
from v4jax.model import sharding
from v4jax_train import muon


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """The published iteration, one matrix at a time, in float64."""
    if x.ndim > 2:
        return np.stack([newton_schulz(part) for part in x])
    x = x / np.linalg.norm(x)
    for a, b, c in muon.HYBRID:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from([(16, 16), (8, 48), (48, 8), (3, 16, 24), (2, 3, 24, 16)]),
    st.integers(0, 2**31),
    st.integers(-12, 12),
)
def test_orthogonal_is_the_published_iteration(
    shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    x = np.random.default_rng(seed).normal(size=shape)
    actual = jax.jit(muon.orthogonal)((x * 10.0**exponent).astype(np.float32))
    # Thirty float32 products, and an iteration that triples values near zero.
    np.testing.assert_allclose(actual, newton_schulz(x), atol=2e-3)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (4, 128, 32)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_singular_values_are_one(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    """For matrices whose singular values span a factor of 100."""
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(1.0, 0.01, u.shape[-1])
    actual = muon.orthogonal(jnp.float32((u * values) @ vt), dtype=dtype)
    singular = np.linalg.svd(np.asarray(actual), compute_uv=False)
    # bfloat16 has 8 bits, of which the last iteration's rounding takes a few.
    np.testing.assert_allclose(singular, 1.0, atol=1e-3 if dtype == jnp.float32 else 2e-2)


def test_a_low_rank_stays_low_and_zeros_stay_zero() -> None:
    rng = np.random.default_rng(1)
    low = jnp.float32(rng.normal(size=(32, 4)) @ rng.normal(size=(4, 48)))
    values = np.linalg.svd(np.asarray(muon.orthogonal(low)), compute_uv=False)
    np.testing.assert_allclose(values[:4], 1.0, atol=1e-3)
    assert values[4] < 1e-2
    np.testing.assert_array_equal(muon.orthogonal(jnp.zeros((3, 8, 16))), 0.0)


def test_updates_follow_nesterov_and_have_the_rms_of_adamw() -> None:
    rng = np.random.default_rng(2)
    shapes = {"wide": (64, 256), "tall": (256, 64), "stack": (4, 64, 256), "cut": (128, 64)}
    parts = lambda name: 2 if name == "cut" else 1
    rule = muon.scale_by_muon(parts=parts)
    state = rule.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
    total = dict.fromkeys(shapes, np.zeros(()))
    for _ in range(3):
        gradients = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates: Any
        updates, state = rule.update(jax.tree.map(jnp.float32, gradients), state)
        for name, gradient in gradients.items():
            total[name] = 0.95 * total[name] + gradient
            ahead = 0.95 * total[name] + gradient
            matrices = ahead.reshape(2, 64, 64) if name == "cut" else ahead
            expected = newton_schulz(matrices) * 0.18 * np.sqrt(max(matrices.shape[-2:]))
            actual = np.asarray(updates[name])
            np.testing.assert_allclose(actual, expected.reshape(gradient.shape), atol=2e-3)
            rms = np.sqrt(np.mean(np.square(actual)))
            np.testing.assert_allclose(rms, 0.18, rtol=2e-3)


def test_what_is_not_a_matrix_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'norm' of shape \(8,\)"):
        muon.scale_by_muon().init({"norm": jnp.zeros(8)})
    with pytest.raises(ValueError, match="is not 3 of them"):
        muon.scale_by_muon(parts=lambda _: 3).init({"o": jnp.zeros((8, 8))})


def test_split_experts_are_not_gathered_and_share_the_work() -> None:
    """Compiled for sixteen v5p devices, experts over all of them."""
    mesh = aot.topology_mesh("v5p:2x2x4", fsdp=2, expert=8)
    layers, experts, rows, columns = 2, 32, 256, 512
    place = NamedSharding(mesh, sharding.partition_spec((None, "experts")))
    struct = jax.ShapeDtypeStruct((layers, experts, rows, columns), jnp.bfloat16, sharding=place)
    rule = muon.scale_by_muon(dtype=jnp.bfloat16)

    def step(weight: jax.Array, momentum: jax.Array, gradient: jax.Array) -> tuple:
        update: Any
        state: Any
        update, state = rule.update(gradient, muon.MuonState(momentum))
        return optax.apply_updates(weight, update), state.momentum

    program = jax.jit(step).lower(struct, struct, struct).compile()
    text: Any = program.as_text()
    assert not any(op in text for op in ("all-gather", "all-reduce", "all-to-all"))
    share = muon.newton_schulz_flops(struct.shape) / 16
    # The compiler counts a loop's body once.
    analysis: Any = program.cost_analysis()
    assert analysis["flops"] * len(muon.HYBRID) == pytest.approx(share, rel=0.05)
