"""Dense attention on TPU: interpreted on CPU, and compiled ahead of time for real chips.

Axis letters: as in the package.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dense_attention, targets
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.dense_attention.shapes import SHAPES
from pallas_kernels.implementations import Unsupported
from tests.kernels import interpreted
from tests.test_dense_attention import (
    CLOSE,
    CLOSE_BFLOAT16,
    SCALE,
    Decode,
    Prefill,
    decode_case,
    prefill_case,
)

FLASH = SHAPES["flash"].divided(4)


def run(case: Decode | Prefill, **params: Any) -> np.ndarray:
    """Run in a new function, because a compiled one would not be traced again."""
    if isinstance(case, Prefill):
        op, static = dense_attention.prefill, {"window": case.window, "scale": SCALE}
    else:
        op, static = dense_attention.decode, {"scale": SCALE}
    with interpreted(**params):
        got = np.asarray(jax.jit(functools.partial(op, **static, impl="tpu"))(**vars(case)))
    return got


def flash_prefill(starts: tuple[int, ...], T: int, S: int, seed: int = 0) -> Prefill:
    return prefill_case(starts, T, FLASH.window, S, FLASH.heads, FLASH.head_dim, seed)


@pytest.mark.parametrize(
    ("starts", "T", "window", "S"),
    [
        ((3,), 9, 1, 0),
        ((0,), 1, 4, 1),
        ((0, 2, 1000), 21, 8, 60),
        ((1900,), 300, 16, 700),  # several blocks of queries and entries, the last ones partial
    ],
)
def test_prefill_sees_window_and_visible_entries(
    starts: tuple[int, ...], T: int, window: int, S: int
) -> None:
    case = prefill_case(starts, T, window, S)
    np.testing.assert_allclose(run(case), case.expected(), **CLOSE)


@pytest.mark.parametrize(("B", "T", "R", "S"), [(1, 1, 4, 0), (2, 8, 24, 30), (3, 1, 16, 1300)])
def test_decode_sees_window_and_visible_entries(B: int, T: int, R: int, S: int) -> None:
    case = decode_case(B, T, R, S)
    np.testing.assert_allclose(run(case), case.expected(), **CLOSE)


def test_prefill_of_the_model_scaled_down_in_bfloat16() -> None:
    case = flash_prefill((77, 3000), 70, 600)
    names = ("q_BTHK", "window_BXK", "pool_LBSK")
    narrow = {name: jnp.asarray(getattr(case, name) / 4, jnp.bfloat16) for name in names}
    rounded = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    got_BTHK = run(dataclasses.replace(case, **narrow))
    assert got_BTHK.dtype == jnp.bfloat16
    want_BTHK = dataclasses.replace(case, **rounded).expected()
    np.testing.assert_allclose(got_BTHK.astype(np.float32), want_BTHK, **CLOSE_BFLOAT16)


def test_any_visible_counts() -> None:
    static = {"window": 8, "scale": SCALE, "impl": "tpu"}
    # All examples share one program.
    op = jax.jit(functools.partial(dense_attention.prefill, **static))

    @settings(deadline=None, max_examples=8)
    @given(
        seed=st.integers(0, 2**32 - 1),
        starts=st.tuples(*[st.integers(0, 200)] * 2),
        most=st.sampled_from([0, 1, 511, 512, 513, 700]),
    )
    def check(seed: int, starts: tuple[int, int], most: int) -> None:
        case = prefill_case(starts, 140, 8, 700, seed=seed)
        visible_BT = np.random.default_rng(seed).integers(0, most + 1, (2, 140)).astype(np.int32)
        case = dataclasses.replace(case, visible_BT=visible_BT)
        np.testing.assert_allclose(op(**vars(case)), case.expected(), **CLOSE)

    with interpreted():
        check()


def test_prefill_ignores_masked_garbage() -> None:
    case = prefill_case((0, 3, 50), 21, 8, 700)
    window, pool = case.window_BXK.copy(), case.pool_LBSK.copy()
    pool[0] = np.nan
    for b in range(3):
        window[b, ~np.any([case.near(b, t) for t in range(21)], axis=0)] = np.nan
        pool[1, b, case.visible_BT[b].max() :] = np.nan
    got_BTHK = run(dataclasses.replace(case, window_BXK=window, pool_LBSK=pool))
    np.testing.assert_array_equal(got_BTHK, run(case))


def test_decode_ignores_masked_garbage() -> None:
    case = decode_case(2, 3, 24, 700)
    window, pool = case.window_BRK.copy(), case.pool_LBSK.copy()
    pool[0] = np.nan
    for b in range(2):
        window[b, ~case.window_mask_BTR[b].any(0)] = np.nan
        pool[1, b, case.visible_BT[b].max() :] = np.nan
    got_BTHK = run(dataclasses.replace(case, window_BRK=window, pool_LBSK=pool))
    np.testing.assert_array_equal(got_BTHK, run(case))


def test_a_query_that_sees_nothing_gets_zero_whatever_the_sink() -> None:
    case = decode_case(1, 2, 4, 5)
    nothing = {
        "window_mask_BTR": np.zeros((1, 2, 4), bool),
        "visible_BT": np.zeros((1, 2), np.int32),
        "sink_H": np.array([-np.inf, -500, 500], np.float32),
    }
    got_BTHK = run(dataclasses.replace(case, **nothing))
    np.testing.assert_array_equal(got_BTHK, np.zeros((1, 2, 3, 8)))


@pytest.mark.parametrize("case", [prefill_case((5,), 130, 8, 30), decode_case(2, 2, 12, 1100)])
def test_two_cores_do_not_race(case: Decode | Prefill) -> None:
    got_BTHK = run(case, detect_races=True, num_cores_or_threads=2)
    np.testing.assert_allclose(got_BTHK, case.expected(), **CLOSE)


def test_too_many_heads_or_a_too_long_window_are_rejected() -> None:
    with pytest.raises(
        Unsupported, match=r"up to 2048 heads and a window of up to 1024, not 3 and 2000"
    ):
        run(prefill_case((0,), 9, 2000, 0))
    with pytest.raises(Unsupported, match=r"takes up to 2048 rows .* not 1000 x 3 and 4"):
        run(decode_case(1, 1000, 4, 0))


def array(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)


def full_decode(name: str, B: int, T: int, S: int) -> DecodeInputs:
    shape, ring = SHAPES[name], SHAPES[name].window + 8
    return DecodeInputs(
        array(B, T, shape.heads, shape.head_dim),
        array(B, ring, shape.head_dim),
        array(B, T, ring, dtype=jnp.bool_),
        array(2, B, S, shape.head_dim) if S else None,
        array(dtype=jnp.int32),
        array(B, T, dtype=jnp.int32),
        array(shape.heads, dtype=jnp.float32),
    )


def full_prefill(name: str, T: int, S: int) -> PrefillInputs:
    shape = SHAPES[name]
    return PrefillInputs(
        array(1, T, shape.heads, shape.head_dim),
        array(1, shape.window + T, shape.head_dim),
        array(1, dtype=jnp.int32),
        array(2, 1, S, shape.head_dim) if S else None,
        array(dtype=jnp.int32),
        array(1, T, dtype=jnp.int32),
        array(shape.heads, dtype=jnp.float32),
    )


def assert_compiles(
    target: Any, op: Any, inputs: DecodeInputs | PrefillInputs, **static: Any
) -> None:
    run = lambda arrays: op(**arrays, scale=512**-0.5, **static)
    program = targets.compiled(target, run, inputs._asdict())
    assert "tpu_custom_call" in str(program.as_text())
    # Window and entries concatenated would be 8 to 67 MB, logits of a chunk 4 GB.
    assert targets.temporaries(program) <= 2**20


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", ["v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_full_shapes_compile_without_temporaries(name: str, target: str) -> None:
    assert_compiles(target, dense_attention.decode, full_decode(name, 8, 1, 8192))
    assert_compiles(target, dense_attention.prefill, full_prefill(name, 4096, 8192), window=128)


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", ["v5p", "v6e", "tpu7x"])
def test_sliding_layers_and_drafts_compile(target: str) -> None:
    assert_compiles(target, dense_attention.decode, full_decode("flash", 64, 2, 0))
    assert_compiles(target, dense_attention.prefill, full_prefill("flash", 4096, 0), window=128)
