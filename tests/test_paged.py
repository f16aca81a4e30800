"""Attention to pools in pages: all forms against NumPy or the reference, and compiled in full size.

Axis letters: as in test_dense_attention; N entries per page, P pages, M pages of a row's table.
"""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dense_attention, indexer_topk, sparse_attention, targets
from pallas_kernels.byte_rows import FP4, FP8, Codec
from pallas_kernels.choice_log import choices, clear_choices
from pallas_kernels.dense_attention import tpu as dense_tpu
from pallas_kernels.implementations import Unsupported
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import gpu, tpu_prefill
from tests import test_dense_attention as dense
from tests import test_dense_attention_tpu as dense_on_tpu
from tests import test_packed_attention as packed
from tests import test_sparse_attention as sparse
from tests import test_sparse_attention_gpu as sparse_on_gpu
from tests import test_sparse_attention_tpu as sparse_on_tpu

FORMS = ("reference", "xla")
SCALE = 0.04


def in_pages(pool_LBSK: Any, seen_BS: np.ndarray, size: int, seed: int = 0) -> Paged:
    """Entries that some query sees, in pages in any order.

    All others are NaN, and the table's numbers for pages without seen entries are those of no page.
    """
    (L, B, S, K), rng = pool_LBSK.shape, np.random.default_rng(seed)
    M = -(-S // size)
    missing = M * size - S
    pool_LBSK = np.where(seen_BS[None, ..., None], np.asarray(pool_LBSK), np.nan)
    pool_LBSK = np.pad(pool_LBSK, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=np.nan)
    table_BM = rng.permutation(B * M + 3)[: B * M].reshape(B, M)
    pages_LPNK = np.full((L, B * M + 3, size, K), np.nan, np.float32)
    pages_LPNK[:, table_BM.ravel()] = pool_LBSK.reshape(L, B * M, size, K)
    seen_BM = np.pad(seen_BS, ((0, 0), (0, missing))).reshape(B, M, size).any(2)
    table_BM = np.where(seen_BM, table_BM, rng.choice([-7, B * M + 3, 2**31 - 1], (B, M)))
    return Paged(jnp.asarray(pages_LPNK), jnp.asarray(table_BM, jnp.int32))


def dense_pages(case: Any, size: int, seed: int = 0) -> Any:
    """The case with its pool in pages."""
    index_S = np.arange(case.pool_LBSK.shape[2])
    hidden = getattr(case, "hidden_BT", np.zeros_like(case.visible_BT))
    seen_BTS = (index_S < case.visible_BT[..., None]) & (index_S >= hidden[..., None])
    return dataclasses.replace(
        case, pool_LBSK=in_pages(case.pool_LBSK, seen_BTS.any(1), size, seed)
    )


def sparse_pages(inputs: Any, size: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """The inputs with their pool in pages."""
    index_S = np.arange(inputs["pool_LBSK"].shape[2])
    seen_BS = np.stack([np.isin(index_S, indices) for indices in inputs["indices_BTk"]])
    pool = in_pages(inputs["pool_LBSK"], seen_BS, size, seed)
    return inputs | {"pool_LBSK": Paged(pool.pages.astype(dtype), pool.table)}


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("case", "size"),
    [
        (dense.decode_case(2, 3, 24, 30), 1),
        (dense.decode_case(3, 1, 16, 700), 32),
        (dense.prefill_case((0, 2, 1900), 140, 8, 500), 7),
        (packed.any_bounds(1, (0, 90), 30, 8, 300), 16),
    ],
)
def test_dense_attention_sees_window_and_visible_entries(case: Any, size: int, impl: str) -> None:
    np.testing.assert_allclose(dense_pages(case, size).run(impl), case.expected(), **dense.CLOSE)


@pytest.mark.parametrize("impl", FORMS)
def test_sparse_attention_sees_window_and_listed_entries(impl: str) -> None:
    inputs = sparse.decode_inputs(2, 8, 24, 30, 7)
    expected = sparse.expected(inputs, inputs["window_BRK"], inputs["window_mask_BTR"])
    actual = sparse.decode(sparse_pages(inputs, 7), impl)
    np.testing.assert_allclose(actual, expected, **dense.CLOSE)
    # Few entries are all read, under a mask, many are gathered.
    for entries, size in ((60, 7), (400, 32)):
        inputs = sparse.prefill_inputs((0, 2, 1000), 21, 8, entries, 9)
        expected = sparse.expected(inputs, inputs["window_BXK"], sparse.near(inputs))
        actual = sparse.prefill(sparse_pages(inputs, size), impl)
        np.testing.assert_allclose(actual, expected, **dense.CLOSE)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_table_leads_to_the_result_of_an_array(seed: int) -> None:
    """Exactly: pages change where entries are read, not what is computed."""
    case = dense.decode_case(2, 2, 12, 512, seed=seed)
    for size in (12, 32, 512):
        np.testing.assert_array_equal(dense_pages(case, size, seed).run("xla"), case.run("xla"))
    inputs = sparse.prefill_inputs((0, 90), 20, 8, 300, 9, seed)
    paged = sparse_pages(inputs, 12, seed=seed)
    np.testing.assert_array_equal(sparse.prefill(paged, "xla"), sparse.prefill(inputs, "xla"))


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (dense.decode_case(2, 2, 12, 300), 4),
        (dense.decode_case(1, 1, 4, 12), 4),
        (dense.decode_case(2, 1, 12, 300), 128),  # a page is two blocks
        (dense.decode_case(1, 1, 12, 100), 24),  # a page is three pieces
        (dense.prefill_case((0, 900), 140, 8, 200), 16),
        (packed.any_bounds(1, (0, 90), 30, 8, 300), 16),
    ],
)
def test_dense_attention_on_tpus(case: Any, size: int) -> None:
    """Interpreted, in blocks of 64 entries: several pages, the last block short, or parts."""
    with (
        mock.patch.object(dense_tpu, "_DECODE_ENTRIES", 64),
        mock.patch.object(dense_tpu, "_ENTRIES", 64),
    ):
        actual = dense_on_tpu.run(dense_pages(case, size), detect_races=True)
    np.testing.assert_allclose(actual, case.expected(), **dense.CLOSE)


def test_sparse_attention_on_tpus_with_lists_gathered() -> None:
    inputs = sparse_on_tpu.decode_inputs(B=2, T=1, k=20)
    sparse_on_tpu.check(sparse_pages(inputs, 16, jnp.bfloat16))
    inputs = sparse_on_tpu.prefill_inputs((3, 40), T=1, S=1040, k=20, last=True)
    with mock.patch.object(tpu_prefill, "FEW", 1024):
        sparse_on_tpu.check(sparse_pages(inputs, 16, jnp.bfloat16))


@pytest.mark.parametrize("size", [64, 2048])
def test_sparse_attention_on_tpus_under_a_mask(size: int) -> None:
    """Two steps of 1024 entries: many pages, the last beyond the pool, or parts of a page."""
    inputs = sparse_on_tpu.prefill_inputs((3, 40), T=9, S=1088, dtype=jnp.float32)
    sparse_on_tpu.check(sparse_pages(inputs, size), detect_races=True)


def test_sparse_attention_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MULTIPROCESSORS", 1)
    inputs = sparse_on_gpu.narrow(sparse.decode_inputs(2, 1, 20, 50, 40), 64, 128)
    actual, expected = sparse_on_gpu.both("decode", sparse_pages(inputs, 7, jnp.bfloat16))
    np.testing.assert_allclose(actual, expected, **sparse_on_gpu.CLOSE)


def test_pages_that_do_not_match_are_refused_by_name() -> None:
    case = dense_pages(dense.decode_case(2, 1, 4, 20), 4)
    pages, table = case.pool_LBSK.pages, case.pool_LBSK.table
    for pool, error, match in (
        (Paged(pages[..., :5], table), ValueError, r"pool_LBSK.pages_LPNK .*K=8\)"),
        (Paged(pages, table[:1]), ValueError, r"pool_LBSK.table_BM .*B=2"),
        (Paged(pages, table.astype(jnp.float32)), TypeError, "table_BM is float32"),
    ):
        with pytest.raises(error, match=match):
            dataclasses.replace(case, pool_LBSK=pool).run("xla")


def test_pages_that_tpu_kernels_do_not_take_are_refused() -> None:
    """With `impl='auto'`, XLA's form runs, and the reason is recorded."""
    decode = dense.decode_case(1, 1, 4, 48)
    narrow = lambda x: jnp.asarray(x, jnp.bfloat16)
    pool = dense_pages(decode, 3).pool_LBSK
    case = dataclasses.replace(decode, pool_LBSK=Paged(narrow(pool.pages), pool.table))
    with pytest.raises(Unsupported, match=r"bfloat16 with a multiple of 2 entries .* not with 3"):
        dense_on_tpu.run(case)
    inputs = sparse_pages(sparse_on_tpu.decode_inputs(B=1, T=1, S=96), 48, jnp.bfloat16)
    with pytest.raises(Unsupported, match=r"pages of 2\^n entries of bfloat16, 16 or more, not 48"):
        sparse_attention.decode(**inputs, scale=SCALE, impl="tpu")


def test_gradients_are_refused() -> None:
    case = dense_pages(dense.decode_case(1, 1, 4, 20), 4)
    run = jax.jit(functools.partial(dense_attention.decode, scale=SCALE))
    loss = lambda q_BTHK: jnp.sum(run(**{**vars(case), "q_BTHK": q_BTHK}))
    with pytest.raises(NotImplementedError, match=r"decode has no gradient with a pool in pages"):
        jax.grad(loss)(case.q_BTHK)


def struct(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)


def pages_of(tokens: int, ratio: int, codec: Codec, *, coded: bool) -> Paged:
    """Pages of 4096 tokens for 64 rows of Flash."""
    places = tokens // 4096
    width, dtype = (codec.width, jnp.uint8) if coded else (codec.channels, jnp.bfloat16)
    pages = struct(1, 64 * places, 4096 // ratio, width, dtype=dtype)
    return Paged(pages, struct(64, places, dtype=jnp.int32), codec if coded else None)


def program(name: str, tokens: int, *, coded: bool) -> tuple[Any, dict[str, Any]]:
    """An operation of decode, and its arguments for one token of each of 64 rows of Flash."""
    visible = {"visible_BT": struct(64, 1, dtype=jnp.int32)}
    if name == "indexer_topk":
        queries = {"q_BTIJ": struct(64, 1, 64, 128), "weights_BTI": struct(64, 1, 64)}
        keys = pages_of(tokens, 4, FP4, coded=coded)
        inputs = queries | {"keys": keys, "layer": struct(dtype=jnp.int32)} | visible
        return functools.partial(indexer_topk.select, k=512), inputs
    ratio = 4 if name == "sparse_attention" else 128
    inputs = {
        "q_BTHK": struct(64, 1, 64, 512),
        "window_BRK": struct(64, 136, 512),
        "window_mask_BTR": struct(64, 1, 136, dtype=jnp.bool_),
        "pool_LBSK": pages_of(tokens, ratio, FP8, coded=coded),
        "layer": struct(dtype=jnp.int32),
        "sink_H": struct(64, dtype=jnp.float32),
    }
    if name == "dense_attention":
        return functools.partial(dense_attention.decode, scale=SCALE), inputs | visible
    indices = {"indices_BTk": struct(64, 1, 512, dtype=jnp.int32)}
    return functools.partial(sparse_attention.decode, scale=SCALE), inputs | indices


@pytest.mark.full_compilation
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", ["sparse_attention", "dense_attention", "indexer_topk"])
@pytest.mark.parametrize("target", ["v5p", "v6e", "tpu7x", "h200"])
def test_64_rows_of_a_million_tokens_compile_without_copies(
    target: Any, name: str, coded: bool
) -> None:
    """A layer of entries takes 16 GiB at ratio 4 and 512 MiB at ratio 128, of index keys 4 GiB.

    Coded, they take 10 GiB, 320 MiB and 2 GiB.
    """
    op, inputs = program(name, 2**20, coded=coded)
    clear_choices()
    compiled = targets.compiled(target, lambda inputs: op(**inputs), inputs)
    assert targets.temporaries(compiled) < 64 * 2**20
    kernel = "gpu" if target == "h200" else "tpu"
    expected = "xla" if (target, name) == ("h200", "dense_attention") else kernel
    assert [choice.form for choice in choices()] == [expected]
