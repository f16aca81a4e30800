"""Hand-written gradients equal those that JAX derives from plain maths.

Axis letters: B batch, T tokens, N streams, D hidden, M = N * D.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products
from pallas_kernels.hyper import reference
from v4jax.model import layers

B, T, D = 2, 5, 24


def normal(*shape: int, seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def streams(x_BTM: Any, N: int) -> Any:
    return x_BTM.reshape(B, T, N, D)


def plain_post(output_BTD: Any, x_BTM: Any, post_BTN: Any, comb_BTNN: Any) -> Any:
    N, highest = post_BTN.shape[-1], jax.lax.Precision.HIGHEST
    mixed_BTND = jnp.einsum("btjk,btjd->btkd", comb_BTNN, streams(x_BTM, N), precision=highest)
    new_BTND = mixed_BTND + post_BTN[..., None] * output_BTD[:, :, None]
    return new_BTND.reshape(B, T, -1)


def plain_collapse(x_BTM: Any, weight_BTN: Any) -> Any:
    return jnp.sum(weight_BTN[..., None] * streams(x_BTM, weight_BTN.shape[-1]), axis=2)


def plain_sinkhorn(logits_BTNN: Any, *, steps: int, eps: float) -> Any:
    m = jax.nn.softmax(logits_BTNN, axis=-1) + eps
    m = m / (jnp.sum(m, axis=-2, keepdims=True) + eps)
    for _ in range(steps - 1):
        m = m / (jnp.sum(m, axis=-1, keepdims=True) + eps)
        m = m / (jnp.sum(m, axis=-2, keepdims=True) + eps)
    return m


def plain_norm(x_BTD: Any, weight_D: Any, eps: float) -> Any:
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + eps)
    return x_BTD * inverse_BT1 * weight_D[None, None]


def assert_same_gradients(ours: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> None:
    out, pull = jax.vjp(ours, *args)
    want, pull_plain = jax.vjp(plain, *args)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    grad = normal(*out.shape, seed=9)
    for actual, expected in zip(pull(grad), pull_plain(grad), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N", [1, 2, 4])
def test_new_streams(N: int) -> None:
    shapes = [(B, T, D), (B, T, N * D), (B, T, N), (B, T, N, N)]
    args = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_same_gradients(reference.post, plain_post, *args)


@pytest.mark.parametrize("N", [1, 2, 4])
def test_collapse(N: int) -> None:
    args = normal(B, T, N * D, seed=0), normal(B, T, N, seed=1)
    assert_same_gradients(reference.collapse, plain_collapse, *args)


@pytest.mark.parametrize(("N", "steps"), [(2, 1), (4, 3), (4, 20)])
def test_sinkhorn(N: int, steps: int) -> None:
    settings = {"steps": steps, "eps": 1e-6}
    ours = lambda logits: reference.sinkhorn(logits, **settings)
    plain = lambda logits: plain_sinkhorn(logits, **settings)
    assert_same_gradients(ours, plain, normal(B, T, N, N, seed=2))


def test_norm() -> None:
    ours = lambda x_BTD, weight_D: layers.rms_norm(x_BTD, weight_D, 1e-6)
    plain = lambda x_BTD, weight_D: plain_norm(x_BTD, weight_D, 1e-6)
    assert_same_gradients(ours, plain, normal(B, T, D, seed=3), normal(D, seed=4))


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    N, half = 2, jnp.bfloat16
    x_BTM, weight_BTN = normal(B, T, N * D, seed=0, dtype=half), normal(B, T, N, seed=1)
    out_BTD, pull = jax.vjp(reference.collapse, x_BTM, weight_BTN)
    grads = pull(jnp.ones_like(out_BTD))
    assert [grad.dtype for grad in grads] == [half, jnp.float32]
    args = normal(B, T, D, seed=2, dtype=half), x_BTM, weight_BTN, normal(B, T, N, N, seed=3)
    new_BTM, pull = jax.vjp(reference.post, *args)
    grads = pull(jnp.ones_like(new_BTM))
    assert [grad.dtype for grad in grads] == [half, half, jnp.float32, jnp.float32]


def product_gradients(x_RK: Any, w_NK: Any, grad_RN: Any) -> Any:
    return jax.vjp(products.with_transposed, x_RK, w_NK)[1](grad_RN)


@pytest.mark.parametrize("rows", [1, 7])
def test_gradients_of_a_bfloat16_matmul_are_bfloat16_matmuls(rows: int) -> None:
    narrow = jnp.bfloat16
    x_RK, w_NK = normal(rows, 24, seed=1, dtype=narrow), normal(40, 24, seed=2, dtype=narrow)
    # As from a matmul whose result is rounded to the dtype of x.
    grad_RN = normal(rows, 40, seed=3, dtype=narrow).astype(jnp.float32)
    got = product_gradients(x_RK, w_NK, grad_RN)
    want = product_gradients(x_RK.astype(jnp.float32), w_NK.astype(jnp.float32), grad_RN)
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == narrow
        # Half an ulp, and float32 sums in another order.
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)
    program = jax.jit(product_gradients).lower(x_RK, w_NK, grad_RN).as_text()
    factors = re.findall(r"dot_general .*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\)", program)
    assert len(factors) >= 2
    assert set(factors) == {("bf16", "bf16")}


def test_gradients_of_a_float32_matmul_equal_jaxs() -> None:
    x_RK, w_NK, grad_RN = normal(7, 24, seed=1), normal(40, 24, seed=2), normal(7, 40, seed=3)
    expected = jax.vjp(lambda x, w: x @ w.T, x_RK, w_NK)[1](grad_RN)
    jax.tree.map(np.testing.assert_array_equal, product_gradients(x_RK, w_NK, grad_RN), expected)
