"""The routed experts on GPUs: interpreted against the reference, and compiled at full size.

Axis letters: as in the package; S steps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize, targets
from pallas_kernels.grouped_matmul import LoraWeight, gpu, gpu_matmul, reference
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.grouped_matmul.shapes import SHAPES
from pallas_kernels.implementations import Unsupported
from tests import gpu_kernels

LIMIT = 3.0
# Hidden activations and outputs are bfloat16 (8 bits); in the reference gate and up too.
CLOSE = 2e-2


def codes(dtype: Any, L: int, E: int, N: int, K: int, seed: int) -> Any:
    """A stack of random matrices in the given format."""
    rng = np.random.default_rng(seed)
    power = lambda low, high, *dims: 2.0 ** rng.integers(low, high, (L, E, *dims))
    match dtype:
        case "fp4":
            packed = jnp.asarray(rng.integers(0, 256, (L, E, K // 2, N)), jnp.uint8)
            scale = jnp.asarray(power(-8, -4, K // 32, N), jnp.float8_e8m0fnu)
            return quantize.Fp4Weight(packed, scale)
        case "fp8" | "fp8 float32":
            values = jnp.asarray(rng.normal(size=(L, E, K, N)), jnp.float8_e4m3fn)
            scale = power(-5, -3, K // 128, N // 128)
            scale_type = jnp.float8_e8m0fnu if dtype == "fp8" else jnp.float32
            scale = jnp.asarray(scale if dtype == "fp8" else scale * 1.3, scale_type)
            return quantize.Fp8Weight(values, scale)
        case _:
            return jnp.asarray(rng.normal(size=(L, E, N, K)) * K**-0.5, jnp.bfloat16)


def inputs(form: str, T: int, A: int, E: int) -> Inputs:
    """Inputs with D = 256, F = 128 and two layers; some ids are out of range."""
    D, F = 256, 128
    rng = np.random.default_rng(T)
    expert_TA = rng.integers(-1, E + 1, (T, A))
    return Inputs(
        jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16),
        jnp.asarray(expert_TA, jnp.int32),
        jnp.asarray(rng.random((T, A)), jnp.float32),
        codes(form, 2, E, F, D, 1),
        codes(form, 2, E, F, D, 2),
        codes(form, 2, E, D, F, 3),
        jnp.int32(1),
    )


@pytest.mark.parametrize(
    ("form", "T", "A", "E", "rows"),
    [("array", 5, 3, 2, 64), ("fp8 float32", 5, 3, 1, 64), ("fp4", 96, 1, 1, 128)],
)
def test_experts_equal_the_reference(form: str, T: int, A: int, E: int, rows: int) -> None:
    arrays = inputs(form, T, A, E)
    assert gpu_matmul.tile_rows(T * A, E) == rows
    static = {"limit": LIMIT, "weight_first": form != "array"}
    with gpu_kernels.interpreted():
        run = jax.jit(functools.partial(gpu.expert_mlp, **static))
        got_TD = np.asarray(jax.block_until_ready(run(arrays)))
    want_TD = np.asarray(reference.expert_mlp(arrays, **static))
    assert got_TD.dtype == want_TD.dtype == np.float32
    np.testing.assert_allclose(got_TD, want_TD, rtol=CLOSE, atol=CLOSE * np.abs(want_TD).max())


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    T=st.sampled_from([1, 40]),
    E=st.sampled_from([1, 3, 60]),
    rows=st.sampled_from([8, 64]),
)
def test_each_row_is_in_exactly_one_step_of_its_expert(
    seed: int, T: int, E: int, rows: int
) -> None:
    expert_TA = np.random.default_rng(seed).integers(-2, E + 2, (T, 4)).astype(np.int32)
    steps = jax.tree.map(np.asarray, gpu.make_steps(jnp.asarray(expert_TA), E, rows))
    expert_P = expert_TA.reshape(-1)[steps.order_P]
    visits_P = np.zeros(len(expert_P), int)
    for expert, row, count in zip(steps.expert_S, steps.row_S, steps.count_S, strict=True):
        assert 0 <= expert < E
        assert 0 <= count <= rows
        assert row % 8 + count <= rows
        assert row + rows <= len(expert_P) + rows
        visits_P[row : row + count] += 1
        assert (expert_P[row : row + count] == expert).all()
    np.testing.assert_array_equal(visits_P, (expert_P >= 0) & (expert_P < E))
    assert steps.real == visits_P.sum()


STRUCT: Any = jax.ShapeDtypeStruct


def weight_struct(form: str, E: int, N: int, K: int) -> Any:
    match form:
        case "fp4":
            packed = STRUCT((2, E, K // 2, N), jnp.uint8)
            return quantize.Fp4Weight(packed, STRUCT((2, E, K // 32, N), jnp.float8_e8m0fnu))
        case "fp8" | "fp8 float32":
            scale = STRUCT(
                (2, E, K // 128, N // 128),
                jnp.float8_e8m0fnu if form == "fp8" else jnp.float32,
            )
            return quantize.Fp8Weight(STRUCT((2, E, K, N), jnp.float8_e4m3fn), scale)
        case _:
            return STRUCT((2, E, N, K), jnp.bfloat16)


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("name", "T", "form"),
    [
        ("flash", 5, "fp4"),
        ("flash", 4096, "array"),
        ("pro", 8, "fp8 float32"),
        ("pro", 4096, "fp8"),
    ],
)
def test_experts_compile_for_the_h200(name: str, T: int, form: str) -> None:
    """Temporaries are the sorted rows and their hidden activations; no matrix is copied."""
    shape = SHAPES[name]
    E, A, D, F = shape.experts, shape.choices, shape.hidden, shape.expert_hidden
    up, down = weight_struct(form, E, F, D), weight_struct(form, E, D, F)
    structs = Inputs(
        STRUCT((T, D), jnp.bfloat16),
        STRUCT((T, A), jnp.int32),
        STRUCT((T, A), jnp.float32),
        *(up, up, down),
        STRUCT((), jnp.int32),
    )
    run = functools.partial(gpu.expert_mlp, limit=LIMIT, weight_first=True)
    lowered = targets.lowered("h200", run, structs)
    assert "mosaic_gpu" in lowered.as_text()
    rows = T * A + gpu_matmul.tile_rows(T * A, E)
    assert targets.temporaries(lowered.compile()) <= rows * (D + F) * 2 + 2**21


def test_a_low_rank_update_is_rejected() -> None:
    arrays = inputs("array", 5, 3, 4)
    up = LoraWeight(arrays.w1_LEFD, jnp.zeros((2, 4, 1, 256)), jnp.zeros((2, 4, 128, 1)), 1.0)
    with pytest.raises(Unsupported, match="low-rank"):
        gpu.expert_mlp(arrays._replace(w1_LEFD=up), limit=LIMIT, weight_first=True)


def test_float32_is_rejected() -> None:
    arrays = inputs("array", 5, 3, 4)
    wide = arrays._replace(x_TD=arrays.x_TD.astype(jnp.float32))
    with pytest.raises(Unsupported, match="bfloat16"):
        gpu.expert_mlp(wide, limit=LIMIT, weight_first=True)


def test_sizes_that_are_not_multiples_of_blocks_are_rejected() -> None:
    arrays = inputs("array", 5, 3, 4)
    up, down = jnp.zeros((2, 4, 96, 256), jnp.bfloat16), jnp.zeros((2, 4, 256, 96), jnp.bfloat16)
    with pytest.raises(Unsupported, match="not 256 and 96"):
        gpu.expert_mlp(arrays.with_weights(up, up, down), limit=LIMIT, weight_first=True)
