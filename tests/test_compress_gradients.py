"""Gradients of compression equal those of the reference, straight through rounding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compress, targets
from pallas_kernels.compress import reference
from pallas_kernels.compress.shapes import SHAPES
from tests.test_compress import chunk, settings, steps, text


def gradients(run: Any, args: list[Any], floats: tuple[int, ...]) -> Any:
    def loss(*args: Any) -> Any:
        out = run(*args)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weight)

    return jax.jit(jax.grad(loss, floats))(*args)


def close(got: Any, expected: Any) -> None:
    """Equal but for rounding: the same sums in separately compiled programs."""
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["hca", "index"])
def test_gradients_of_a_chunk_and_of_a_step(name: str) -> None:
    shape = SHAPES[f"bench {name}"]
    inputs, static = text(shape, 2, 3 * shape.ratio), settings(shape)
    cases = (
        (
            "prefill",
            chunk(shape, inputs, [0, shape.ratio + 1], 2 * shape.ratio - 1),
            (0, 1, 3, 4, 5),
        ),
        ("decode", steps(shape, inputs, [-1, 2]), (0, 3, 4, 5)),
    )
    for op, args, floats in cases:
        args = jax.tree.map(lambda x: jnp.nan_to_num(x), args)
        got, expected = (
            gradients(functools.partial(getattr(form, op), **static), args, floats)
            for form in (compress, reference)
        )
        close(got, expected)


def test_gradients_pass_straight_through_the_rounding() -> None:
    shape = SHAPES["bench csa"]
    args = chunk(shape, text(shape, 1, 12), [0], 12)
    rounded, plain = (
        gradients(
            functools.partial(compress.prefill, **settings(shape, rounding=rounding)), args, (0, 3)
        )
        for rounding in ("fp8", "none")
    )
    close(rounded, plain)


def test_gradients_of_pooling() -> None:
    shape = SHAPES["bench csa"]
    rows_BTC, *_, bias_MC, _, _ = chunk(shape, text(shape, 1, 12), [0], 12)
    args = [*jnp.split(rows_BTC, 2, axis=-1), bias_MC, jnp.array([3], jnp.int32)]
    got, expected = (
        gradients(functools.partial(form.pool, overlap=2), args, (0, 1, 2))
        for form in (compress, reference)
    )
    close(got, expected)


@pytest.mark.full_compilation
def test_gradients_compile_with_the_forward_kernel() -> None:
    shape = SHAPES["flash index"]
    run = functools.partial(compress.prefill, **settings(shape, jnp.bfloat16))
    loss = lambda *args: jnp.sum(run(*args).astype(jnp.float32))
    args = jax.eval_shape(lambda args: args, chunk(shape, text(shape, 1, 64), [0], 64))
    program = targets.compiled("v6e", jax.value_and_grad(loss, (0, 3, 4)), *args)
    assert (program.as_text() or "").count('custom_call_target="tpu_custom_call"') == 1
