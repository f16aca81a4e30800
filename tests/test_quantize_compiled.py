"""Rounding on accelerators: interpreted TPU kernels bit for bit, and what compilers need for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.targets import Target
from tests.kernels import interpreted
from tests.test_quantize import assert_same_bits
from tests.test_quantize_oracle import values
from v4jax.model import layers

CHIPS: tuple[Target, ...] = ("v5p", "v6e", "tpu7x")
ROUNDINGS = {
    "fp8 by 128": functools.partial(quantize.fake_quant_fp8, block=128),
    "fp8 by 64": functools.partial(quantize.fake_quant_fp8, block=64),
    "fp4 by 32": functools.partial(quantize.fake_quant_fp4, block=32),
}


def rounded(name: str, x: Any, **params: Any) -> np.ndarray:
    with interpreted(**params):
        y = np.asarray(jax.jit(functools.partial(ROUNDINGS[name], impl="tpu"))(x))
    return y


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("fp8 by 128", (3, 50, 256), "float32"),
        ("fp8 by 128", (1, 200), "bfloat16"),  # the last block is short
        (
            "fp8 by 64",
            (1200, 448),
            "bfloat16",
        ),  # several blocks of rows, half a register at the end
        ("fp4 by 32", (1200, 200), "bfloat16"),
        ("fp4 by 32", (2, 1536), "float32"),
    ],
)
def test_the_tpu_kernel_equals_the_reference_bit_for_bit(
    name: str, shape: tuple[int, ...], dtype: str
) -> None:
    x = jnp.asarray(values(0, *shape), dtype)
    expected = np.asarray(ROUNDINGS[name](x, impl="reference"))
    assert_same_bits(rounded(name, x), expected)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_non_finite_values_stay_and_affect_only_their_own_block(name: str) -> None:
    """Forms may differ in the rest of the block."""
    clean = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    x = clean.copy()
    x[:4, 5] = np.nan, -np.nan, np.inf, -np.inf
    for y in (rounded(name, jnp.asarray(x)), ROUNDINGS[name](jnp.asarray(x), impl="reference")):
        np.testing.assert_array_equal(np.asarray(y)[:4, 5], x[:4, 5])
        expected = np.asarray(ROUNDINGS[name](jnp.asarray(clean), impl="reference"))
        assert_same_bits(np.asarray(y)[:, 128:], expected[:, 128:])
        assert_same_bits(np.asarray(y)[4], expected[4])


def test_two_cores_do_not_race() -> None:
    x = jnp.asarray(values(0, 260, 1024), jnp.bfloat16)
    y = rounded("fp8 by 128", x, detect_races=True, num_cores_or_threads=2)
    assert_same_bits(y, np.asarray(ROUNDINGS["fp8 by 128"](x, impl="xla")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_hadamard_kernel_and_its_gradient_equal_xla(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((5, 128)), dtype) for _ in range(2))
    both = lambda impl: jax.jit(
        lambda x, dy: (
            jax.vjp(functools.partial(quantize.hadamard, impl=impl), x)[1](dy)[0]
            + quantize.hadamard(x, impl=impl)
        )
    )(x, dy)
    with interpreted():
        y = both("tpu")
    # Sums of 128 terms in another order; in bfloat16 the rounding of each part and of the sum.
    atol = 1e-5 if dtype == "float32" else 3 * 2.0**-7
    np.testing.assert_allclose(y.astype(jnp.float32), both("xla").astype(jnp.float32), 0, atol)


def test_other_blocks_are_refused_by_the_kernel_and_left_to_xla() -> None:
    x = jnp.ones((2, 48))
    with pytest.raises(Unsupported, match="32, 64 and 128, not 24"):
        quantize.fake_quant_fp8(x, block=24, impl="tpu")
    np.testing.assert_array_equal(quantize.fake_quant_fp8(x, block=24), x)
    with pytest.raises(Unsupported, match="16384 channels, not 65536"):
        jax.eval_shape(functools.partial(ROUNDINGS["fp4 by 32"], impl="tpu"), struct(8, 65536))


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@pytest.mark.full_compilation
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("tokens", [8, 4096])
@pytest.mark.parametrize(("name", "channels"), [("fp8 by 128", 7168), ("fp4 by 32", 128)])
def test_rounding_reads_once_and_writes_once_on_tpus(
    chip: Target, tokens: int, name: str, channels: int
) -> None:
    """XLA's form takes temporaries of 3 to 5 times the input, and 14 to 17 times the traffic."""
    program = targets.compiled(chip, ROUNDINGS[name], struct(1, tokens, channels))
    assert "tpu_custom_call" in (program.as_text() or "")
    assert targets.temporaries(program) == 0


@pytest.mark.full_compilation
@pytest.mark.parametrize("chip", CHIPS)
def test_rounding_the_indexers_queries_needs_only_their_transform_besides(chip: Target) -> None:
    x = struct(1, 4096, 64, 128)
    program = targets.compiled(chip, layers.round_index, x)
    assert targets.temporaries(program) <= 1.1 * 2 * x.size


@pytest.mark.full_compilation
@pytest.mark.parametrize("name", ROUNDINGS)
def test_on_gpus_xla_rounds_without_temporaries_of_the_inputs_size(name: str) -> None:
    x = struct(1, 4096, 4096)
    program = targets.compiled("h200", ROUNDINGS[name], x)
    # Each block's largest magnitude and scale, in float32.
    assert targets.temporaries(program) <= 2 * 4 * x.size // 32 + 1024


@pytest.mark.full_compilation
@pytest.mark.parametrize("tokens", [8, 4096])
def test_on_gpus_xlas_hadamard_takes_no_temporaries(tokens: int) -> None:
    program = targets.compiled("h200", quantize.hadamard, struct(1, tokens, 128))
    assert targets.temporaries(program) == 0
