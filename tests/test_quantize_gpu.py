"""Quantised weights on NVIDIA GPUs: interpreted against float64 sums, compiled for H200."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize import gpu, gpu_codes
from pallas_kernels.quantize.shapes import SHAPES
from tests.gpu_kernels import interpreted
from tests.test_quantize import CLOSE_BFLOAT16, by_group, relative_error, stack_and_rows, weight
from tests.test_quantize_tpu import matrix

LINEAR = functools.partial(quantize.linear, impl="gpu")


@pytest.mark.parametrize(
    ("fmt", "n", "k", "rows", "blocks"),
    [
        ("fp8", 256, 1024, 5, 264),  # parts of one tile each
        ("fp8 with float32 scales", 128, 640, 70, 1),  # more tiles than are in flight
        ("fp8", 256, 256, 150, 264),
        ("fp4", 256, 1024, 5, 264),
        ("fp4", 128, 320, 70, 1),
        ("fp4", 128, 768, 5, 2),  # two parts of six tiles
        ("fp4", 256, 128, 150, 264),
    ],
)
def test_rows_times_dequantised_weights(
    fmt: str, n: int, k: int, rows: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most `blocks` thread blocks share K when there are few columns."""
    monkeypatch.setattr(gpu, "_BLOCKS", blocks)
    w, w_NK = weight(fmt, n, k)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, k)), jnp.bfloat16)
    with interpreted():
        y = jax.block_until_ready(jax.jit(LINEAR)(x, w))
    assert y.shape == (rows, n)
    assert relative_error(y, x, w_NK) < CLOSE_BFLOAT16


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_a_layer_of_a_stack_and_groups_are_read_in_place(fmt: str) -> None:
    stack, w_NK, x = stack_and_rows(fmt, 2, 256, 256, 5, jnp.bfloat16)
    run = lambda x: LINEAR(x, stack, layer=jnp.int32(2), groups=2)
    with interpreted():
        y = jax.block_until_ready(jax.jit(run)(x))
    limit = CLOSE_BFLOAT16 * by_group(np.abs(x), np.abs(w_NK), 2)
    assert np.all(np.abs(np.asarray(y, np.float64) - by_group(x, w_NK, 2)) <= limit)


def test_four_bit_codes_are_decoded() -> None:
    actual = np.asarray(gpu_codes.e2m1(jnp.arange(16, dtype=jnp.int32)))
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    np.testing.assert_array_equal(actual, np.concatenate([sizes, -sizes]))


def test_exponents_are_decoded_to_powers_of_two() -> None:
    exponent = np.arange(1, 255, dtype=np.uint8)
    actual = np.asarray(gpu_codes.power_of_two(jnp.asarray(exponent)))
    np.testing.assert_array_equal(actual, 2.0 ** (exponent.astype(np.float32) - 127))


def test_gradient_of_x_uses_xla() -> None:
    w, w_NK = weight("fp8", 128, 256)
    gradient = lambda x: jax.grad(lambda x: jnp.sum(quantize.linear(x, w)))(x)
    x = jnp.ones((2, 256), jnp.float32)
    np.testing.assert_allclose(gradient(x)[0], w_NK.sum(axis=0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("fmt", "n", "k"), [("fp4", 128, 96), ("fp4", 64, 128), ("fp8", 100, 128)])
def test_unsupported_shapes_are_refused(fmt: str, n: int, k: int) -> None:
    with pytest.raises(Unsupported, match="takes"):
        LINEAR(jnp.ones((1, k), jnp.bfloat16), weight(fmt, n, k)[0])


def compiled(fmt: str, n: int, k: int, rows: int) -> Any:
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    program = targets.compiled("h200", quantize.linear, x, matrix(fmt, n, k))
    assert "mosaic_gpu" in (program.as_text() or "")
    return program


@pytest.mark.full_compilation
@pytest.mark.parametrize("name", ["flash query", "flash output", "pro output"])
@pytest.mark.parametrize("rows", [8, 1024])
def test_fp8_compiles_for_h200(name: str, rows: int) -> None:
    program = compiled("fp8", SHAPES[name].n, SHAPES[name].k, rows)
    # Sums of parts of K, at most; XLA's own form keeps the weight in 16 bits, or sums per block.
    assert targets.temporaries(program) <= 2**21


@pytest.mark.full_compilation
@pytest.mark.parametrize("name", ["flash expert up", "flash output", "pro output"])
@pytest.mark.parametrize("rows", [8, 4096])
def test_fp4_compiles_for_h200(name: str, rows: int) -> None:
    program = compiled("fp4", SHAPES[name].n, SHAPES[name].k, rows)
    # XLA's own form keeps the weight in 16 bits.
    assert targets.temporaries(program) <= (2**20 if rows == 8 else 0)


@pytest.mark.full_compilation
@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_no_layer_of_a_stack_is_copied_on_h200(fmt: str) -> None:
    S, N, K, G, L = jax.ShapeDtypeStruct, 8192, 4096, 8, 3
    stack = jax.tree.map(lambda part: S((L, *part.shape), part.dtype), matrix(fmt, N, K))
    run = lambda x, stack, layer: quantize.linear(x, stack, layer=layer, groups=G)
    structs = S((4096, G * K), jnp.bfloat16), stack, S((), jnp.int32)
    program = targets.compiled("h200", run, *structs)
    assert "mosaic_gpu" in (program.as_text() or "")
    assert targets.temporaries(program) <= 2**13  # scales of FP8 in float32
