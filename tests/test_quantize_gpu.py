"""Matmuls with FP8 weights on NVIDIA GPUs: interpreted against float64 sums, compiled for H200."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize.shapes import SHAPES
from tests.gpu_kernels import interpreted
from tests.test_quantize import CLOSE_BFLOAT16, by_group, relative_error, stack_and_rows, weight
from tests.test_quantize_tpu import matrix

LINEAR = functools.partial(quantize.linear, impl="gpu")


def check(form: str, n: int, k: int, rows: int) -> None:
    w, w_NK = weight(form, n, k)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, k)), jnp.bfloat16)
    with interpreted():
        y = jax.block_until_ready(jax.jit(LINEAR)(x, w))
    assert y.shape == (rows, n)
    assert relative_error(y, x, w_NK) < CLOSE_BFLOAT16


@pytest.mark.parametrize(
    ("form", "n", "k", "rows"),
    [
        ("fp8", 256, 1024, 5),  # in parts of one tile
        ("fp8 with float32 scales", 128, 640, 70),  # more tiles than are under way
        ("fp8", 256, 256, 150),
    ],
)
def test_rows_times_dequantised_weights(form: str, n: int, k: int, rows: int) -> None:
    check(form, n, k, rows)


def test_a_layer_of_a_stack_and_groups_are_read_where_they_lie() -> None:
    stack, w_NK, x = stack_and_rows("fp8", 2, 256, 256, 5, jnp.bfloat16)
    run = lambda x: LINEAR(x, stack, layer=jnp.int32(2), groups=2)
    with interpreted():
        y = jax.block_until_ready(jax.jit(run)(x))
    limit = CLOSE_BFLOAT16 * by_group(np.abs(x), np.abs(w_NK), 2)
    assert np.all(np.abs(np.asarray(y, np.float64) - by_group(x, w_NK, 2)) <= limit)


def test_gradient_of_x_is_xlas() -> None:
    w, w_NK = weight("fp8", 128, 256)
    gradient = lambda x: jax.grad(lambda x: jnp.sum(quantize.linear(x, w)))(x)
    x = jnp.ones((2, 256), jnp.float32)
    np.testing.assert_allclose(gradient(x)[0], w_NK.sum(axis=0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("form", "n", "k"), [("fp4", 128, 128), ("fp8", 100, 128)])
def test_what_the_kernel_does_not_take_is_refused(form: str, n: int, k: int) -> None:
    with pytest.raises(Unsupported, match="takes"):
        LINEAR(jnp.ones((1, k), jnp.bfloat16), weight(form, n, k)[0])


@pytest.mark.parametrize("name", ["flash query", "flash output", "pro output"])
@pytest.mark.parametrize("rows", [8, 1024])
def test_fp8_compiles_for_h200(name: str, rows: int) -> None:
    shape = SHAPES[name]
    x = jax.ShapeDtypeStruct((rows, shape.k), jnp.bfloat16)
    w = matrix("fp8", shape.n, shape.k)
    program = targets.compiled("h200", quantize.linear, x, w)
    assert "mosaic_gpu" in (program.as_text() or "")
    # Sums of parts of K, at most; XLA's own form keeps the weight in 16 bits, or sums per block.
    assert targets.temporaries(program) <= 2**21
