"""The indexer's choice: every form chooses exactly the same entries, whatever the scores.

Axis letters: B batch, T queries, I index heads, J index head dim, S entries, k entries chosen.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import indexer_topk
from pallas_kernels.indexer_topk import reference
from pallas_kernels.indexer_topk.shapes import SHAPES

FORMS = ("reference", "xla")
SELECT = jax.jit(indexer_topk.select, static_argnames=("k", "impl"))
Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def whole_numbers(seed: int, B: int, T: int, I: int, J: int, S: int) -> Case:
    """Inputs whose scores are exact in float32 in any order of summation, and full of ties."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(-3, 4, shape).astype(np.float32)
    return draw(B, T, I, J), draw(B, T, I), draw(2, B, S, J)


def case_of(score_BS: np.ndarray) -> Case:
    """One query per row with exactly these scores: relu(key) - relu(-key) is the key."""
    rows = len(score_BS)
    signs = np.tile(np.array([1, -1], np.float32), (rows, 1, 1))
    return signs[..., None], signs, score_BS.astype(np.float32)[None, :, :, None]


def oracle(score_S: np.ndarray, visible: int, k: int) -> np.ndarray:
    """The choice by NumPy's stable sort, NaN first; ascending, padded with -1."""
    visible_S = score_S[:visible]
    number_S = np.where(np.isnan(visible_S), 0, visible_S)
    chosen = np.sort(np.lexsort((-number_S, ~np.isnan(visible_S)))[:k])
    return np.concatenate([chosen, np.full(k - len(chosen), -1)])


def check(case: Case, visible_BT: np.ndarray, k: int, impl: str, layer: int = 0) -> None:
    """Assert that `select` makes the oracle's choice."""
    q_BTIJ, weights_BTI, keys_LBSJ = case
    arrays = [jnp.asarray(x) for x in (*case, np.int32(layer), visible_BT.astype(np.int32))]
    actual_BTk = np.asarray(SELECT(*arrays, k=k, impl=impl))
    dots_BTIS = np.einsum("btij,bsj->btis", q_BTIJ, keys_LBSJ[layer])
    score_BTS = np.einsum("btis,bti->bts", np.maximum(dots_BTIS, 0), weights_BTI)
    for at in np.ndindex(*visible_BT.shape):
        np.testing.assert_array_equal(actual_BTk[at], oracle(score_BTS[at], int(visible_BT[at]), k))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("B", "T", "S", "k"),
    [
        (1, 1, 1, 1),
        (2, 1, 700, 1),
        (1, 5, 130, 128),
        (1, 3, 100, 128),  # k > S
        (2, 300, 257, 16),  # several blocks of queries, the last one padded
        (1, 4, 4096, 32),  # several prefixes
        (1, 1, 5000, 7),  # several blocks of keys, the last one reaching back
    ],
)
def test_the_choice_is_exact_and_ascending(B: int, T: int, S: int, k: int, impl: str) -> None:
    case, rng = whole_numbers(S, B, T, 4, 8, S), np.random.default_rng(S)
    for visible_BT in (rng.integers(0, S + 1, (B, T)), np.full((B, T), S), np.zeros((B, T), int)):
        check(case, visible_BT, k, impl, layer=1)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1), visible=st.lists(st.integers(0, 600), min_size=6, max_size=6)
)
def test_random_data_of_one_shape(seed: int, visible: list[int]) -> None:
    check(whole_numbers(seed, 2, 3, 2, 4, 600), np.array(visible).reshape(2, 3), 16, "xla", layer=1)


@pytest.mark.parametrize("name", SHAPES)
def test_model_shapes_scaled_down(name: str) -> None:
    shape = SHAPES[name].divided(8)
    case = whole_numbers(0, 1, 20, shape.heads, shape.head_dim, 600)
    check(case, np.arange(20)[None] * 30, shape.k, "xla")


@pytest.mark.parametrize("impl", FORMS)
def test_visible_counts_around_block_edges(impl: str) -> None:
    """Each count has a row, and so a block, of its own; the last visible entry is the best."""
    visible_B = np.array([0, 1, 127, 128, 129, 512, 513, 2048])
    check(case_of(np.tile(np.arange(2048), (8, 1))), visible_B[:, None], 128, impl)


@pytest.mark.parametrize("impl", FORMS)
def test_visible_counts_out_of_range_mean_none_or_all(impl: str) -> None:
    """The best entry is the last; in a sum, some of these counts would overflow an int32."""
    visible_B = np.array([-(2**31), -1, 301, 2**31 - 1])
    case = case_of(np.tile(np.arange(300), (4, 1)))
    arrays = [jnp.asarray(x) for x in (*case, np.int32(0), visible_B.astype(np.int32)[:, None])]
    chosen_Bk = SELECT(*arrays, k=2, impl=impl)[:, 0]
    np.testing.assert_array_equal(chosen_Bk, [[-1, -1], [-1, -1], [298, 299], [298, 299]])


@pytest.mark.parametrize(("B", "T", "S"), [(0, 1, 5), (1, 0, 5), (1, 1, 0)])
def test_nothing_is_chosen_from_empty_inputs(B: int, T: int, S: int) -> None:
    arrays = [jnp.asarray(x) for x in (*whole_numbers(0, B, T, 2, 4, S), np.int32(0))]
    chosen_BTk = SELECT(*arrays, jnp.full((B, T), S, jnp.int32), k=3)
    np.testing.assert_array_equal(chosen_BTk, np.full((B, T, 3), -1))


def test_no_gradient_passes_through_the_choice() -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = map(jnp.asarray, whole_numbers(0, 1, 2, 2, 4, 9))

    def loss(q_BTIJ: jax.Array) -> jax.Array:
        visible_BT = jnp.full((1, 2), 9, jnp.int32)
        chosen_BTk = SELECT(q_BTIJ, weights_BTI, keys_LBSJ, jnp.int32(0), visible_BT, k=3)
        return jnp.sum(q_BTIJ) * jnp.sum(chosen_BTk).astype(jnp.float32)

    # The sum of the chosen indices acts as a constant.
    grad_BTIJ = jax.grad(loss)(q_BTIJ)
    np.testing.assert_array_equal(grad_BTIJ, jnp.full_like(q_BTIJ, grad_BTIJ[0, 0, 0, 0]))
    assert float(grad_BTIJ[0, 0, 0, 0]) > 0


def hard_rows(S: int) -> dict[str, np.ndarray]:
    rng, at = np.random.default_rng(3), np.arange(S)
    zeros = rng.choice([0.0, -0.0], S)
    few = np.where(rng.permutation(S) < 5, rng.standard_normal(S), np.nan)
    return {
        "all equal": np.full(S, 2.5),
        "all equal and negative": np.full(S, -1.0),
        "all zero": np.zeros(S),
        "zeros of both signs": zeros,
        "zeros of both signs among negatives": np.where(at % 5 == 0, zeros, -1),
        "some NaN": np.where(rng.permutation(S) < 5, np.nan, rng.standard_normal(S)),
        "mostly NaN": few,
        "NaN of both signs": np.where(at % 3 == 0, np.nan, np.where(at % 3 == 1, -np.nan, 1)),
        "infinities": rng.choice([np.inf, -np.inf, 0, 1], S),
        "fewer finite than k": np.where(rng.permutation(S) < 20, 1, -np.inf),
        "ascending": at,
        "descending": -at,
        "an ulp apart": 1 + rng.integers(0, 2, S) * 2.0**-23,
        "near the smallest": rng.integers(-9, 10, S) * 1e-37,
        "near the largest": rng.uniform(-3e38, 3e38, S),
    }


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("visible", [64, 65, 320])
def test_hard_scores(visible: int, impl: str) -> None:
    rows = np.stack(list(hard_rows(320).values()))
    check(case_of(rows), np.full((len(rows), 1), visible), 64, impl)


def test_zeros_of_both_signs_are_equal() -> None:
    """Tests the choice alone: a score that is summed from 0 is never -0."""
    score_QS = jnp.asarray(np.where(np.arange(40) % 3 == 0, -0.0, 0.0), jnp.float32)[None]
    comparable_QS = reference.comparable(score_QS)
    chosen_Qk = reference.best(comparable_QS, jnp.full(1, 40, jnp.int32), 10)
    np.testing.assert_array_equal(chosen_Qk[0], np.arange(10))


@pytest.mark.parametrize("impl", FORMS)
def test_invisible_entries_may_be_garbage(impl: str) -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(5, 2, 3, 2, 4, 600)
    visible_BT = np.array([[0, 17, 90], [300, 301, 302]], np.int32)
    poisoned_LBSJ = keys_LBSJ.copy()
    poisoned_LBSJ[0] = np.nan
    poisoned_LBSJ[1, 0, 90:] = np.inf
    poisoned_LBSJ[1, 1, 302:] = np.nan
    run = lambda keys: SELECT(q_BTIJ, weights_BTI, keys, np.int32(1), visible_BT, k=16, impl=impl)
    np.testing.assert_array_equal(run(poisoned_LBSJ), run(keys_LBSJ))


@pytest.mark.parametrize("impl", FORMS)
def test_rows_of_a_batch_are_independent(impl: str) -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(6, 3, 2, 2, 4, 100)
    visible_BT = np.array([[3, 40], [100, 99], [0, 64]], np.int32)
    run = lambda b: SELECT(
        q_BTIJ[b], weights_BTI[b], keys_LBSJ[:, b], np.int32(1), visible_BT[b], k=8, impl=impl
    )
    batch = run(slice(None))
    for row in range(3):
        np.testing.assert_array_equal(run(slice(row, row + 1))[0], batch[row])


@pytest.mark.parametrize("impl", FORMS)
def test_bfloat16_products_are_summed_in_float32(impl: str) -> None:
    """Integers up to 3 are exact in bfloat16, their sums up to 8 * 9 * 3 are not."""
    case = whole_numbers(7, 1, 4, 4, 8, 300)
    arrays = [jnp.asarray(x) for x in (*case, np.int32(0), np.full((1, 4), 300, np.int32))]
    narrow = [x.astype(jnp.bfloat16) for x in arrays[:3]]
    np.testing.assert_array_equal(
        SELECT(*narrow, *arrays[3:], k=16, impl=impl), SELECT(*arrays, k=16, impl=impl)
    )


def test_random_scores_differ_only_where_rounding_decides() -> None:
    """float32 rounding of a sum of 8 x 64 terms moves a score by less than 1e-5 of the largest."""
    shape, S = SHAPES["bench"], 3000
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTIJ = jax.random.normal(keys[0], (1, 40, shape.heads, shape.head_dim))
    weights_BTI = jax.random.normal(keys[1], (1, 40, shape.heads))
    keys_LBSJ = jax.random.normal(keys[2], (1, 1, S, shape.head_dim))
    visible_BT = jnp.arange(40, dtype=jnp.int32)[None] * 75 + 1
    args = (q_BTIJ, weights_BTI, keys_LBSJ, jnp.int32(0), visible_BT)
    chosen = [np.asarray(SELECT(*args, k=shape.k, impl=impl))[..., None] for impl in FORMS]
    a, b = ((chosen_BTk1 == np.arange(S)).any(2) for chosen_BTk1 in chosen)
    np.testing.assert_array_equal(b.sum(-1), np.minimum(visible_BT, shape.k))
    score_BTS = np.asarray(reference.scores(q_BTIJ, weights_BTI, keys_LBSJ[0]))
    cut_BT1 = np.where(a, score_BTS, np.inf).min(-1, keepdims=True)
    off = np.broadcast_to(np.abs(score_BTS - cut_BT1), a.shape)[a != b]
    assert np.all(off <= 1e-5 * np.abs(score_BTS).max())


def test_gradient_of_the_scores_matches_the_formula() -> None:
    case = jax.tree.map(jnp.asarray, whole_numbers(8, 1, 2, 3, 4, 9))
    q_BTIJ, weights_BTI, keys_BSJ = case[0] + 0.5, case[1], case[2][0]
    grad_BTI = jax.grad(lambda w: jnp.sum(reference.scores(q_BTIJ, w, keys_BSJ)))(weights_BTI)
    dots = np.einsum("btij,bsj->btis", q_BTIJ, keys_BSJ)
    # Exact: halves and integers.
    np.testing.assert_array_equal(grad_BTI, np.maximum(dots, 0).sum(-1))


@pytest.mark.full_compilation
def test_temporaries_stay_small_at_65536_entries() -> None:
    """Products of all heads would be 1 GiB, and scores of all queries 128 MiB."""
    shape, S, T = SHAPES["bench"], 65536, 512
    f32, i32 = jnp.float32, jnp.int32
    arrays = [
        jax.ShapeDtypeStruct(dims, dtype)
        for dims, dtype in (
            ((1, T, shape.heads, shape.head_dim), f32),
            ((1, T, shape.heads), f32),
            ((2, 1, S, shape.head_dim), f32),
            ((), i32),
            ((1, T), i32),
        )
    ]
    memory = SELECT.lower(*arrays, k=shape.k, impl="xla").compile().memory_analysis()
    assert memory is not None
    # A block of scores and its copies.
    assert memory.temp_size_in_bytes <= 24 * 2**20


def test_an_unknown_form_is_refused_by_name() -> None:
    case = map(jnp.asarray, whole_numbers(0, 1, 1, 1, 1, 1))
    args = (*case, jnp.int32(0), jnp.ones((1, 1), jnp.int32))
    with pytest.raises(NotImplementedError, match=r"no 'none' form"):
        # Bypasses the annotation checks, which would reject it first.
        inspect.unwrap(indexer_topk.select)(*args, k=1, impl="none")
