"""Dense attention against attention over only the visible keys, in float64 NumPy.

Axis letters: B batch, T queries, H heads, K head dim, R ring rows, X window + T keys, S entries,
N keys visible to one query.
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dense_attention
from pallas_kernels.dense_attention.shapes import SHAPES

FORMS = ("reference", "xla")
DECODE = jax.jit(dense_attention.decode, static_argnames=("scale", "impl"))
PREFILL = jax.jit(dense_attention.prefill, static_argnames=("window", "scale", "impl"))
SCALE = 0.3
# float32 sums of up to a thousand terms of size 1; bfloat16 rounds weights and output to 2^-9.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_BFLOAT16: dict[str, Any] = {"rtol": 2**-6, "atol": 2**-6}


def normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def attend(
    q_HK: np.ndarray, visible_NK: np.ndarray, sink_H: np.ndarray, scale: float = SCALE
) -> np.ndarray:
    """One query in float64, over only the keys that are visible to it."""
    logits_HN = q_HK.astype(np.float64) @ visible_NK.astype(np.float64).T * scale
    largest_H1 = np.concatenate([logits_HN, sink_H[:, None]], axis=1).max(1, keepdims=True)
    weights_HN = np.exp(logits_HN - largest_H1)
    total_H1 = weights_HN.sum(1, keepdims=True) + np.exp(sink_H[:, None] - largest_H1)
    return weights_HN @ visible_NK / total_H1


@dataclasses.dataclass(frozen=True)
class Decode:
    q_BTHK: Any
    window_BRK: Any
    window_mask_BTR: Any
    pool_LBSK: Any
    layer: Any
    visible_BT: Any
    sink_H: Any

    def run(self, impl: str, **changed: Any) -> np.ndarray:
        return np.asarray(DECODE(**{**vars(self), **changed}, scale=SCALE, impl=impl))

    def expected(self) -> np.ndarray:
        out_BTHK = np.zeros(self.q_BTHK.shape)
        for b, t in np.ndindex(*self.visible_BT.shape):
            visible = [self.window_BRK[b][self.window_mask_BTR[b, t]]]
            if self.pool_LBSK is not None:
                visible.append(self.pool_LBSK[self.layer, b, : self.visible_BT[b, t]])
            out_BTHK[b, t] = attend(self.q_BTHK[b, t], np.concatenate(visible), self.sink_H)
        return out_BTHK


def decode_case(B: int, T: int, R: int, S: int, H: int = 3, K: int = 8, seed: int = 0) -> Decode:
    q, window, pool, sink = normal(seed, (B, T, H, K), (B, R, K), (2, B, S, K), (H,))
    rng = np.random.default_rng(seed)
    mask_BTR = rng.random((B, T, R)) < 0.7
    visible_BT = rng.integers(0, S + 1, (B, T)).astype(np.int32)
    return Decode(q, window, mask_BTR, pool if S else None, np.int32(1), visible_BT, sink)


@dataclasses.dataclass(frozen=True)
class Prefill:
    q_BTHK: Any
    window_BXK: Any
    start_B: Any
    pool_LBSK: Any
    layer: Any
    visible_BT: Any
    sink_H: Any

    @property
    def window(self) -> int:
        return self.window_BXK.shape[1] - self.q_BTHK.shape[1]

    def run(self, impl: str, **changed: Any) -> np.ndarray:
        arrays = {**vars(self), **changed}
        return np.asarray(PREFILL(**arrays, window=self.window, scale=SCALE, impl=impl))

    def near(self, b: int, t: int) -> np.ndarray:
        """Mask of the window rows visible to query t: the `window` positions up to its own."""
        position_X = self.start_B[b] - self.window + np.arange(self.window_BXK.shape[1])
        last = self.start_B[b] + t
        return (position_X >= 0) & (position_X <= last) & (position_X > last - self.window)

    def expected(self) -> np.ndarray:
        out_BTHK = np.zeros(self.q_BTHK.shape)
        for b, t in np.ndindex(*self.visible_BT.shape):
            visible = [self.window_BXK[b][self.near(b, t)]]
            if self.pool_LBSK is not None:
                visible.append(self.pool_LBSK[self.layer, b, : self.visible_BT[b, t]])
            out_BTHK[b, t] = attend(self.q_BTHK[b, t], np.concatenate(visible), self.sink_H)
        return out_BTHK


def prefill_case(
    starts: tuple[int, ...], T: int, window: int, S: int, H: int = 3, K: int = 8, seed: int = 0
) -> Prefill:
    B = len(starts)
    q, keys, pool, sink = normal(seed, (B, T, H, K), (B, window + T, K), (2, B, S, K), (H,))
    start_B = np.array(starts, np.int32)
    # As HCA with 4 tokens per entry, limited to the entries of the pool.
    visible_BT = np.minimum((start_B[:, None] + np.arange(T) + 1) // 4, S).astype(np.int32)
    return Prefill(q, keys, start_B, pool if S else None, np.int32(1), visible_BT, sink)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("B", "T", "R", "S"),
    [(1, 1, 4, 0), (1, 1, 1, 1), (2, 8, 24, 30), (3, 1, 16, 1300)],
)
def test_decode_sees_window_and_visible_entries(B: int, T: int, R: int, S: int, impl: str) -> None:
    case = decode_case(B, T, R, S)
    np.testing.assert_allclose(case.run(impl), case.expected(), **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("starts", "T", "window", "S"),
    [
        ((0,), 1, 4, 1),
        ((3,), 9, 1, 0),
        ((0, 2, 1000), 21, 8, 60),
        ((1900,), 300, 16, 700),  # several blocks of queries and entries, the last ones partial
    ],
)
def test_prefill_sees_window_and_visible_entries(
    starts: tuple[int, ...], T: int, window: int, S: int, impl: str
) -> None:
    case = prefill_case(starts, T, window, S)
    np.testing.assert_allclose(case.run(impl), case.expected(), **CLOSE)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    starts=st.tuples(*[st.integers(0, 3000)] * 2),
    size=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_prefill_of_any_data(seed: int, starts: tuple[int, int], size: float) -> None:
    case = prefill_case(starts, 21, 8, 600, seed=seed)
    case = dataclasses.replace(case, q_BTHK=case.q_BTHK * np.float32(size))
    # Large queries: a relative error of 1e-6 in a logit of 100s is 1e-4 in its weight.
    tolerance: dict[str, Any] = CLOSE if size <= 1 else {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(case.run("xla"), case.expected(), **tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_models_scaled_down(name: str) -> None:
    shape = SHAPES[name].divided(16)
    case = prefill_case((40,), 20, shape.window, 50, shape.heads, shape.head_dim)
    np.testing.assert_allclose(case.run("auto"), case.expected(), **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_prefill_equals_decoding_token_by_token(impl: str) -> None:
    case = prefill_case((0, 5), 12, 4, 9)
    whole_BTHK = case.run(impl)
    for t in range(12):
        mask_BTR = np.stack([case.near(b, t)[None] for b in range(2)])
        at = slice(t, t + 1)
        step = Decode(
            case.q_BTHK[:, at],
            case.window_BXK,
            mask_BTR,
            case.pool_LBSK,
            case.layer,
            case.visible_BT[:, at],
            case.sink_H,
        )
        np.testing.assert_allclose(step.run(impl), whole_BTHK[:, at], **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_decode_ignores_masked_garbage(garbage: float, impl: str) -> None:
    case = decode_case(2, 3, 24, 700)
    window, pool = case.window_BRK.copy(), case.pool_LBSK.copy()
    pool[0] = garbage
    for b in range(2):
        window[b, ~case.window_mask_BTR[b].any(0)] = garbage
        pool[1, b, case.visible_BT[b].max() :] = garbage
    assert not np.isfinite(window).all()
    got_BTHK = case.run(impl, window_BRK=window, pool_LBSK=pool)
    np.testing.assert_array_equal(got_BTHK, case.run(impl))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_prefill_ignores_masked_garbage(garbage: float, impl: str) -> None:
    case = prefill_case((0, 3, 50), 21, 8, 700)
    window, pool = case.window_BXK.copy(), case.pool_LBSK.copy()
    pool[0] = garbage
    for b in range(3):
        window[b, ~np.any([case.near(b, t) for t in range(21)], axis=0)] = garbage
        pool[1, b, case.visible_BT[b].max() :] = garbage
    got_BTHK = case.run(impl, window_BXK=window, pool_LBSK=pool)
    np.testing.assert_array_equal(got_BTHK, case.run(impl))


@pytest.mark.parametrize("impl", FORMS)
def test_a_query_that_sees_nothing_gets_zero(impl: str) -> None:
    case = decode_case(1, 2, 4, 5)
    nothing = {
        "window_mask_BTR": np.zeros((1, 2, 4), bool),
        "visible_BT": np.zeros((1, 2), np.int32),
    }
    np.testing.assert_array_equal(case.run(impl, **nothing), np.zeros((1, 2, 3, 8)))


@pytest.mark.parametrize("impl", FORMS)
def test_a_large_sink_takes_all_weight_and_a_small_one_none(impl: str) -> None:
    case = decode_case(1, 2, 4, 5)
    np.testing.assert_allclose(case.run(impl, sink_H=np.full(3, 500, np.float32)), 0, atol=1e-30)
    without = dataclasses.replace(case, sink_H=np.full(3, -500, np.float32))
    np.testing.assert_allclose(without.run(impl), without.expected(), **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_rows_of_a_batch_are_independent(impl: str) -> None:
    case = prefill_case((0, 3, 50), 21, 8, 30)
    whole_BTHK = case.run(impl)
    for b in range(3):
        row = slice(b, b + 1)
        single = case.run(
            impl,
            q_BTHK=case.q_BTHK[row],
            window_BXK=case.window_BXK[row],
            start_B=case.start_B[row],
            pool_LBSK=case.pool_LBSK[:, row],
            visible_BT=case.visible_BT[row],
        )
        np.testing.assert_allclose(single[0], whole_BTHK[b], **CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(impl: str) -> None:
    case = prefill_case((1900,), 40, 16, 500)
    narrow = {
        name: jnp.asarray(getattr(case, name), jnp.bfloat16)
        for name in ("q_BTHK", "window_BXK", "pool_LBSK")
    }
    rounded = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    got_BTHK = case.run(impl, **narrow)
    assert got_BTHK.dtype == jnp.bfloat16
    want_BTHK = dataclasses.replace(case, **rounded).expected()
    np.testing.assert_allclose(got_BTHK.astype(np.float32), want_BTHK, **CLOSE_BFLOAT16)


def temporaries(op: Any, arrays: dict[str, Any], **settings: Any) -> float:
    """Temporaries of the compiled program in MiB."""
    memory = op.lower(**arrays, **settings).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 2**20


@pytest.mark.full_compilation
def test_temporaries_stay_small_at_65536_entries() -> None:
    """One layer of the pool is 32 MiB; logits of all heads and queries would be 1 GiB."""
    shape, S, T, spare = SHAPES["bench"], 65536, 512, 8
    array = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    pool = array(2, 1, S, shape.head_dim)
    chunk = {
        "q_BTHK": array(1, T, shape.heads, shape.head_dim),
        "window_BXK": array(1, shape.window + T, shape.head_dim),
        "start_B": array(1, dtype=jnp.int32),
        "pool_LBSK": pool,
        "layer": array(dtype=jnp.int32),
        "visible_BT": array(1, T, dtype=jnp.int32),
        "sink_H": array(shape.heads),
    }
    # Copies of queries and output, and two blocks of 8 heads x 128 queries x 512 entries.
    assert temporaries(PREFILL, chunk, window=shape.window, scale=1.0, impl="xla") <= 12
    token = {
        "q_BTHK": array(1, 1, shape.heads, shape.head_dim),
        "window_BRK": array(1, shape.window + spare, shape.head_dim),
        "window_mask_BTR": array(1, 1, shape.window + spare, dtype=jnp.bool_),
        "pool_LBSK": pool,
        "layer": array(dtype=jnp.int32),
        "visible_BT": array(1, 1, dtype=jnp.int32),
        "sink_H": array(shape.heads),
    }
    assert temporaries(DECODE, token, scale=1.0, impl="xla") <= 4


def test_a_window_of_the_wrong_length_is_rejected() -> None:
    case = prefill_case((0,), 5, 3, 4)
    for window in (2, 4):
        with pytest.raises(ValueError, match=f"has 8 keys; .* {window + 5} in all"):
            PREFILL(**vars(case), window=window, scale=1.0)


def test_an_unknown_implementation_is_rejected_by_name() -> None:
    # Unwrapped, because the check of annotations would raise first.
    decode, prefill = (
        inspect.unwrap(dense_attention.decode),
        inspect.unwrap(dense_attention.prefill),
    )
    message = r"'gpu' form; pass one of \['auto', 'reference', 'tpu', 'xla'\]"
    with pytest.raises(NotImplementedError, match=message):
        decode(**vars(decode_case(1, 1, 1, 1)), scale=1.0, impl="gpu")
    with pytest.raises(NotImplementedError, match=message):
        prefill(**vars(prefill_case((0,), 1, 1, 1)), window=1, scale=1.0, impl="gpu")
