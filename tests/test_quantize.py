"""Rounding, codecs and matmuls of quantised formats, against ml_dtypes and float64 NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import quantize
from pallas_kernels.quantize.shapes import SHAPES

E4M3, E2M1, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu
FORMATS = {"fp8": (E4M3, 448.0), "fp4": (E2M1, 6.0)}
FORMS = ("reference", "xla")
LINEAR = jax.jit(quantize.linear, static_argnames=("precision", "impl"))
# A sum of K products, relative to the largest: float32 rounds each by 2^-24 at most.
CLOSE = 2e-6
# bfloat16 rounds by 2^-8: the result, and the weights if their scale is not a power of two.
CLOSE_BFLOAT16 = 2 * 2.0**-8
examples = settings(max_examples=25, deadline=None)


def fake_quant(x: Any, fmt: str, block: int) -> np.ndarray:
    run = quantize.fake_quant_fp8 if fmt == "fp8" else quantize.fake_quant_fp4
    return np.asarray(run(jnp.asarray(x), block=block))


def power_of_two_at_least(x: np.ndarray) -> np.ndarray:
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(1.0, exponent - (fraction == 0.5))


def expected(x: np.ndarray, fmt: str, block: int) -> np.ndarray:
    """Block by block: scaled in float32, then rounded by ml_dtypes."""
    dtype, largest = FORMATS[fmt]
    floor = np.float32(1e-4) if fmt == "fp8" else np.float32(6 * 2.0**-126)
    out = np.empty(x.shape, np.float32)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block].astype(np.float32)
        amax = np.maximum(np.abs(part).max(axis=-1, keepdims=True), floor)
        scale = power_of_two_at_least(amax.astype(np.float64) / largest)
        scaled = np.clip(part / scale, -largest, largest).astype(np.float32)
        out[..., start : start + block] = scaled.astype(dtype).astype(np.float32) * scale
    return out.astype(x.dtype)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def beside_largest(x: np.ndarray, fmt: str) -> np.ndarray:
    """Each value in a block with the format's largest value, so that its scale is 1."""
    return np.stack([x, np.full_like(x, FORMATS[fmt][1])], axis=-1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_bfloat16_is_rounded_as_by_ml_dtypes(fmt: str) -> None:
    x = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16)
    # Subnormal numbers and scales are flushed to zero by devices; below 2^120 no product overflows.
    size = np.abs(x.astype(np.float32))
    x = x[(size == 0) | (size >= 2.0**-100) & (size < 2.0**120)]
    alone, beside = x[:, None], beside_largest(x[np.abs(x) <= FORMATS[fmt][1]], fmt)
    assert_same_bits(fake_quant(alone, fmt, 1), expected(alone, fmt, 1))
    assert_same_bits(fake_quant(beside, fmt, 2), expected(beside, fmt, 2))


@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_go_to_even_and_their_neighbours_do_not(fmt: str) -> None:
    dtype, largest = FORMATS[fmt]
    codes = np.arange(2**8 if fmt == "fp8" else 2**4, dtype=np.uint8).view(dtype)
    values = np.unique(codes.astype(np.float32)[np.isfinite(codes.astype(np.float32))])
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate(
        [
            values,
            ties,
            np.nextafter(ties, np.float32(-np.inf)),
            np.nextafter(ties, np.float32(np.inf)),
        ]
    )
    x = x[np.abs(x) <= largest]
    beside = beside_largest(x, fmt)
    assert_same_bits(fake_quant(beside, fmt, 2), expected(beside, fmt, 2))


@pytest.mark.parametrize("fmt", FORMATS)
def test_scale_steps_exactly_where_amax_passes_a_power_of_two_times_the_largest(fmt: str) -> None:
    at = np.ldexp(FORMATS[fmt][1], np.arange(-20, 100)).astype(np.float32)
    amax = np.concatenate(
        [at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(0))]
    )
    x = np.stack([amax, -amax / 3, amax / 100], axis=-1)
    assert_same_bits(fake_quant(x, fmt, 3), expected(x, fmt, 3))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("channels", "block"), [(1, 1), (64, 32), (70, 32), (7, 3), (33, 40)])
def test_any_block_length_is_rounded_block_by_block(fmt: str, channels: int, block: int) -> None:
    rng = np.random.default_rng(0)
    size = np.exp2(rng.integers(-30, 30, (20, 30, channels)))
    x = (rng.standard_normal(size.shape) * size).astype(np.float32)
    assert_same_bits(fake_quant(x, fmt, block), expected(x, fmt, block))


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_stay_zeros_and_rounding_is_idempotent(fmt: str) -> None:
    assert not fake_quant(np.zeros((2, 64), np.float32), fmt, 32).any()
    once = fake_quant(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32), fmt, 32)
    assert_same_bits(fake_quant(once, fmt, 32), once)


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradient_passes_straight_through(fmt: str) -> None:
    run = quantize.fake_quant_fp8 if fmt == "fp8" else quantize.fake_quant_fp4
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal((3, 40)), jnp.float32) for _ in range(2))
    loss = lambda x: jnp.sum(jnp.square(run(x, block=32)) * weight)
    rounded = run(x, block=32)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), 2 * rounded * weight)
    rows = jax.vmap(lambda x: run(x, block=32))(x)
    np.testing.assert_array_equal(rows, rounded)


@pytest.mark.parametrize("n", [1, 2, 64, 128])
def test_hadamard_is_the_recursive_matrix_and_its_own_inverse(n: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = np.random.default_rng(0).standard_normal((2, 3, n)).astype(np.float32)
    y = quantize.hadamard(jnp.asarray(x))
    np.testing.assert_allclose(y, x @ matrix / np.sqrt(n), atol=CLOSE * n)
    np.testing.assert_allclose(quantize.hadamard(y), x, atol=CLOSE * n)


def test_hadamard_keeps_the_dtype_and_is_its_own_derivative() -> None:
    assert quantize.hadamard(jnp.ones((2, 8), jnp.bfloat16)).dtype == jnp.bfloat16
    x, tangent = jnp.arange(8.0), jnp.arange(8.0)[::-1]
    _, derivative = jax.jvp(quantize.hadamard, (x,), (tangent,))
    np.testing.assert_array_equal(derivative, quantize.hadamard(tangent))


@pytest.mark.parametrize("channels", [0, 3, 96])
def test_hadamard_refuses_sizes_that_are_not_powers_of_two(channels: int) -> None:
    with pytest.raises(ValueError, match=f"{channels} channels.*power of two"):
        quantize.hadamard(jnp.zeros((2, channels)))


def assert_lossless(repack: Any, undo: Any, *arrays: np.ndarray) -> None:
    for array, returned in zip(arrays, undo(*repack(*arrays)), strict=True):
        assert_same_bits(returned, array)


def bytes_of(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint8, shape)


stack_of_matrices = st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 5))


@examples
@given(st.data(), stack_of_matrices, stack_of_matrices)
def test_fp8_repacking_is_lossless(data: st.DataObject, shape: Any, scale_shape: Any) -> None:
    weight = data.draw(bytes_of(*shape)).view(E4M3)
    scale = data.draw(bytes_of(shape[0], *scale_shape[1:]))
    for dtype in (E8M0, np.float32):
        arrays = weight, np.repeat(scale, np.dtype(dtype).itemsize, axis=-1).view(dtype)
        assert_lossless(quantize.fp8_from_checkpoint, quantize.fp8_to_checkpoint, *arrays)
        assert_lossless(quantize.fp8_to_checkpoint, quantize.fp8_from_checkpoint, *arrays)


@examples
@given(st.data(), stack_of_matrices)
def test_fp4_repacking_is_lossless(data: st.DataObject, shape: Any) -> None:
    stack, n, blocks = shape
    packed = data.draw(bytes_of(stack, n, 16 * blocks)).view(np.int8)
    scale = data.draw(bytes_of(stack, n, blocks)).view(E8M0)
    assert_lossless(quantize.fp4_from_checkpoint, quantize.fp4_to_checkpoint, packed, scale)
    codes, scale = (np.swapaxes(x, -1, -2).copy() for x in (packed.view(np.uint8), scale))
    assert_lossless(quantize.fp4_to_checkpoint, quantize.fp4_from_checkpoint, codes, scale)


def test_fp4_blocks_are_stored_as_two_halves() -> None:
    elements_NK = np.random.default_rng(0).integers(0, 16, (3, 64)).astype(np.uint8)
    packed_NJ = (elements_NK[:, 0::2] | elements_NK[:, 1::2] << 4).view(np.int8)
    scale_Nk = np.full((3, 2), 127, np.uint8).view(E8M0)
    codes_JN, _ = quantize.fp4_from_checkpoint(packed_NJ, scale_Nk)
    for b, r in np.ndindex(2, 16):
        low, high = elements_NK[:, 32 * b + r], elements_NK[:, 32 * b + 16 + r]
        np.testing.assert_array_equal(codes_JN[16 * b + r], low | high << 4)


def stored(w_NK: np.ndarray, fmt: str) -> tuple[np.ndarray, np.ndarray]:
    return (quantize.encode_fp8_blocks if fmt == "fp8" else quantize.encode_fp4_blocks)(w_NK)


def decoded(stored: tuple[np.ndarray, np.ndarray], fmt: str) -> np.ndarray:
    return (quantize.decode_fp8_blocks if fmt == "fp8" else quantize.decode_fp4_blocks)(*stored)


def leaf(stored: tuple[np.ndarray, np.ndarray], fmt: str) -> Any:
    if fmt == "fp8":
        return quantize.Fp8Weight(*map(jnp.asarray, quantize.fp8_from_checkpoint(*stored)))
    return quantize.Fp4Weight(*map(jnp.asarray, quantize.fp4_from_checkpoint(*stored)))


def random_matrix(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Rows and columns of very different magnitudes, so that every scale differs."""
    rng = np.random.default_rng(seed)
    size = np.exp2(rng.integers(-6, 6, (n, 1)) + rng.integers(-6, 6, (1, k)))
    return (rng.standard_normal((n, k)) * size).astype(np.float32)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (130, 288), (256, 128)])
def test_encoding_rounds_each_block(fmt: str, n: int, k: int) -> None:
    w_NK = random_matrix(n, k)
    actual = decoded(stored(w_NK, fmt), fmt)
    if fmt == "fp4":
        np.testing.assert_array_equal(actual, expected(w_NK, "fp4", 32))
        return
    for i, j in np.ndindex(-(-n // 128), -(-k // 128)):
        at = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        block = w_NK[at].reshape(1, -1)
        np.testing.assert_array_equal(actual[at].reshape(1, -1), expected(block, "fp8", block.size))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_encoding_again_changes_no_value(fmt: str, seed: int) -> None:
    once = decoded(stored(random_matrix(140, 160, seed), fmt), fmt)
    np.testing.assert_array_equal(decoded(stored(once, fmt), fmt), once)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_blocks_encode_to_zeros_with_a_finite_scale(fmt: str) -> None:
    codes, scale = stored(np.zeros((128, 128), np.float32), fmt)
    assert not codes.view(np.uint8).any()
    assert np.isfinite(scale.astype(np.float32)).all()


def test_encoding_fp4_refuses_a_partial_block() -> None:
    with pytest.raises(ValueError, match="blocks of 32; these have 40"):
        quantize.encode_fp4_blocks(np.zeros((2, 40), np.float32))


def every_code(fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """A stored matrix with every byte and many scales; NaN codes replaced by zero."""
    rng = np.random.default_rng(0)
    byte = rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (160, 1)), axis=1)
    if fmt == "fp4":
        scale = rng.integers(60, 190, (160, 16)).astype(np.uint8)
        return byte.view(np.int8), scale.view(E8M0)
    byte = np.where(byte & 0x7F == 0x7F, 0, byte).astype(np.uint8)
    return byte.view(E4M3), rng.integers(60, 190, (2, 2)).astype(np.uint8).view(E8M0)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_is_dequantised_exactly(fmt: str, dtype: Any) -> None:
    matrix = every_code(fmt)
    w = leaf(matrix, fmt)
    values = decoded(matrix, fmt)
    assert w.shape == values.shape
    actual = jax.jit(quantize.dense, static_argnums=1)(w, jnp.dtype(dtype))
    # All codes have few enough mantissa bits for bfloat16.
    np.testing.assert_array_equal(np.asarray(actual.astype(jnp.float32)), values)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stack_is_dequantised_like_its_matrices(fmt: str) -> None:
    matrices = [stored(random_matrix(140, 160, seed), fmt) for seed in range(3)]
    leaves = [leaf(matrix, fmt) for matrix in matrices]
    w = jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)
    assert w.shape == (3, 140, 160)
    stacked = quantize.dense(w, jnp.float32)
    for actual, matrix in zip(stacked, matrices, strict=True):
        np.testing.assert_array_equal(actual, decoded(matrix, fmt))


def relative_error(y: Any, x: Any, w_NK: np.ndarray) -> float:
    exact = np.asarray(x, np.float64) @ w_NK.astype(np.float64).T
    largest = np.abs(np.asarray(x, np.float64)) @ np.abs(w_NK.astype(np.float64)).T
    return float(np.max(np.abs(np.asarray(y, np.float64) - exact) / largest))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("fmt", [*FORMATS, "fp8 with float32 scales", "dense"])
@pytest.mark.parametrize(("n", "k"), [(257, 96), (100, 288), (1, 32)])
@pytest.mark.parametrize("rows", [(), (2, 3), (130,)])
def test_linear_equals_a_matmul_after_dequantisation(
    impl: str, fmt: str, n: int, k: int, rows: tuple[int, ...]
) -> None:
    w, w_NK = weight(fmt, n, k)
    x = np.random.default_rng(1).standard_normal((*rows, k)).astype(np.float32)
    y = LINEAR(jnp.asarray(x), w, impl=impl)
    assert y.shape == (*rows, n)
    assert relative_error(y, x, w_NK) < CLOSE


@functools.lru_cache
def weight(fmt: str, n: int, k: int) -> tuple[Any, np.ndarray]:
    w_NK = random_matrix(n, k)
    if fmt == "dense":
        return jnp.asarray(w_NK), w_NK
    codes, scale = stored(w_NK, fmt[:3])
    if fmt == "fp8 with float32 scales":
        scale = (scale.astype(np.float32) * np.float32(1.3)).astype(np.float32)
    return leaf((codes, scale), fmt[:3]), decoded((codes, scale), fmt[:3])


@pytest.mark.parametrize("fmt", [*FORMATS, "fp8 with float32 scales"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 80])
def test_linear_in_bfloat16_at_the_models_shapes(fmt: str, name: str, rows: int) -> None:
    shape = SHAPES[name].divided(16)
    w, w_NK = weight(fmt, shape.n, shape.k)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, shape.k)), jnp.bfloat16)
    y = LINEAR(x, w)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, x, w_NK) < CLOSE_BFLOAT16


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [4, 80])
def test_linear_differentiates_its_input_through_quantised_weights(fmt: str, rows: int) -> None:
    w, w_NK = weight(fmt, 100, 96)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 96)), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(quantize.linear(x, w)))(x)
    np.testing.assert_allclose(
        gradient[0], w_NK.sum(axis=0), rtol=0, atol=CLOSE * np.abs(w_NK).sum(axis=0).max()
    )


def stack_and_rows(
    fmt: str, groups: int, n: int, k: int, rows: int, dtype: Any
) -> tuple[Any, np.ndarray, Any]:
    """A stack of three matrices, the values of the last, and rows for its groups."""
    w, w_NK = weight(fmt, n, k)
    stack = jax.tree.map(lambda part: jnp.stack([jnp.zeros_like(part)] * 2 + [part]), w)
    x = np.random.default_rng(2).standard_normal((rows, groups * k))
    return stack, w_NK, jnp.asarray(x, dtype)


def by_group(x: Any, w_NK: np.ndarray, groups: int) -> np.ndarray:
    """Each group of outputs from its own channels, in float64."""
    x_RGK = np.asarray(x, np.float64).reshape(len(x), groups, -1)
    w_GNK = w_NK.astype(np.float64).reshape(groups, -1, w_NK.shape[1])
    return np.einsum("rgk,gnk->rgn", x_RGK, w_GNK).reshape(len(x), -1)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("fmt", [*FORMATS, "dense"])
@pytest.mark.parametrize(("groups", "n", "rows"), [(1, 100, 3), (2, 256, 90), (4, 100, 3)])
def test_linear_takes_a_layer_of_a_stack_and_groups_of_channels(
    impl: Any, fmt: str, groups: int, n: int, rows: int
) -> None:
    stack, w_NK, x = stack_and_rows(fmt, groups, n, 96, rows, jnp.float32)
    run = lambda x: quantize.linear(x, stack, layer=jnp.int32(2), groups=groups, impl=impl)
    limit = CLOSE * by_group(np.abs(x), np.abs(w_NK), groups)
    assert np.all(np.abs(run(x) - by_group(x, w_NK, groups)) <= limit)
    gradient = jax.grad(lambda x: jnp.sum(run(x)))(x)[0].reshape(groups, -1)
    w_GNK = w_NK.reshape(groups, -1, 96)
    limit = CLOSE * np.abs(w_GNK).sum(axis=1).max()
    np.testing.assert_allclose(gradient, w_GNK.sum(axis=1), rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 2}, "x has 96 channels; 2 groups of a matrix of 100 x 96 take 192"),
        ({"layer": jnp.int32(0)}, "must be a stack of matrices"),
    ],
)
def test_groups_and_layers_that_do_not_fit_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize.linear(jnp.ones((2, 96)), weight("fp8", 100, 96)[0], **settings)


def test_an_unknown_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotImplementedError, match=r"'gpu' form; pass one of \['auto', 'reference'"):
        quantize.hadamard(jnp.ones((1, 2)), impl="gpu")
