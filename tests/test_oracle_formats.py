"""The oracle's number formats against ml_dtypes, code by code."""

import ml_dtypes
import numpy as np
import pytest

from tests.oracle import formats


def bits(x, dtype):
    return x.astype(dtype).view(np.uint8)


@pytest.mark.parametrize(
    ("decode", "dtype", "n_codes"),
    [
        (formats.decode_e4m3, ml_dtypes.float8_e4m3fn, 256),
        (formats.decode_e2m1, ml_dtypes.float4_e2m1fn, 16),
        (formats.decode_e8m0, ml_dtypes.float8_e8m0fnu, 256),
    ],
)
def test_every_code_decodes_as_in_ml_dtypes(decode, dtype, n_codes):
    codes = np.arange(n_codes, dtype=np.uint8)
    ours, theirs = decode(codes), codes.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs) & ~np.isnan(theirs))


@pytest.mark.parametrize(
    ("encode", "values", "dtype"),
    [
        (formats.encode_e4m3, formats.E4M3_VALUES, ml_dtypes.float8_e4m3fn),
        (formats.encode_e2m1, formats.E2M1_VALUES, ml_dtypes.float4_e2m1fn),
    ],
)
def test_encoders_clamp_and_round_like_ml_dtypes(encode, values, dtype):
    rng = np.random.default_rng(0)
    known = np.unique(values[~np.isnan(values)])
    ties = (known[1:] + known[:-1]) / 2
    random = rng.standard_normal(200_000) * 2.0 ** rng.integers(-14, 12, 200_000)
    x = np.concatenate([known, ties, random, [0.0, -0.0]]).astype(np.float32)
    np.testing.assert_array_equal(encode(x), bits(np.clip(x, known[0], known[-1]), dtype))
    infinite = np.array([np.inf, -np.inf])
    np.testing.assert_array_equal(values[encode(infinite)], [known[-1], known[0]])
    positive = known[known >= 0]
    above = (positive[1:] + positive[:-1]) / 2 * (1 + 1e-15)  # in float32 this would be a tie
    np.testing.assert_array_equal(values[encode(above)], positive[1:])


def test_nan_has_a_code_in_e4m3_and_is_an_error_in_e2m1():
    assert formats.encode_e4m3(np.array([np.nan]))[0] == 0x7F
    with pytest.raises(ValueError, match="NaN has no E2M1 code"):
        formats.encode_e2m1(np.array([1.0, np.nan]))


def test_matrices_dequantise_element_by_element():
    rng = np.random.default_rng(0)
    codes_OI = rng.integers(0, 0x7F, (130, 257), dtype=np.uint8)
    scale = formats.decode_e8m0(rng.integers(120, 134, (2, 3), dtype=np.uint8))
    ours = formats.dequantize_fp8(codes_OI, scale)
    packed = rng.integers(-128, 128, (3, 32), dtype=np.int8)
    row_scale = formats.decode_e8m0(rng.integers(120, 134, (3, 2), dtype=np.uint8))
    ours_fp4 = formats.dequantize_fp4(packed, row_scale)
    for o, i in ((0, 0), (127, 128), (128, 127), (129, 256)):
        assert ours[o, i] == formats.E4M3_VALUES[codes_OI[o, i]] * scale[o // 128, i // 128]
    for o, i in np.ndindex(3, 64):
        byte = int(packed[o, i // 2]) % 256
        nibble = byte % 16 if i % 2 == 0 else byte // 16
        assert ours_fp4[o, i] == formats.E2M1_VALUES[nibble] * row_scale[o, i // 32]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("quantise", "block", "floor", "largest", "code_dtype"),
    [
        (formats.fake_quant_fp8, 64, 1e-4, 448, ml_dtypes.float8_e4m3fn),
        (formats.fake_quant_fp4, 32, 6 * 2.0**-126, 6, ml_dtypes.float4_e2m1fn),
    ],
)
def test_fake_quant_rounds_to_the_least_sufficient_power_of_two(
    dtype, quantise, block, floor, largest, code_dtype
):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((400, 80)) * 2.0 ** rng.integers(-30, 9, (400, 1))).astype(np.float32)
    x[0] = 0
    x[1:3, 0] = largest * 2.0**20, np.nextafter(np.float32(largest * 2.0**20), np.float32(np.inf))
    x = x.astype(dtype)
    ours = quantise(x, block)
    assert ours.dtype == dtype
    for row, start in np.ndindex(400, -(-80 // block)):
        part = x[row, start * block : (start + 1) * block]
        amax = max(float(np.abs(part).max()), floor)
        scale = 2.0 ** next(k for k in range(-140, 40) if amax <= largest * 2.0**k)
        expected = (part / scale).astype(np.float32).astype(code_dtype).astype(np.float64) * scale
        np.testing.assert_array_equal(ours[row, start * block : (start + 1) * block], expected)
    np.testing.assert_array_equal(quantise(ours, block), ours)


def test_hadamard_is_the_orthonormal_sylvester_matrix():
    matrix = np.ones((1, 1))
    for _ in range(5):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    x, y = np.random.default_rng(0).standard_normal((2, 7, 32))
    np.testing.assert_allclose(formats.hadamard(x), x @ matrix.T / 32**0.5, atol=1e-14)
    np.testing.assert_allclose(formats.hadamard(formats.hadamard(x)), x, atol=1e-14)
    np.testing.assert_allclose(
        np.sum(formats.hadamard(x) * formats.hadamard(y), -1), np.sum(x * y, -1), atol=1e-13
    )
    with pytest.raises(ValueError, match="power of two"):
        formats.hadamard(np.ones((2, 12)))
