"""TPU and GPU kernels on pages of entries as bytes, interpreted, against the reference.

Axis letters: as in test_paged_bytes.
"""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import dense_attention, indexer_topk, sparse_attention, tpu_byte_rows
from pallas_kernels.byte_rows import FP4, FP8, Form, Fp4Form, Fp8Form
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import tpu as indexer_tpu
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import gpu as sparse_gpu
from pallas_kernels.sparse_attention import tpu_prefill
from tests import test_paged as paged
from tests import test_sparse_attention_gpu as sparse_on_gpu
from tests.kernels import interpreted
from tests.test_paged_bytes import in_forms, normal, rounded
from tests.test_sparse_attention import decode_inputs, listed
from tests.test_sparse_attention_tpu import words_interpreted

# One rounding of weights near 1 relative to a different maximum, and one of the output.
CLOSE: Any = {"rtol": 2**-7, "atol": 2**-6}


@pytest.mark.parametrize("form", [FP8, FP4])
def test_rows_are_decoded_as_elsewhere(form: Form) -> None:
    """Codes and scales from tiny to large."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, form.channels)) * 2.0 ** rng.integers(-40, 30, (128, form.channels))
    rows = form.encode(rounded(jnp.asarray(x, jnp.bfloat16), form))
    out = jax.ShapeDtypeStruct((128, form.channels), jnp.bfloat16)
    kernel = functools.partial(tpu_byte_rows.decode, form=form)
    with interpreted():
        actual = np.asarray(jax.jit(pl.pallas_call(kernel, out_shape=out))(rows))
    expected = form.decode(rows)
    expected = FP4.by_nibble(expected) if form == FP4 else expected
    np.testing.assert_array_equal(actual, expected)


def attention(T: int, *, ring: bool) -> dict[str, Any]:
    """Arguments but the pool and what is seen of it."""
    B, H, R = 2, 16, 24
    window = {"window_BRK": normal(B, R, 512, seed=2), "window_mask_BTR": jnp.ones((B, T, R), bool)}
    if not ring:
        window = {"window_BXK": normal(B, R + T, 512, seed=2), "window": R}
        window |= {"start_B": jnp.array([3, 50], jnp.int32)}
    shared = {"q_BTHK": normal(B, T, H, 512), "sink_H": normal(H, dtype=jnp.float32)}
    return window | shared | {"layer": jnp.int32(1), "scale": paged.SCALE}


def check(op: Any, inputs: dict[str, Any], size: int, entries: int) -> None:
    """Compare with the reference, on pages of `size` entries."""
    pool, _ = in_forms(FP8, 2, entries, size)
    run = lambda impl: jax.jit(functools.partial(op, **inputs, impl=impl))(pool_LBSK=pool)
    with words_interpreted():
        actual = np.asarray(run("tpu"), np.float32)
    np.testing.assert_allclose(actual, np.asarray(run("reference"), np.float32), **CLOSE)


@pytest.mark.parametrize("ring", [True, False])
def test_dense_attention(ring: bool) -> None:
    """Several blocks of entries, the last one short."""
    T = 2 if ring else 20
    inputs = attention(T, ring=ring) | {"visible_BT": jnp.tile(jnp.array([[300], [77]]), (1, T))}
    op = dense_attention.decode if ring else dense_attention.prefill
    with (
        mock.patch.object(paged.dense_tpu, "_DECODE_ENTRIES", 128),
        mock.patch.object(paged.dense_tpu, "_ENTRIES", 128),
    ):
        check(op, inputs, 32, 320)


@pytest.mark.parametrize(("ring", "few"), [(True, 0), (False, 8192), (False, 1024)])
def test_sparse_attention(ring: bool, few: int) -> None:
    """Lists gathered, or all entries read under a mask, in two steps."""
    T = 2
    indices_BTk = listed(0, 2, T, 1088, 40)
    indices_BTk[..., 0] = np.where((indices_BTk == 1087).any(-1), -1, 1087)
    inputs = attention(T, ring=ring) | {"indices_BTk": jnp.asarray(indices_BTk)}
    op = sparse_attention.decode if ring else sparse_attention.prefill
    with mock.patch.object(tpu_prefill, "FEW", few):
        check(op, inputs, 64, 1088)


@pytest.mark.parametrize("size", [64, 2048])
def test_the_indexer(size: int) -> None:
    """Small whole numbers, whose scores are exact."""
    rng = np.random.default_rng(0)
    whole = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)
    pool, _ = in_forms(FP4, 2, 4096, size)
    keys = Paged(FP4.encode(whole(*pool.pages.shape[:3], 128)), pool.table, FP4)
    seen = jnp.int32(1), jnp.array([[4096, 20, 77], [2999, 128, 1]], jnp.int32)
    run = lambda impl: jax.jit(functools.partial(indexer_topk.select, k=64, impl=impl))
    args = whole(2, 3, 4, 128), whole(2, 3, 4), keys, *seen
    with mock.patch.object(indexer_tpu, "_KEYS_OF_FEW", 1024), interpreted():
        actual = np.asarray(run("tpu")(*args))
    np.testing.assert_array_equal(actual, run("reference")(*args))


def test_sparse_attention_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_gpu, "_MULTIPROCESSORS", 1)
    inputs = sparse_on_gpu.narrow(decode_inputs(2, 1, 20, 50, 40), 64, 512)
    inputs["pool_LBSK"], _ = in_forms(FP8, 2, 50, 8)
    np.testing.assert_allclose(*sparse_on_gpu.both("decode", inputs), **sparse_on_gpu.CLOSE)


def test_other_forms_and_pages_are_refused() -> None:
    form = Fp8Form(channels=512, rotated=32)
    inputs = attention(1, ring=True)
    visible_BT, indices_BTk = jnp.ones((2, 1), jnp.int32), jnp.zeros((2, 1, 8), jnp.int32)
    dense = functools.partial(dense_attention.decode, **inputs, visible_BT=visible_BT)
    sparse = functools.partial(sparse_attention.decode, **inputs, indices_BTk=indices_BTk)
    for run in (dense, sparse):
        with pytest.raises(Unsupported, match=r"takes pages in Fp8Form.*rotated=64.*rotated=32"):
            run(pool_LBSK=in_forms(form, 2, 64, 32)[0], impl="tpu")
    args = normal(2, 1, 4, 64), normal(2, 1, 4), in_forms(Fp4Form(64), 2, 64, 32)[0]
    with pytest.raises(Unsupported, match=r"pages in Fp4Form\(channels=128\), not in .*=64"):
        indexer_topk.select(*args, jnp.int32(0), visible_BT, k=2, impl="tpu")
    args = normal(2, 1, 4, 128), normal(2, 1, 4), in_forms(FP4, 2, 64, 16)[0]
    with pytest.raises(Unsupported, match="of bytes is 32 or more, not 16"):
        indexer_topk.select(*args, jnp.int32(0), visible_BT, k=2, impl="tpu")
