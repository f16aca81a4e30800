"""Quantised matmuls on TPUs: interpreted against float64 sums, compiled at full size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize import tpu, tpu_codes, xla
from pallas_kernels.quantize.shapes import SHAPES
from pallas_kernels.targets import Target
from tests.kernels import interpreted
from tests.test_quantize import (
    CLOSE,
    CLOSE_BFLOAT16,
    by_group,
    every_code,
    leaf,
    stack_and_rows,
    weight,
)

CHIPS: tuple[Target, ...] = ("v5p", "v6e", "tpu7x")
FULL = [name for name in SHAPES if not name.startswith("bench")]
EXPERTS = [name for name in FULL if "expert" in name]
TWO_CORES = {"num_cores_or_threads": 2, "detect_races": True}


@pytest.fixture(params=[True, False], ids=["E4M3 chip", "E4M3B11 chip"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(tpu_codes, "has_native_e4m3", lambda: request.param)
    return request.param


def rows_of(count: int, channels: int, dtype: Any) -> Any:
    rng = np.random.default_rng(count)
    return jnp.asarray(rng.standard_normal((count, channels)), dtype)


def assert_close(y: Any, x: Any, w_NK: np.ndarray, limit: float) -> None:
    """Like `relative_error`, but some sums may consist of zeros only."""
    x64, w64_KN = np.asarray(x, np.float64), w_NK.T.astype(np.float64)
    distance = np.abs(np.asarray(y, np.float64) - x64 @ w64_KN)
    assert np.all(distance <= limit * (np.abs(x64) @ np.abs(w64_KN)))


def check(fmt: str, n: int, k: int, rows: int, dtype: Any = jnp.bfloat16, **params: Any) -> None:
    w, w_NK = weight(fmt, n, k)
    x = rows_of(rows, k, dtype)
    with interpreted(**params):
        y = jax.jit(functools.partial(quantize.linear, impl="tpu"))(x, w)
    assert y.shape == (rows, n)
    assert y.dtype == x.dtype
    assert_close(y, x, w_NK, CLOSE if dtype == jnp.float32 else CLOSE_BFLOAT16)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
@pytest.mark.parametrize("rows", [5, 150])
def test_a_layer_of_a_stack_and_groups_are_read_in_place(fmt: str, rows: int) -> None:
    stack, w_NK, x = stack_and_rows(fmt, 2, 512, 256, rows, jnp.float32)
    run = lambda x: quantize.linear(x, stack, layer=jnp.int32(2), groups=2, impl="tpu")
    with interpreted():
        y, pull = jax.vjp(jax.jit(run), x)
        (dx,) = pull(jnp.ones_like(y))
    limit = CLOSE * by_group(np.abs(x), np.abs(w_NK), 2)
    assert np.all(np.abs(y - by_group(x, w_NK, 2)) <= limit)
    columns_GK = w_NK.reshape(2, -1, 256).sum(axis=1)
    limit = CLOSE * np.abs(w_NK.reshape(2, -1, 256)).sum(axis=1).max()
    np.testing.assert_allclose(dx[0].reshape(2, -1), columns_GK, rtol=0, atol=limit)


@pytest.mark.full_compilation
@pytest.mark.parametrize("rows", [1, 1024])
@pytest.mark.parametrize("target", CHIPS)
def test_no_weight_is_copied_from_a_stack_or_for_a_group(target: Target, rows: int) -> None:
    """The grouped output projection of Flash: 8 groups, 20 layers, 33.5 MB each."""
    of = lambda *dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    stack = quantize.Fp8Weight(
        of(20, 4096, 8192, dtype=jnp.float8_e4m3fn), of(20, 32, 64, dtype=jnp.float8_e8m0fnu)
    )
    run = lambda x, stack, layer: quantize.linear(x, stack, layer=layer, groups=8)
    x, layer = of(rows, 8 * 4096, dtype=jnp.bfloat16), of(dtype=jnp.int32)
    program = targets.compiled(target, run, x, stack, layer)
    assert targets.temporaries(program) <= 2**20


@pytest.mark.parametrize(
    ("fmt", "n", "k", "rows"),
    [("fp8", 384, 256, 1), ("fp8 with float32 scales", 300, 384, 130)],
)
def test_fp8_on_either_kind_of_chip(fmt: str, n: int, k: int, rows: int, chip: bool) -> None:
    check(fmt, n, k, rows)


@pytest.mark.parametrize(("n", "k", "rows"), [(256, 512, 5), (300, 256, 20)])
def test_fp4_with_scaled_products_and_with_scaled_weights(n: int, k: int, rows: int) -> None:
    check("fp4", n, k, rows)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_several_tiles_of_k_and_of_n_in_float32(fmt: str) -> None:
    # More than a tile of 2 MB and than 2048 columns.
    check(fmt, 1100, 6144 if fmt == "fp4" else 4096, 9, jnp.float32)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_several_tiles_of_rows_reuse_the_dequantised_weights(fmt: str) -> None:
    check(fmt, 128, 2048, 1030)


@settings(max_examples=3, deadline=None)
@given(st.sampled_from(["fp8", "fp4"]), st.integers(1, 500), st.integers(1, 3), st.integers(1, 40))
def test_any_number_of_columns_and_rows(fmt: str, n: int, k: int, rows: int) -> None:
    check(fmt, n, 256 * k, rows)


@pytest.mark.parametrize(("fmt", "rows"), [("fp8", 3), ("fp4", 140)])
def test_two_cores_do_not_race(fmt: str, rows: int) -> None:
    check(fmt, 512, 256, rows, **TWO_CORES)


def test_every_e4m3_code_is_multiplied_as_its_value(chip: bool) -> None:
    codes, scale = every_code("fp8")
    assert_multiplied_as_values(leaf((codes, scale), "fp8"))


def test_every_e2m1_code_is_multiplied_as_its_value() -> None:
    assert_multiplied_as_values(leaf(every_code("fp4"), "fp4"))


def assert_multiplied_as_values(w: quantize.Fp8Weight | quantize.Fp4Weight) -> None:
    x = jnp.eye(w.shape[1], dtype=jnp.bfloat16)
    with interpreted():
        y = jax.jit(functools.partial(quantize.linear, impl="tpu"))(x, w)
    # A row of the unit matrix picks one weight, and codes are exact in bfloat16.
    np.testing.assert_array_equal(np.asarray(y), np.asarray(quantize.dense(w, jnp.bfloat16)).T)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
@pytest.mark.parametrize("impl", ["tpu", "xla", "reference"])
def test_gradient_of_x_is_that_of_the_dequantised_matrix(fmt: str, impl: Any) -> None:
    w, w_NK = weight(fmt, 128, 256)
    x, dy = rows_of(17, 256, jnp.float32), rows_of(18, 128, jnp.float32)[:17]

    def loss(x: Any) -> Any:
        return jnp.sum(quantize.linear(x, w, impl=impl) * dy)

    with interpreted():
        dx = jax.jit(jax.grad(loss))(x)
    assert_close(dx, dy, w_NK.T, CLOSE)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_gradient_in_several_strips_of_k(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "_STRIP", 100 * 256)
    w, w_NK = weight(fmt, 100, 768)
    dy = rows_of(7, 100, jnp.float32)
    assert_close(xla.linear_backward(dy, w), dy, w_NK.T, CLOSE)


def test_arrays_have_gradients_and_quantised_weights_have_none() -> None:
    x, w = rows_of(3, 64, jnp.float32), rows_of(5, 64, jnp.float32)
    dw = jax.grad(lambda w: jnp.sum(quantize.linear(x, w)))(w)
    np.testing.assert_allclose(dw, np.tile(np.asarray(x).sum(0), (5, 1)), rtol=1e-5, atol=1e-5)
    quantised, _ = weight("fp8", 128, 128)
    pulled = jax.vjp(lambda x, w: quantize.linear(x, w), rows_of(2, 128, jnp.float32), quantised)[1]
    zeros = pulled(jnp.ones((2, 128)))[1]
    assert not np.any(np.asarray(zeros.codes.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("n", "k", "fmt", "dtype"),
    [(128, 96, "fp8", "float32"), (128, 384, "fp4", "float32"), (128, 256, "fp8", "float16")],
)
def test_unsupported_arguments_are_refused_or_left_to_xla(
    n: int, k: int, fmt: str, dtype: str
) -> None:
    w, w_NK = weight(fmt, n, k)
    x = rows_of(3, k, dtype)
    with pytest.raises(Unsupported, match="takes"):
        quantize.linear(x, w, impl="tpu")
    assert_close(quantize.linear(x, w), x, w_NK, CLOSE_BFLOAT16)


def matrix(fmt: str, n: int, k: int) -> Any:
    S = jax.ShapeDtypeStruct
    if fmt == "fp4":
        return quantize.Fp4Weight(S((k // 2, n), jnp.uint8), S((k // 32, n), jnp.float8_e8m0fnu))
    scale = S((-(-k // 128), -(-n // 128)), jnp.float8_e8m0fnu)
    return quantize.Fp8Weight(S((k, n), jnp.float8_e4m3fn), scale)


def assert_compiles_without_copies(
    chip: Target, name: str, fmt: str, rows: int, *, backward: bool = False
) -> None:
    shape = SHAPES[name]
    run = tpu.linear_backward if backward else functools.partial(quantize.linear, impl="auto")
    x = jax.ShapeDtypeStruct((rows, shape.n if backward else shape.k), jnp.bfloat16)
    program = targets.compiled(chip, run, x, matrix(fmt, shape.n, shape.k))
    assert "tpu_custom_call" in (program.as_text() or "")
    # XLA's own form keeps the weight in 16 or 32 bits: 67 MB and more.
    assert targets.temporaries(program) <= 2**16


@pytest.mark.full_compilation
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("name", "rows"), [*((name, 8) for name in FULL), ("pro query", 1024), ("flash output", 1024)]
)
def test_fp8_compiles_for_every_chip(chip: Target, name: str, rows: int) -> None:
    assert_compiles_without_copies(chip, name, "fp8", rows)


@pytest.mark.full_compilation
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("rows", [1, 1024])
def test_fp4_compiles_for_every_chip(chip: Target, rows: int) -> None:
    assert_compiles_without_copies(chip, EXPERTS[-1], "fp4", rows)


@pytest.mark.full_compilation
@pytest.mark.parametrize(("chip", "rows"), [("v5p", 4096), ("v6e", 128), ("tpu7x", 4096)])
def test_other_numbers_of_rows_compile(chip: Target, rows: int) -> None:
    assert_compiles_without_copies(chip, "pro output", "fp8", rows)


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("chip", "name", "fmt"),
    [
        ("v5p", "pro output", "fp8"),
        ("v6e", "pro query", "fp8"),
        ("tpu7x", "flash query", "fp8"),
        ("v5p", "flash expert up", "fp4"),
        ("tpu7x", "pro expert up", "fp4"),
    ],
)
def test_the_gradient_of_x_compiles(chip: Target, name: str, fmt: str) -> None:
    assert_compiles_without_copies(chip, name, fmt, 1024, backward=True)
