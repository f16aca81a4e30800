"""Rotary embedding: the TPU kernel equals the reference, and every chip reads the heads once.

Axis letters: B batch, T tokens, H heads, K head dim, Q rotary pairs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rotary, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.rotary import Norm, reference
from tests.kernels import interpreted

NORMS = [None, Norm(1e-6, float32=True), Norm(1e-6, float32=False)]
HEADS = {"flash": (64, 512), "pro": (128, 512), "index": (64, 128)}


def inputs(B: int, T: int, H: int, K: int, Q: int, dtype: Any) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    angle_BTQ = rng.uniform(0, 7, (B, T, Q)).astype(np.float32)
    x_BTHK = jnp.asarray(rng.normal(size=(B, T, H, K)), dtype)
    return x_BTHK, jnp.cos(angle_BTQ), jnp.sin(angle_BTQ)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "Q", "dtype"),
    [(2, 67, 64, 256, 32, jnp.bfloat16), (1, 64, 12, 128, 64, jnp.float32)],
)
def test_the_kernel_equals_the_reference(
    B: int, T: int, H: int, K: int, Q: int, dtype: Any, norm: Norm | None
) -> None:
    args = inputs(B, T, H, K, Q, dtype)
    with interpreted():
        actual = jax.jit(functools.partial(rotary.rotate, norm=norm, impl="tpu"))(*args)
    # Operation by operation: a compiler may leave out roundings to bfloat16 between them.
    expected = reference.rotate(*args, norm=norm)
    assert actual.dtype == dtype
    # Sums of two products may round to the adjacent number. The interpreted kernel is compiled too
    # and may lose the rounding of squares, which moves some heads' norms to the adjacent number.
    ulp = {jnp.bfloat16: 2.0**-7, jnp.float32: 2.0**-22}[dtype]
    as64 = lambda x: np.asarray(x, np.float64)
    np.testing.assert_allclose(as64(actual), as64(expected), rtol=ulp, atol=4 * ulp)
    if dtype == jnp.bfloat16:
        exact_squares = norm is None or norm.float32
        assert np.mean(as64(actual) != as64(expected)) < (1e-3 if exact_squares else 3e-2)


def test_two_cores_do_not_race() -> None:
    args = inputs(1, 130, 8, 128, 32, jnp.bfloat16)
    with interpreted(detect_races=True, num_cores_or_threads=2):
        jax.block_until_ready(jax.jit(functools.partial(rotary.rotate, impl="tpu"))(*args))


@pytest.mark.parametrize("norm", NORMS[:2])
def test_gradients_match_the_reference(norm: Norm | None) -> None:
    args = inputs(1, 3, 2, 8, 2, jnp.float32)
    loss = lambda run: lambda *args: jnp.sum(jnp.cos(run(*args, norm=norm)))
    for run in (rotary.rotate, functools.partial(rotary.rotate, impl="reference")):
        ours = jax.grad(loss(run), (0, 1, 2))(*args)
        theirs = jax.grad(loss(reference.rotate), (0, 1, 2))(*args)
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.full_compilation
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("target", targets.TPU_TOPOLOGIES)
def test_tpus_read_and_write_the_heads_once(target: Any, name: str) -> None:
    H, K = HEADS[name]
    heads = jax.ShapeDtypeStruct((1, 8192, H, K), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 8192, 32), jnp.float32)
    run = functools.partial(rotary.rotate, norm=NORMS[2])
    program = targets.compiled(target, run, heads, table, table)
    assert "tpu_custom_call" in (program.as_text() or "")
    # A copy of both tables, spread over 128 lanes.
    assert targets.temporaries(program) <= 2**24
    cost = program.cost_analysis()
    assert cost is not None
    assert cost["bytes accessed"] <= 2 * heads.size * 2 + 2**27


@pytest.mark.full_compilation
def test_gpus_keep_one_copy_of_the_heads() -> None:
    heads = jax.ShapeDtypeStruct((1, 4096, 64, 512), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 4096, 32), jnp.float32)
    program = targets.compiled(
        "h200", functools.partial(rotary.rotate, norm=NORMS[2]), *(heads, table, table)
    )
    assert targets.temporaries(program) <= heads.size * 2 + 2**24


@pytest.mark.parametrize(("T", "H", "K"), [(64, 8, 64), (63, 8, 128), (64, 1, 128)])
def test_unsupported_shapes_are_refused_or_left_to_xla(T: int, H: int, K: int) -> None:
    args = inputs(1, T, H, K, 8, jnp.float32)
    with pytest.raises(Unsupported, match=r"The TPU kernel takes .*, not "):
        rotary.rotate(*args, impl="tpu")
    assert rotary.rotate(*args).shape == args[0].shape
