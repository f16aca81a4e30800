"""TPU attention kernels on rows that several documents share: interpreted on CPU against the
reference, and compiled for chips that are not attached.

Axis letters: as in the packages.
"""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention, sparse_attention, targets
from pallas_kernels.dense_attention import tpu as dense_tpu
from pallas_kernels.sparse_attention import tpu_prefill
from tests import test_dense_attention_gradients_tpu as dense_gradients
from tests import test_dense_attention_tpu as dense
from tests import test_sparse_attention_gradients_tpu as sparse_gradients
from tests import test_sparse_attention_tpu as sparse
from tests.test_dense_attention import CLOSE
from tests.test_packed_attention import Packed, any_bounds


def documents() -> Packed:
    """Three in a row of 300 tokens, one entry per four tokens; what no query sees is NaN.

    The last begins at the start of a block of queries and sees none of the pool's first 512
    entries.
    """
    case, t_T = any_bounds(0, (3,), 300, 8, 1104), np.arange(300)
    offset_T = np.repeat([0, 20, 128], [20, 108, 172])
    hidden_T = np.repeat([1, 7, 1030], [20, 108, 172])
    bounds = {
        "first_BT": 3 + offset_T,
        "hidden_BT": hidden_T,
        "visible_BT": hidden_T + (t_T - offset_T + 1) // 4,
    }
    bounds = {name: x_T[None].astype(np.int32) for name, x_T in bounds.items()}
    return dataclasses.replace(case, **bounds).garbled()


@pytest.mark.parametrize(
    "case",
    [
        any_bounds(0, (5,), 140, 8, 0).garbled(),
        any_bounds(1, (0, 90), 140, 8, 700).garbled(),
        any_bounds(2, (30,), 1, 4, 5).garbled(),
    ],
)
def test_dense_attention_with_arbitrary_bounds(case: Packed) -> None:
    np.testing.assert_allclose(dense.run(case), case.expected(), **CLOSE)


def test_dense_attention_skips_earlier_documents_and_cores_do_not_race() -> None:
    case = documents()
    actual_BTHK = dense.run(case, detect_races=True, num_cores_or_threads=2)
    np.testing.assert_allclose(actual_BTHK, case.expected(), **CLOSE)


def test_gradients_of_dense_attention_skip_earlier_documents() -> None:
    dense_gradients.assert_same(documents())


INTEGERS = jax.ShapeDtypeStruct((1, 4096), jnp.int32)


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", ["v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("S", [0, 1024])
def test_dense_attention_of_packed_rows_compiles(target: Any, S: int) -> None:
    inputs = dense.full_prefill("flash", 4096, S)
    inputs = inputs._replace(first_BT=INTEGERS, hidden_BT=INTEGERS)
    dense.assert_compiles(target, dense_attention.prefill, inputs, window=128)


@pytest.mark.parametrize(
    "case",
    [
        any_bounds(0, (5,), 140, 8, 0).garbled(),
        any_bounds(1, (7,), 140, 8, 272).garbled(),
        any_bounds(2, (0, 30), 9, 4, 5).garbled(),
    ],
)
def test_gradients_of_dense_attention_with_arbitrary_bounds(case: Packed) -> None:
    dense_gradients.assert_same(case)


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", ["v5p", "v6e", "tpu7x"])
def test_gradients_of_dense_attention_of_packed_rows_compile(target: Any) -> None:
    structs = dense_gradients.full("flash", 1024, first_BT=INTEGERS, hidden_BT=INTEGERS)
    run = functools.partial(dense_tpu.prefill_backward, window=128, scale=512**-0.5)
    program = targets.compiled(target, run, *structs)
    assert "tpu_custom_call" in str(program.as_text())
    # As without documents.
    assert targets.temporaries(program) <= 2 * 1024 * 512 * 4 + 28e6


def listing(seed: int, starts: tuple[int, ...], T: int, **sizes: Any) -> sparse.Inputs:
    """Each query's window begins anywhere; keys that no query sees are NaN."""
    inputs = sparse.prefill_inputs(starts, T, seed=seed, **sizes)
    window, rng = sparse.window_of(inputs), np.random.default_rng(seed)
    own_BT = np.array(starts)[:, None] + np.arange(T)
    first_BT = own_BT - rng.integers(-1, window + 2, own_BT.shape)
    position_BX = np.array(starts)[:, None] - window + np.arange(window + T)
    near_BTX = sparse.near(inputs | {"start_B": np.array(starts)}) & (
        position_BX[:, None] >= first_BT[..., None]
    )
    keys_BX1 = jnp.asarray(near_BTX.any(1))[..., None]
    changed = {"window_BXK": jnp.where(keys_BX1, inputs["window_BXK"], jnp.nan)}
    return inputs | changed | {"first_BT": jnp.asarray(first_BT, jnp.int32)}


def test_sparse_attention_among_few_entries() -> None:
    # Two blocks of queries, the second short.
    check = functools.partial(sparse.check, detect_races=True, num_cores_or_threads=2)
    check(listing(0, (3,), 18, dtype=jnp.float32))


def test_sparse_attention_among_many_entries() -> None:
    with mock.patch.object(tpu_prefill, "FEW", 1024):
        sparse.check(listing(1, (3, 40), 3, S=1040, last=True))


def test_gradients_of_sparse_attention() -> None:
    sparse_gradients.check(listing(2, (3,), 18, S=272, dtype=jnp.float32))


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", ["v5p", "v6e", "tpu7x"])
def test_sparse_attention_of_packed_rows_compiles(target: Any) -> None:
    inputs = sparse.structs("flash", 4096, 1024, chunk=True) | {"first_BT": INTEGERS}
    program = sparse.program(target, sparse_attention.prefill, inputs, window=128)
    # The entries' indices in another layout, and `first_BT` in tiles of eight rows. For v5p, the
    # compiler of JAX 0.12 keeps these tiles twice: 8.78 MB in all, with 0.10 it was 8.62.
    copies = 2 if target == "v5p" and jax.__version_info__ >= (0, 12) else 1
    assert targets.temporaries(program) <= 4096 * 512 * 4 + copies * 4096 * 8 * 4 + 2e5
    inputs = sparse_gradients.chunk("flash", 1024) | {"first_BT": INTEGERS}
    program = targets.compiled(target, sparse_gradients.backward, inputs)
    assert "tpu_custom_call" in str(program.as_text())
    assert targets.temporaries(program) <= 2 * 1024 * 512 * 4 + 28e6
