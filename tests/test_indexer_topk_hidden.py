"""Queries that see only entries hidden to visible - 1, as in a row of several documents.

Axis letters: B batch, T queries, I index heads, J index head dim, S entries, k entries chosen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import indexer_topk, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import reference
from pallas_kernels.indexer_topk.shapes import SHAPES
from pallas_kernels.indexer_topk.tpu import blocks_seen
from tests.kernels import interpreted
from tests.test_indexer_topk import FORMS, SELECT, case_of, hard_rows, oracle, whole_numbers
from tests.test_indexer_topk_tpu import QUICK, TPUS, compiled, full_size, narrow

COUNTS = st.lists(st.integers(0, 620), min_size=6, max_size=6)


def arrays(*case: Any, visible: Any, hidden: Any, layer: int = 1) -> list[Any]:
    counts = (np.asarray(x, np.int32) for x in (visible, hidden))
    return [jax.tree.map(jnp.asarray, x) for x in (*case, np.int32(layer), *counts)]


def expected_choice(score_S: np.ndarray, visible: int, hidden: int, k: int) -> np.ndarray:
    """The oracle's choice among the entries that are left without the hidden ones."""
    chosen_k = oracle(score_S[hidden:visible], len(score_S), k)
    return np.where(chosen_k < 0, -1, chosen_k + hidden)


def check(case: Any, visible_BT: Any, hidden_BT: Any, k: int, impl: str) -> None:
    """Assert that `select` in layer 1 makes the oracle's choice."""
    q_BTIJ, weights_BTI, keys_LBSJ = case
    actual_BTk = SELECT(*arrays(*case, visible=visible_BT, hidden=hidden_BT), k=k, impl=impl)
    dots_BTIS = np.einsum("btij,bsj->btis", q_BTIJ, keys_LBSJ[1])
    score_BTS = np.einsum("btis,bti->bts", np.maximum(dots_BTIS, 0), weights_BTI)
    for at in np.ndindex(*visible_BT.shape):
        chosen_k = expected_choice(score_BTS[at], int(visible_BT[at]), int(hidden_BT[at]), k)
        np.testing.assert_array_equal(actual_BTk[at], chosen_k)


@pytest.mark.parametrize("impl", FORMS)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), visible=COUNTS, hidden=COUNTS)
def test_any_counts(impl: str, seed: int, visible: list[int], hidden: list[int]) -> None:
    """Mostly equal scores on both sides of the cut; sometimes more hidden than there are."""
    visible_BT, hidden_BT = (np.array(x).reshape(2, 3) for x in (visible, hidden))
    check(whole_numbers(seed, 2, 3, 2, 4, 600), visible_BT, hidden_BT, 16, impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("visible", [104, 105, 320])
def test_hard_scores(visible: int, impl: str) -> None:
    """Hidden entries rank below a score of -inf."""
    rows = np.stack(list(hard_rows(320).values()))
    counts = [np.full((len(rows), 1), n) for n in (visible, 40)]
    actual_BTk = SELECT(
        *arrays(*case_of(rows), visible=counts[0], hidden=counts[1], layer=0), k=64, impl=impl
    )
    for row, chosen_Tk in zip(rows, actual_BTk, strict=True):
        np.testing.assert_array_equal(
            chosen_Tk[0], expected_choice(row.astype(np.float32), visible, 40, 64)
        )


@pytest.mark.parametrize("impl", FORMS)
def test_counts_out_of_range(impl: str) -> None:
    """In a sum or difference, some of these bounds would overflow an int32."""
    least, most = -(2**31), 2**31 - 1
    visible, hidden = [300, 300, 300, most, least, most], [least, -1, 300, most, most, 299]
    case = case_of(np.tile(np.arange(300), (6, 1)))
    args = arrays(*case, visible=np.c_[visible], hidden=np.c_[hidden], layer=0)
    none, all_seen = [-1, -1], [298, 299]
    chosen_Bk = SELECT(*args, k=2, impl=impl)[:, 0]
    np.testing.assert_array_equal(chosen_Bk, [all_seen, all_seen, none, none, none, [299, -1]])


@pytest.mark.parametrize("impl", FORMS)
def test_hidden_entries_may_be_garbage(impl: str) -> None:
    """Including entire blocks of keys."""
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(5, 1, 3, 2, 4, 1400)
    counts: Any = {"visible": [[1000, 1390, 700]], "hidden": [[701, 900, 800]]}
    poisoned_LBSJ = keys_LBSJ.copy()
    poisoned_LBSJ[1, :, :701] = np.nan
    run = lambda keys: SELECT(*arrays(q_BTIJ, weights_BTI, keys, **counts), k=16, impl=impl)
    np.testing.assert_array_equal(run(poisoned_LBSJ), run(keys_LBSJ))


@pytest.mark.parametrize("impl", FORMS)
def test_hiding_nothing_changes_nothing(impl: str) -> None:
    case = whole_numbers(2, 2, 2, 2, 4, 300)
    args = arrays(*case, visible=[[300, 9], [0, 70]], hidden=np.zeros((2, 2)))
    np.testing.assert_array_equal(
        SELECT(*args, k=16, impl=impl), SELECT(*args[:-1], k=16, impl=impl)
    )


# Among 5120 entries the first block of queries sees both blocks of keys, the second only one.
VISIBLE = [10, 200, 600, 3000, 4096, 4097, 4200, 4224, 4220, 4200, 4224]
HIDDEN = [0, 7, 600, 2900, 4000, 4090, 4100, 4096, 4100, 4199, 4224]


def kernel(*args: Any, k: int, **params: Any) -> np.ndarray:
    """The TPU kernel's choice, every access checked; a fresh trace, as `interpreted` requires."""
    select = functools.partial(indexer_topk.select, k=k, impl="tpu")
    with interpreted(**params):
        chosen_BTk = np.asarray(jax.jit(select, compiler_options=QUICK)(*args))
    return chosen_BTk


@pytest.mark.parametrize("name", ["bfloat16", "fp8, E8M0 scales", "fp4", "pages"])
def test_the_tpu_kernel_makes_the_references_choice(name: str) -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(4, 1, 11, 8, 64, 5120)
    args = arrays(
        q_BTIJ, weights_BTI, narrow(name, keys_LBSJ, 1024), visible=[VISIBLE], hidden=[HIDDEN]
    )
    args[0] = args[0].astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel(*args, k=64), reference.select(*args, k=64))


def test_hard_scores_in_the_tpu_kernel() -> None:
    rows = list(hard_rows(320).values())
    q_BTIJ, weights_BTI, keys_LBSJ = case_of(np.stack(rows))
    visible, hidden = (104, 105, 320), (40, 40, 0)
    repeated = [np.repeat(x, 3, axis=1) for x in (q_BTIJ, weights_BTI)]
    counts = [np.tile(x, (len(rows), 1)) for x in (visible, hidden)]
    args = arrays(*repeated, keys_LBSJ, visible=counts[0], hidden=counts[1], layer=0)
    for row, chosen_Tk in zip(rows, kernel(*args, k=64), strict=True):
        score_S = row.astype(np.float32)
        expected = [
            expected_choice(score_S, n, h, 64) for n, h in zip(visible, hidden, strict=True)
        ]
        np.testing.assert_array_equal(chosen_Tk, expected)


def test_two_cores_do_not_race() -> None:
    case = whole_numbers(3, 1, 9, 4, 8, 4200)
    args = arrays(*case, visible=[[4200] * 9], hidden=[[7] * 8 + [4100]])
    chosen_BTk = kernel(*args, k=16, detect_races=True, num_cores_or_threads=2)
    np.testing.assert_array_equal(chosen_BTk, reference.select(*args, k=16))


def test_key_blocks_that_no_query_of_a_block_sees_are_skipped() -> None:
    visible, hidden = [*VISIBLE, *[4224] * 5, 3000, 100], [*HIDDEN, *[4224] * 5, 3000, 2**31 - 1]
    visible_BT, hidden_BT = (jnp.asarray([x], jnp.int32) for x in (visible, hidden))
    blocks_BN, first_BN = blocks_seen(visible_BT, hidden_BT, 8, 1024)[1::2]
    np.testing.assert_array_equal(first_BN, [[0, 4, 0]])
    np.testing.assert_array_equal(blocks_BN, [[5, 1, 0]])


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TPUS)
def test_a_prompt_of_documents_compiles_without_extra_temporaries(target: Any) -> None:
    structs = *full_size("flash", 1, 4096), jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    program = compiled(target, SHAPES["flash"].k, structs)
    assert targets.temporaries(program) <= 80 * 2**20


def test_forms_that_cannot_hide_entries_say_so_and_auto_skips_them() -> None:
    structs = *full_size("bench", 1, 4, S=1024), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    with pytest.raises(Unsupported, match="hidden_BT"):
        jax.eval_shape(functools.partial(indexer_topk.select, k=8, impl="gpu"), *structs)
    with pytest.raises(NotImplementedError, match="select_sharded does not take hidden_BT"):
        jax.eval_shape(functools.partial(indexer_topk.select_sharded, k=8, axis="x"), *structs)
    program = targets.lowered("h200", functools.partial(indexer_topk.select, k=8), *structs)
    assert "mosaic_gpu" not in program.as_text()
