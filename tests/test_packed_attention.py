"""Rows that several documents share: each document attends as if it were alone.

Axis letters: as in test_dense_attention; D documents, k entries listed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dense_attention, sparse_attention
from pallas_kernels.dense_attention import xla_blocks
from pallas_kernels.implementations import Unsupported
from pallas_kernels.sparse_attention import gpu
from pallas_kernels.sparse_attention.inputs import PrefillInputs
from tests.test_dense_attention import CLOSE, SCALE, Prefill, attend, prefill_case
from tests.test_dense_attention_gradients import CLOSE as CLOSE_GRADIENTS

FORMS = ("reference", "xla")
D, T, WINDOW, RATIO, H, K, LISTED = 4, 40, 8, 4, 3, 8, 5
S = T // RATIO + D
DIFFERENTIATED = ("q_BTHK", "window_BXK", "pool_LBSK", "sink_H")
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Packed(Prefill):
    """A chunk of several documents, or with arbitrary bounds."""

    first_BT: Any
    hidden_BT: Any

    def near(self, b: int, t: int) -> np.ndarray:
        position_X = self.start_B[b] - self.window + np.arange(self.window_BXK.shape[1])
        return super().near(b, t) & (position_X >= self.first_BT[b, t])

    def expected(self) -> np.ndarray:
        out_BTHK = np.zeros(self.q_BTHK.shape)
        for b, t in np.ndindex(*self.visible_BT.shape):
            keys = [self.window_BXK[b][self.near(b, t)]]
            if self.pool_LBSK is not None:
                entries = slice(self.hidden_BT[b, t], self.visible_BT[b, t])
                keys.append(self.pool_LBSK[self.layer, b, entries])
            out_BTHK[b, t] = attend(self.q_BTHK[b, t], np.concatenate(keys), self.sink_H)
        return out_BTHK

    def seen_entries(self) -> np.ndarray:
        """For each row of the batch, the entries that some query sees."""
        index_S = np.arange(self.pool_LBSK.shape[2])
        seen_BTS = (index_S >= self.hidden_BT[..., None]) & (index_S < self.visible_BT[..., None])
        return seen_BTS.any(1)

    def garbled(self) -> "Packed":
        """The same case with NaN in all that no query sees."""
        window, queries = self.window_BXK.copy(), range(self.q_BTHK.shape[1])
        for b in range(len(window)):
            window[b, ~np.any([self.near(b, t) for t in queries], axis=0)] = np.nan
        changed: Arrays = {"window_BXK": window}
        if self.pool_LBSK is not None:
            changed["pool_LBSK"] = pool = self.pool_LBSK.copy()
            pool[0], pool[1][~self.seen_entries()] = np.nan, np.nan
        return dataclasses.replace(self, **changed)


def any_bounds(seed: int, starts: tuple[int, ...], *sizes: int, **more: int) -> Packed:
    """Each query has its own bounds, in no order; some see no key, some no entry."""
    case, rng = prefill_case(starts, *sizes, seed=seed, **more), np.random.default_rng(seed)
    entries = 0 if case.pool_LBSK is None else case.pool_LBSK.shape[2]
    shape = case.visible_BT.shape
    draw = lambda low, high: rng.integers(low, high, shape).astype(np.int32)
    first_BT = case.start_B[:, None] + np.arange(shape[1], dtype=np.int32)
    first_BT -= draw(-1, case.window + 2)
    first_BT[:, ::7], first_BT[:, 3::7] = 2**31 - 1, -(2**31)
    bounds = {"first_BT": first_BT, "hidden_BT": draw(0, entries + 1)}
    return Packed(**(vars(case) | bounds | {"visible_BT": draw(0, entries + 1)}))


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    with mock.patch.multiple(xla_blocks, QUERIES=16, _ENTRIES=4):
        yield


@pytest.mark.parametrize("impl", FORMS)
def test_each_query_has_bounds_of_its_own(impl: Any) -> None:
    @settings(deadline=None, max_examples=5)
    @given(seed=st.integers(0, 2**32 - 1), starts=st.tuples(*[st.integers(0, 99)] * 2))
    def check(seed: int, starts: tuple[int, int]) -> None:
        case = any_bounds(seed, starts, 21, WINDOW, 30).garbled()
        np.testing.assert_allclose(case.run(impl), case.expected(), **CLOSE)

    with small_blocks():
        check()


@dataclasses.dataclass(frozen=True)
class Documents:
    """Up to D documents, which share one row or have a row each.

    Attributes:
      start: position of the row's first token.
      offset_D: offset of each document in the row.
      length_D: tokens of each document; 0 where there are fewer documents.
      entry_D: first entry of each document; an entry that no query sees comes before it.
    """

    start: int
    offset_D: np.ndarray
    length_D: np.ndarray
    entry_D: np.ndarray

    @property
    def own_DT(self) -> np.ndarray:
        t_T = np.arange(T)
        ends = (self.offset_D + self.length_D)[:, None]
        return (t_T >= self.offset_D[:, None]) & (t_T < ends)

    @property
    def own_DS(self) -> np.ndarray:
        s_S, ends = np.arange(S), (self.entry_D + self.length_D // RATIO)[:, None]
        return (s_S >= self.entry_D[:, None]) & (s_S < ends)

    def alone(self, x: np.ndarray, own: np.ndarray, fill: float = 0) -> np.ndarray:
        """Each document's part of a row [T or S, ...], moved to the front of a row of its own."""
        out = np.full((D, *x.shape), fill, x.dtype)
        for d in range(D):
            out[d, : own[d].sum()] = x[own[d]]
        return out

    def joined(self, x: Any, own: np.ndarray) -> np.ndarray:
        """The inverse of `alone`; 0 where there is no document."""
        x = np.asarray(x)
        out = np.zeros(x.shape[1:], x.dtype)
        for d in range(D):
            out[own[d]] = x[d, : own[d].sum()]
        return out


def documents(start: int, cuts: set[int]) -> Documents:
    edges = [0, *sorted(cuts), T]
    length_D = np.zeros(D, int)
    length_D[: len(edges) - 1] = np.diff(edges)
    entries = length_D // RATIO + 1
    offset_D = np.cumsum(length_D) - length_D
    return Documents(start, offset_D, length_D, np.cumsum(entries) - entries + 1)


def inputs(seed: int, row: Documents, lists: bool) -> tuple[Arrays, Arrays]:
    """Inputs of the shared row, and of its documents alone; what no query sees is NaN."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q_THK, keys_TK, pool_SK = normal(T, H, K), normal(T, K), normal(S, K)
    pool_SK[~row.own_DS.any(0)] = np.nan
    document_T = row.own_DT.argmax(0)
    visible_T = (np.arange(T) - row.offset_D[document_T] + 1) // RATIO
    before = lambda keys: np.concatenate(
        [np.full((len(keys), WINDOW, K), np.nan, np.float32), keys], axis=1
    )
    shared = {"layer": np.int32(0), "sink_H": normal(H)}
    packed = shared | {
        "q_BTHK": q_THK[None],
        "window_BXK": before(keys_TK[None]),
        "start_B": np.array([row.start], np.int32),
        "pool_LBSK": pool_SK[None, None],
        "first_BT": (row.start + row.offset_D[document_T])[None].astype(np.int32),
    }
    alone = shared | {
        "q_BTHK": row.alone(q_THK, row.own_DT),
        "window_BXK": before(row.alone(keys_TK, row.own_DT)),
        "start_B": np.zeros(D, np.int32),
        "pool_LBSK": row.alone(pool_SK, row.own_DS, np.nan)[None],
    }
    hidden_T = row.entry_D[document_T]
    if not lists:
        visible_DT = row.alone(visible_T, row.own_DT).astype(np.int32)
        bounds = {"hidden_BT": hidden_T, "visible_BT": hidden_T + visible_T}
        bounds = {name: x[None].astype(np.int32) for name, x in bounds.items()}
        return packed | bounds, alone | {"visible_BT": visible_DT}
    list_Tk = rng.permuted(np.tile(np.arange(S), (T, 1)), axis=1)[:, :LISTED]
    list_Tk = np.where(list_Tk < visible_T[:, None], list_Tk, -1)
    shifted_Tk = np.where(list_Tk >= 0, list_Tk + hidden_T[:, None], -1)
    listed_DTk = row.alone(list_Tk, row.own_DT, -1).astype(np.int32)
    return (
        packed | {"indices_BTk": shifted_Tk[None].astype(np.int32)},
        alone | {"indices_BTk": listed_DTk},
    )


def pulled(arrays: Arrays, grad_BTHK: Any, *, op: Any, impl: str) -> tuple[Any, Arrays]:
    """The output, and gradients with respect to `DIFFERENTIATED`."""
    fixed = {name: x for name, x in arrays.items() if name not in DIFFERENTIATED}
    run = functools.partial(op.prefill, **fixed, window=WINDOW, scale=SCALE, impl=impl)
    out, pull = jax.vjp(
        lambda primals: run(**primals), {name: arrays[name] for name in DIFFERENTIATED}
    )
    return out, pull(grad_BTHK)[0]


def assert_as_if_alone(run: Any, lists: bool, seed: int, row: Documents) -> None:
    packed, alone = inputs(seed, row, lists)
    grad_THK = np.random.default_rng(seed + 1).standard_normal((T, H, K)).astype(np.float32)
    actual_BTHK, actual = run(packed, grad_THK[None])
    out_DTHK, expected = run(alone, row.alone(grad_THK, row.own_DT))
    np.testing.assert_allclose(actual_BTHK[0], row.joined(out_DTHK, row.own_DT), **CLOSE)
    after = np.s_[:, WINDOW:]
    pairs = {
        "q": (actual["q_BTHK"][0], row.joined(expected["q_BTHK"], row.own_DT)),
        "keys": (
            actual["window_BXK"][after][0],
            row.joined(expected["window_BXK"][after], row.own_DT),
        ),
        "pool": (actual["pool_LBSK"][0, 0], row.joined(expected["pool_LBSK"][0], row.own_DS)),
        "sink": (actual["sink_H"], expected["sink_H"]),
    }
    for name, (x, y) in pairs.items():
        np.testing.assert_allclose(x, y, **CLOSE_GRADIENTS, err_msg=name)
    np.testing.assert_array_equal(actual["window_BXK"][:, :WINDOW], 0)
    # Gradients of one document's outputs are exactly 0 outside of that document.
    d = seed % np.count_nonzero(row.length_D)
    own_T, own_S = row.own_DT[d], row.own_DS[d]
    _, one_document = run(packed, grad_THK[None] * own_T[None, :, None, None])
    np.testing.assert_array_equal(one_document["q_BTHK"][0, ~own_T], 0)
    np.testing.assert_array_equal(one_document["window_BXK"][after][0, ~own_T], 0)
    np.testing.assert_array_equal(one_document["pool_LBSK"][0, 0, ~own_S], 0)


@pytest.mark.parametrize("op", [dense_attention, sparse_attention])
@pytest.mark.parametrize("impl", FORMS)
def test_documents_of_a_row_are_as_if_alone(op: Any, impl: str) -> None:
    # All draws share its programs.
    run = jax.jit(functools.partial(pulled, op=op, impl=impl))

    @settings(deadline=None, max_examples=8)
    @given(
        seed=st.integers(0, 2**32 - 1),
        start=st.integers(0, 3000),
        cuts=st.sets(st.integers(1, T - 1), max_size=D - 1),
    )
    def check(seed: int, start: int, cuts: set[int]) -> None:
        assert_as_if_alone(run, op is sparse_attention, seed, documents(start, cuts))

    with small_blocks():
        check()


def test_gpu_kernel_of_listed_entries_refuses_documents() -> None:
    arrays, _ = inputs(0, documents(0, {7}), True)
    run = functools.partial(gpu.prefill, window=WINDOW, scale=SCALE)
    with pytest.raises(Unsupported, match="does not take first_BT"):
        jax.eval_shape(run, PrefillInputs(**arrays))
