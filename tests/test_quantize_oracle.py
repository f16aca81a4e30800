"""Rounding and formats of the ops against the oracle's tables, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from tests.oracle import formats


def values(seed: int, *shape: int) -> np.ndarray:
    """Float32 values of many magnitudes, with zeros, ties and the largest codes among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(rng.integers(-20, 20, shape))
    x.flat[::7] = 0.0
    x.flat[3::11] = rng.choice([448.0, 464.0, 2.0**-9, 6.0, 2.5, 0.25, -3.5], x.flat[3::11].shape)
    return x.astype(np.float32)


@pytest.mark.parametrize("channels", [64, 96, 448, 20])
def test_fp8_rounding_is_bit_exact(channels: int) -> None:
    x = values(channels, 500, channels)
    actual = np.asarray(quantize.fake_quant_fp8(jnp.asarray(x), block=64))
    np.testing.assert_array_equal(actual, formats.fake_quant_fp8(x, 64).astype(np.float32))


@pytest.mark.parametrize("channels", [32, 128, 40])
def test_fp4_rounding_is_bit_exact(channels: int) -> None:
    x = values(channels, 500, channels)
    actual = np.asarray(quantize.fake_quant_fp4(jnp.asarray(x), block=32))
    np.testing.assert_array_equal(actual, formats.fake_quant_fp4(x, 32).astype(np.float32))


def test_hadamard_equals_the_oracle() -> None:
    x = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    actual = np.asarray(quantize.hadamard(jnp.asarray(x)))
    # Sums of 128 float32 terms.
    np.testing.assert_allclose(actual, formats.hadamard(x.astype(np.float64)), rtol=1e-5, atol=1e-5)


def test_hadamard_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        quantize.hadamard(jnp.ones((2, 96)))


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (130, 129), (7, 384)])
def test_fp8_weights_represent_the_checkpoints_values(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    codes, scale = quantize.encode_fp8_blocks(rng.normal(size=(rows, columns)).astype(np.float32))
    floats = formats.decode_e8m0(scale.view(np.uint8))
    expected = formats.dequantize_fp8(codes.view(np.uint8), floats)
    parts = quantize.fp8_from_checkpoint(codes, scale)
    weight = quantize.Fp8Weight(*map(jnp.asarray, parts))
    np.testing.assert_array_equal(np.asarray(quantize.dense(weight, jnp.float32)), expected)
    restored = quantize.fp8_to_checkpoint(*parts)
    assert restored[0].tobytes() == codes.tobytes()
    assert restored[1].tobytes() == scale.tobytes()


def test_fp4_weights_represent_the_checkpoints_values_for_every_byte() -> None:
    rng = np.random.default_rng(1)
    packed = (
        rng.permutation(np.tile(np.arange(256, dtype=np.uint8), 4)).reshape(16, 64).view(np.int8)
    )
    scale = rng.integers(100, 150, (16, 4), np.uint8)
    expected = formats.dequantize_fp4(packed.view(np.uint8), formats.decode_e8m0(scale))
    parts = quantize.fp4_from_checkpoint(packed, scale.view(jnp.float8_e8m0fnu.dtype))
    weight = quantize.Fp4Weight(*map(jnp.asarray, parts))
    np.testing.assert_array_equal(np.asarray(quantize.dense(weight, jnp.float32)), expected)
    assert quantize.fp4_to_checkpoint(*parts)[0].tobytes() == packed.tobytes()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_a_matmul_with_codes_equals_the_matmul_with_their_values(fmt: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    w_NK = rng.normal(size=(96, 256)).astype(np.float32)
    if fmt == "fp8":
        parts = quantize.fp8_from_checkpoint(*quantize.encode_fp8_blocks(w_NK))
        weight = quantize.Fp8Weight(*map(jnp.asarray, parts))
    else:
        parts = quantize.fp4_from_checkpoint(*quantize.encode_fp4_blocks(w_NK))
        weight = quantize.Fp4Weight(*map(jnp.asarray, parts))
    x_RK = jnp.asarray(rng.normal(size=(rows, 256)), jnp.float32)
    expected = np.asarray(x_RK, np.float64) @ np.asarray(quantize.dense(weight, jnp.float32)).T
    for impl in ("xla", "reference"):
        # Sums of 256 float32 products.
        np.testing.assert_allclose(
            quantize.linear(x_RK, weight, impl=impl), expected, rtol=1e-5, atol=1e-4
        )
