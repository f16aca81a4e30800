"""Attention to listed entries against a sum over exactly those keys, in float64 NumPy.

Axis letters: as in test_dense_attention; k listed entries.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import sparse_attention
from pallas_kernels.sparse_attention.shapes import SHAPES
from tests.test_dense_attention import (
    CLOSE,
    CLOSE_BFLOAT16,
    SCALE,
    attend,
    decode_case,
    prefill_case,
    temporaries,
)

FORMS = ("reference", "xla")
DECODE = jax.jit(sparse_attention.decode, static_argnames=("scale", "impl"))
PREFILL = jax.jit(sparse_attention.prefill, static_argnames=("window", "scale", "impl"))
Inputs = dict[str, Any]


def listed(seed: int, B: int, T: int, S: int, k: int) -> np.ndarray:
    """0 to k distinct entries for each query, in any order and with -1 anywhere between them."""
    rng = np.random.default_rng(seed)
    indices_BTk = np.full((B, T, k), -1, np.int32)
    for query in np.ndindex(B, T):
        entries = rng.permutation(S)[: rng.integers(0, min(S, k) + 1)]
        indices_BTk[query][rng.permutation(k)[: len(entries)]] = entries
    return indices_BTk


def decode_inputs(B: int, T: int, R: int, S: int, k: int, seed: int = 0) -> Inputs:
    inputs: Inputs = vars(decode_case(B, T, R, S, seed=seed)).copy()
    del inputs["visible_BT"]
    return inputs | {"indices_BTk": listed(seed, B, T, S, k)}


def prefill_inputs(
    starts: tuple[int, ...], T: int, window: int, S: int, k: int, seed: int = 0, **sizes: int
) -> Inputs:
    inputs: Inputs = vars(prefill_case(starts, T, window, S, seed=seed, **sizes)).copy()
    del inputs["visible_BT"]
    return inputs | {"indices_BTk": listed(seed, len(starts), T, S, k)}


def decode(inputs: Inputs, impl: str) -> np.ndarray:
    return np.asarray(DECODE(**inputs, scale=SCALE, impl=impl))


def prefill(inputs: Inputs, impl: str) -> np.ndarray:
    return np.asarray(PREFILL(**inputs, window=window_of(inputs), scale=SCALE, impl=impl))


def window_of(inputs: Inputs) -> int:
    return inputs["window_BXK"].shape[1] - inputs["q_BTHK"].shape[1]


def near(inputs: Inputs) -> np.ndarray:
    """Mask of the window rows that each query of a chunk sees."""
    T = inputs["q_BTHK"].shape[1]
    window, start_B11 = window_of(inputs), inputs["start_B"][:, None, None]
    position_B1X = start_B11 - window + np.arange(inputs["window_BXK"].shape[1])
    query_BT1 = start_B11 + np.arange(T)[:, None]
    return (position_B1X >= 0) & (position_B1X <= query_BT1) & (position_B1X > query_BT1 - window)


def expected(inputs: Inputs, window_BXK: np.ndarray, mask_BTX: np.ndarray) -> np.ndarray:
    out_BTHK = np.zeros(inputs["q_BTHK"].shape)
    pool_BSK = inputs["pool_LBSK"][inputs["layer"]]
    for b, t in np.ndindex(*out_BTHK.shape[:2]):
        entries = inputs["indices_BTk"][b, t]
        keys_NK = np.concatenate(
            [window_BXK[b][mask_BTX[b, t]], pool_BSK[b][entries[entries >= 0]]]
        )
        out_BTHK[b, t] = attend(inputs["q_BTHK"][b, t], keys_NK, inputs["sink_H"])
    return out_BTHK


def check_decode(inputs: Inputs, impl: str) -> None:
    expected_BTHK = expected(inputs, inputs["window_BRK"], inputs["window_mask_BTR"])
    np.testing.assert_allclose(decode(inputs, impl), expected_BTHK, **CLOSE)


def check_prefill(inputs: Inputs, impl: str) -> None:
    expected_BTHK = expected(inputs, inputs["window_BXK"], near(inputs))
    np.testing.assert_allclose(prefill(inputs, impl), expected_BTHK, **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("B", "T", "R", "S", "k"), [(1, 1, 4, 1, 1), (2, 8, 24, 30, 7), (3, 1, 16, 900, 128)]
)
def test_decode_sees_window_and_listed_entries(
    B: int, T: int, R: int, S: int, k: int, impl: str
) -> None:
    check_decode(decode_inputs(B, T, R, S, k), impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("starts", "T", "window", "S", "k"),
    [
        ((0,), 1, 4, 1, 1),
        # Several blocks of queries, the last partial: with many entries, then with few.
        ((0, 2, 1000), 21, 8, 100, 9),
        ((0, 90), 400, 16, 40, 9),
        ((7,), 70, 1, 5, 8),  # k > S
    ],
)
def test_prefill_sees_window_and_listed_entries(
    starts: tuple[int, ...], T: int, window: int, S: int, k: int, impl: str
) -> None:
    check_prefill(prefill_inputs(starts, T, window, S, k), impl)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), starts=st.tuples(*[st.integers(0, 3000)] * 2))
def test_prefill_on_random_data(seed: int, starts: tuple[int, int]) -> None:
    check_prefill(prefill_inputs(starts, 21, 8, 60, 9, seed), "xla")


@pytest.mark.parametrize("name", SHAPES)
def test_model_shapes_scaled_down(name: str) -> None:
    shape = SHAPES[name].divided(16)
    sizes = {"H": shape.heads, "K": shape.head_dim}
    check_prefill(prefill_inputs((40,), 20, shape.window, 100, shape.k, **sizes), "auto")


@pytest.mark.parametrize("impl", FORMS)
def test_listing_all_visible_entries_equals_dense_attention(impl: str) -> None:
    case = prefill_case((0, 90), 21, 8, 12)
    entry_S = np.arange(12, dtype=np.int32)
    indices_BTk = np.where(entry_S < case.visible_BT[..., None], entry_S, -1)
    inputs = vars(case) | {"indices_BTk": indices_BTk.astype(np.int32)}
    del inputs["visible_BT"]
    np.testing.assert_allclose(prefill(inputs, impl), case.run(impl), **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_the_order_of_the_list_does_not_matter(impl: str) -> None:
    inputs = prefill_inputs((0, 50), 21, 8, 60, 9)
    backwards = inputs | {"indices_BTk": inputs["indices_BTk"][..., ::-1]}
    np.testing.assert_allclose(prefill(backwards, impl), prefill(inputs, impl), **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_prefill_equals_decoding_one_token_at_a_time(impl: str) -> None:
    inputs = prefill_inputs((0, 5), 20, 4, 30, 6)
    expected_BTHK, near_BTX = prefill(inputs, impl), near(inputs)
    for t in range(20):
        at = slice(t, t + 1)
        token = {
            "q_BTHK": inputs["q_BTHK"][:, at],
            "window_BRK": inputs["window_BXK"],
            "window_mask_BTR": near_BTX[:, at],
            "indices_BTk": inputs["indices_BTk"][:, at],
            **{name: inputs[name] for name in ("pool_LBSK", "layer", "sink_H")},
        }
        np.testing.assert_allclose(decode(token, impl), expected_BTHK[:, at], **CLOSE)


def poison(inputs: Inputs, name: str, mask_BTX: np.ndarray, garbage: float) -> Inputs:
    """Put garbage in window rows that no query sees and in entries that no query lists."""
    window, pool = inputs[name].copy(), inputs["pool_LBSK"].copy()
    pool[0] = garbage
    for b, indices_Tk in enumerate(inputs["indices_BTk"]):
        window[b, ~mask_BTX[b].any(0)] = garbage
        pool[1, b, ~np.isin(np.arange(pool.shape[2]), indices_Tk)] = garbage
    return inputs | {name: window, "pool_LBSK": pool}


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_decode_ignores_garbage(garbage: float, impl: str) -> None:
    inputs = decode_inputs(2, 3, 24, 90, 9)
    poisoned = poison(inputs, "window_BRK", inputs["window_mask_BTR"], garbage)
    assert not np.isfinite(poisoned["window_BRK"]).all()
    assert not np.isfinite(poisoned["pool_LBSK"][1, :, 0]).all()
    np.testing.assert_array_equal(decode(poisoned, impl), decode(inputs, impl))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("entries", [60, 400])
def test_prefill_ignores_garbage(entries: int, garbage: float, impl: str) -> None:
    inputs = prefill_inputs((0, 3, 50), 21, 8, entries, 9)
    poisoned = poison(inputs, "window_BXK", near(inputs), garbage)
    np.testing.assert_array_equal(prefill(poisoned, impl), prefill(inputs, impl))


@pytest.mark.parametrize("impl", FORMS)
def test_a_query_that_sees_nothing_outputs_zero(impl: str) -> None:
    inputs = decode_inputs(1, 2, 4, 5, 3)
    inputs["window_mask_BTR"] = np.zeros((1, 2, 4), bool)
    inputs["indices_BTk"] = np.full((1, 2, 3), -1, np.int32)
    np.testing.assert_array_equal(decode(inputs, impl), np.zeros((1, 2, 3, 8)))


@pytest.mark.parametrize("impl", FORMS)
def test_rows_of_a_batch_are_independent(impl: str) -> None:
    inputs = prefill_inputs((0, 3, 50), 21, 8, 60, 9)
    expected_BTHK = prefill(inputs, impl)
    for b in range(3):
        row = slice(b, b + 1)
        names = ("q_BTHK", "window_BXK", "start_B", "indices_BTk")
        alone = inputs | {name: inputs[name][row] for name in names}
        alone["pool_LBSK"] = inputs["pool_LBSK"][:, row]
        np.testing.assert_allclose(prefill(alone, impl)[0], expected_BTHK[b], **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(impl: str) -> None:
    inputs = prefill_inputs((1900,), 40, 16, 500, 64)
    names = ("q_BTHK", "window_BXK", "pool_LBSK")
    narrow = {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in names}
    out_BTHK = prefill(inputs | narrow, impl)
    assert out_BTHK.dtype == jnp.bfloat16
    rounded = inputs | {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected_BTHK = expected(rounded, rounded["window_BXK"], near(rounded))
    np.testing.assert_allclose(out_BTHK.astype(np.float32), expected_BTHK, **CLOSE_BFLOAT16)


def test_gradients_of_the_reference_match_finite_differences() -> None:
    inputs = prefill_inputs((2,), 5, 3, 9, 4)
    names = ("q_BTHK", "window_BXK", "pool_LBSK", "sink_H")
    fixed = {name: x for name, x in inputs.items() if name not in names}

    def loss(*arrays: Any) -> Any:
        run = functools.partial(PREFILL, window=3, scale=SCALE, impl="reference")
        return jnp.sum(jnp.sin(run(**fixed, **dict(zip(names, arrays, strict=True)))))

    arrays = [jnp.asarray(inputs[name]) for name in names]
    # float32 differences over steps of 1e-2.
    jax.test_util.check_grads(loss, arrays, order=1, modes=["rev"], eps=1e-2, rtol=2e-3, atol=2e-3)


@pytest.mark.full_compilation
def test_temporaries_stay_small_at_65536_entries() -> None:
    """A layer of the pool takes 32 MiB, as do the entries of all queries."""
    shape, S, T, spare = SHAPES["bench"], 65536, 512, 8
    array = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    pool = {
        "pool_LBSK": array(2, 1, S, shape.head_dim),
        "layer": array(dtype=jnp.int32),
        "sink_H": array(shape.heads),
    }
    chunk = {
        "q_BTHK": array(1, T, shape.heads, shape.head_dim),
        "window_BXK": array(1, shape.window + T, shape.head_dim),
        "start_B": array(1, dtype=jnp.int32),
        "indices_BTk": array(1, T, shape.k, dtype=jnp.int32),
    }
    # A copy of the queries and of the output, and the entries of 16 queries twice: 2 + 2 + 2 x 1.
    assert temporaries(PREFILL, pool | chunk, window=128, scale=1.0, impl="xla") <= 12
    token = {
        "q_BTHK": array(1, 1, shape.heads, shape.head_dim),
        "window_BRK": array(1, shape.window + spare, shape.head_dim),
        "window_mask_BTR": array(1, 1, shape.window + spare, dtype=jnp.bool_),
        "indices_BTk": array(1, 1, shape.k, dtype=jnp.int32),
    }
    assert temporaries(DECODE, pool | token, scale=1.0, impl="xla") <= 1


def test_a_window_of_the_wrong_length_is_rejected() -> None:
    inputs = prefill_inputs((0,), 5, 3, 4, 2)
    for window in (2, 4):
        with pytest.raises(ValueError, match=f"has 8 keys; .* {window + 5} in all"):
            PREFILL(**inputs, window=window, scale=1.0)


def test_an_unknown_form_is_rejected_by_name() -> None:
    # Unwrapped: the annotation checks would reject it first.
    functions = {
        inspect.unwrap(sparse_attention.decode): decode_inputs(1, 1, 1, 1, 1),
        functools.partial(inspect.unwrap(sparse_attention.prefill), window=1): prefill_inputs(
            (0,), 1, 1, 1, 1
        ),
    }
    for function, inputs in functions.items():
        with pytest.raises(
            NotImplementedError, match=r"has no 'abacus' form; pass one of \['auto', .*'xla'\]"
        ):
            function(**inputs, scale=1.0, impl="abacus")
