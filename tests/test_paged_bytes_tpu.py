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

from pallas_kernels import dense_attention, indexer_topk, sparse_attention, targets, tpu_byte_rows
from pallas_kernels.byte_rows import FP4, FP8, Codec, Fp4Codec, Fp8Codec
from pallas_kernels.choice_log import choices, clear_choices
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import tpu as indexer_tpu
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import gpu as sparse_gpu
from pallas_kernels.sparse_attention import tpu_prefill
from tests import test_paged as paged
from tests import test_sparse_attention_gpu as sparse_on_gpu
from tests.kernels import interpreted
from tests.test_paged_bytes import in_codecs, normal, rounded
from tests.test_sparse_attention import decode_inputs, listed
from tests.test_sparse_attention_tpu import words_interpreted

# One rounding of weights near 1 relative to a different maximum, and one of the output.
CLOSE: Any = {"rtol": 2**-7, "atol": 2**-6}


@pytest.mark.parametrize("codec", [FP8, FP4])
def test_rows_are_decoded_as_elsewhere(codec: Codec) -> None:
    """Codes and scales from tiny to large."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, codec.channels)) * 2.0 ** rng.integers(-40, 30, (128, codec.channels))
    rows = codec.encode(rounded(jnp.asarray(x, jnp.bfloat16), codec))
    out = jax.ShapeDtypeStruct((128, codec.channels), jnp.bfloat16)
    kernel = functools.partial(tpu_byte_rows.decode, codec=codec)
    with interpreted():
        actual = np.asarray(jax.jit(pl.pallas_call(kernel, out_shape=out))(rows))
    expected = codec.decode(rows)
    expected = FP4.by_nibble(expected) if codec == FP4 else expected
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


def check(op: Any, inputs: dict[str, Any], pool: Any) -> None:
    """Compare with the reference."""
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
        check(op, inputs, in_codecs(FP8, 2, 320, 32)[0])


def listing(T: int, entries: int) -> dict[str, Any]:
    """Lists, each with the last entry."""
    indices_BTk = listed(0, 2, T, entries, 40)
    last = entries - 1
    indices_BTk[..., 0] = np.where((indices_BTk == last).any(-1), -1, last)
    return {"indices_BTk": jnp.asarray(indices_BTk)}


@pytest.mark.parametrize(("ring", "few"), [(True, 0), (False, 8192), (False, 1024)])
def test_sparse_attention(ring: bool, few: int) -> None:
    """Lists gathered, or all entries read under a mask, in two steps."""
    inputs = attention(2, ring=ring) | listing(2, 1088)
    op = sparse_attention.decode if ring else sparse_attention.prefill
    with mock.patch.object(tpu_prefill, "FEW", few):
        check(op, inputs, in_codecs(FP8, 2, 1088, 64)[0])


def test_prefill_of_fp8_rows() -> None:
    """Not in pages; in two steps, the second short."""
    pool, _ = in_codecs(FP8, 2, 1088, 1088)
    inputs = attention(2, ring=False) | listing(2, 1088)
    check(sparse_attention.prefill, inputs, sparse_attention.Fp8Rows(pool.pages[:, 1:]))


@pytest.mark.parametrize("size", [64, 2048])
def test_the_indexer(size: int) -> None:
    """Small whole numbers, whose scores are exact."""
    rng = np.random.default_rng(0)
    whole = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)
    pool, _ = in_codecs(FP4, 2, 4096, size)
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
    inputs["pool_LBSK"], _ = in_codecs(FP8, 2, 50, 8)
    np.testing.assert_allclose(*sparse_on_gpu.both("decode", inputs), **sparse_on_gpu.CLOSE)


def test_other_forms_and_pages_are_refused() -> None:
    codec = Fp8Codec(channels=512, rotated=32)
    inputs = attention(1, ring=True)
    visible_BT, indices_BTk = jnp.ones((2, 1), jnp.int32), jnp.zeros((2, 1, 8), jnp.int32)
    dense = functools.partial(dense_attention.decode, **inputs, visible_BT=visible_BT)
    sparse = functools.partial(sparse_attention.decode, **inputs, indices_BTk=indices_BTk)
    for run in (dense, sparse):
        with pytest.raises(Unsupported, match=r"takes pages in Fp8Codec.*rotated=64.*rotated=32"):
            run(pool_LBSK=in_codecs(codec, 2, 64, 32)[0], impl="tpu")
    args = normal(2, 1, 4, 64), normal(2, 1, 4), in_codecs(Fp4Codec(64), 2, 64, 32)[0]
    with pytest.raises(Unsupported, match=r"pages in Fp4Codec\(channels=128\), not in .*=64"):
        indexer_topk.select(*args, jnp.int32(0), visible_BT, k=2, impl="tpu")
    args = normal(2, 1, 4, 128), normal(2, 1, 4), in_codecs(FP4, 2, 64, 16)[0]
    with pytest.raises(Unsupported, match="of bytes is 32 or more, not 16"):
        indexer_topk.select(*args, jnp.int32(0), visible_BT, k=2, impl="tpu")


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", targets.TPU_TOPOLOGIES)
def test_prefill_of_512_tokens_compiles_without_copies(target: Any) -> None:
    """Into a context of 65536 tokens in Flash's pages, which take 10 MiB a layer at ratio 4."""
    struct, i32 = paged.struct, jnp.int32

    def pages(codec: Codec, ratio: int) -> Paged:
        rows = struct(1, 17, 4096 // ratio, codec.width, dtype=jnp.uint8)
        return Paged(rows, struct(1, 16, dtype=i32), codec)

    visible, layer = {"visible_BT": struct(1, 512, dtype=i32)}, {"layer": struct(dtype=i32)}
    queries = {"q_BTHK": struct(1, 512, 64, 512), "sink_H": struct(64, dtype=jnp.float32)} | layer
    queries |= {"window_BXK": struct(1, 640, 512), "start_B": struct(1, dtype=i32)}
    lists = {"indices_BTk": struct(1, 512, 512, dtype=i32)}
    index = {"q_BTIJ": struct(1, 512, 64, 128), "weights_BTI": struct(1, 512, 64)} | layer
    static = {"window": 128, "scale": paged.SCALE}
    dense_pool, pool = {"pool_LBSK": pages(FP8, 128)}, {"pool_LBSK": pages(FP8, 4)}
    for op, inputs in (
        (functools.partial(dense_attention.prefill, **static), queries | visible | dense_pool),
        (functools.partial(sparse_attention.prefill, **static), queries | lists | pool),
        (functools.partial(indexer_topk.select, k=512), index | visible | {"keys": pages(FP4, 4)}),
    ):
        clear_choices()
        compiled = targets.compiled(target, lambda inputs, op=op: op(**inputs), inputs)
        assert [choice.form for choice in choices()] == ["tpu"]
        assert targets.temporaries(compiled) < 32 * 2**20  # two copies of the indexer's queries
