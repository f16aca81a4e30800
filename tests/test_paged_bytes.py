"""Pages of entries as bytes: the same values in half the memory.

Axis letters: as in test_paged; W bytes of an entry.
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

from pallas_kernels import dense_attention, indexer_topk, quantize, sparse_attention
from pallas_kernels.byte_rows import FP4, FP8, Codec, Fp4Codec, Fp8Codec
from pallas_kernels.paged import Paged
from tests import models
from v4jax import presets
from v4jax.model import numerics, paging, params, transformer
from v4jax.model.transformer import Model

CODECS = [FP8, FP4, Fp8Codec(100, 16), Fp8Codec(16, 16), Fp4Codec(16)]


def bits(x: Any) -> np.ndarray:
    """Bits of bfloat16 numbers: zeros have signs, and a NaN equals itself."""
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


@jax.jit(static_argnames="codec")
def there_and_back(x: jax.Array, codec: Codec) -> jax.Array:
    rows = codec.encode(x)
    assert rows.shape == (*x.shape[:-1], codec.width)
    return codec.decode(rows)


def rounded(x: jax.Array, codec: Codec) -> jax.Array:
    """As `v4jax` rounds what a cache holds."""
    if isinstance(codec, Fp4Codec):
        return quantize.fake_quant_fp4(x, block=32)
    straight = quantize.fake_quant_fp8(x[..., : codec.codes], block=64)
    return jnp.concatenate([straight, x[..., codec.codes :]], axis=-1)


@settings(deadline=None, max_examples=25)
@given(
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-120, 100),
    spread=st.sampled_from([0, 4, 20]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_what_a_cache_is_rounded_to_is_read_back_bit_for_bit(
    codec: Codec, seed: int, exponent: int, spread: int, zeros: float
) -> None:
    rng = np.random.default_rng(seed)
    shape = (5, codec.channels)
    x = rng.normal(size=shape) * 2.0 ** rng.uniform(exponent, exponent + spread, shape)
    x = jnp.asarray(np.where(rng.random(shape) < zeros, -0.0, x), jnp.bfloat16)
    x = rounded(x, codec)
    np.testing.assert_array_equal(bits(there_and_back(x, codec)), bits(x))


@pytest.mark.parametrize(
    ("codec", "values", "scales"),
    [
        (Fp8Codec(64, 0), jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn), (-22, 120)),
        (Fp4Codec(32), jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -6]), (-125, 126)),
    ],
)
def test_every_code_at_every_scale(codec: Codec, values: jax.Array, scales: Any) -> None:
    """Alone among zeros, from subnormal codes to the largest of the largest scale."""
    values = values.astype(jnp.float32)
    values = values[jnp.isfinite(values)]
    powers = jnp.ldexp(jnp.float32(1), jnp.arange(*scales))
    entries = jnp.zeros((len(powers), len(values), codec.channels), jnp.bfloat16)
    entries = entries.at[..., 3].set((values[None] * powers[:, None]).astype(jnp.bfloat16))
    assert jnp.all(jnp.isfinite(entries))
    np.testing.assert_array_equal(bits(there_and_back(entries, codec)), bits(entries))


@pytest.mark.parametrize("codec", [FP8, FP4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(codec: Codec, value: float) -> None:
    x = jnp.ones((1, codec.channels), jnp.bfloat16).at[0, 5].set(value).at[0, -1].set(value)
    read = there_and_back(x, codec)[0]
    assert not jnp.isfinite(read[5])
    assert not jnp.isfinite(read[-1])
    other = 32 if isinstance(codec, Fp4Codec) else codec.codes - 1
    assert read[other] == 1


def in_codecs(
    codec: Codec, batch: int, entries: int, size: int, seed: int = 0
) -> tuple[Paged, Paged]:
    """Pages of bytes, and the same entries in pages of bfloat16; no page is used twice."""
    places = -(-entries // size)
    rng = np.random.default_rng(seed)
    shape = (2, batch * places + 1, size, codec.channels)
    pages = rounded(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), codec)
    table = jnp.asarray(rng.permutation(batch * places).reshape(batch, places) + 1, jnp.int32)
    return Paged(codec.encode(pages), table, codec), Paged(pages, table)


def normal(*shape: int, seed: int = 1, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def attention(channels: int, queries: int, entries: int, *, ring: bool) -> dict[str, Any]:
    """Arguments but the pool and what is seen of it."""
    B, T, H, R = 2, queries, 4, 12
    window = {"window_BRK": normal(B, R, channels, seed=2)}
    window["window_mask_BTR"] = jnp.ones((B, T, R), bool)
    if not ring:
        window = {"window_BXK": normal(B, R + T, channels, seed=2)}
        window |= {"start_B": jnp.array([3, 50], jnp.int32), "window": R}
    shared = {"q_BTHK": normal(B, T, H, channels), "sink_H": normal(H, dtype=jnp.float32)}
    return window | shared | {"layer": jnp.int32(1), "scale": 0.1}


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("ring", [True, False])
def test_attention_sees_the_same_entries(ring: bool, impl: Any) -> None:
    codec, queries, entries = Fp8Codec(96, 16), 3 if ring else 20, 300
    inputs = attention(codec.channels, queries, entries, ring=ring)
    name = "decode" if ring else "prefill"
    visible_BT = jnp.broadcast_to(jnp.array([[300], [77]], jnp.int32), (2, queries))
    indices_BTk = jnp.tile(jnp.array([5, -1, 0, 76, 31], jnp.int32), (2, queries, 1))
    for op, seen in (
        (dense_attention, {"visible_BT": visible_BT}),
        (sparse_attention, {"indices_BTk": indices_BTk}),
    ):
        run = jax.jit(functools.partial(getattr(op, name), **inputs, **seen, impl=impl))
        actual, expected = (run(pool_LBSK=pool) for pool in in_codecs(codec, 2, entries, 12))
        np.testing.assert_array_equal(bits(actual), bits(expected))


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_the_indexer_chooses_the_same_entries(impl: Any) -> None:
    codec = Fp4Codec(64)
    rest = jnp.int32(1), jnp.array([[300, 20, 77], [299, 128, 1]], jnp.int32)
    q_BTIJ, weights_BTI = normal(2, 3, 4, 64), normal(2, 3, 4, seed=2)
    run = lambda keys: indexer_topk.select(q_BTIJ, weights_BTI, keys, *rest, k=16, impl=impl)
    actual, expected = map(jax.jit(run), in_codecs(codec, 2, 300, 12))
    np.testing.assert_array_equal(actual, expected)


def test_pages_that_do_not_match_their_form_are_refused_by_name() -> None:
    codec, other = Fp8Codec(96, 16), Fp8Codec(100, 16)
    pool, numbers = in_codecs(codec, 2, 40, 8)
    inputs = attention(96, 1, 40, ring=True) | {"visible_BT": jnp.ones((2, 1), jnp.int32)}
    run = functools.partial(dense_attention.decode, **inputs)
    for wrong, error, match in (
        (Paged(numbers.pages, pool.table, codec), TypeError, r"pool_LBSK.pages is bfloat16"),
        (
            Paged(pool.pages[..., :90], pool.table, codec),
            ValueError,
            r"pool_LBSK.pages_LPNW.*W=128",
        ),
        (Paged(pool.pages, pool.table, other), ValueError, r"entries of 100 channels, not 96"),
    ):
        with pytest.raises(error, match=match):
            run(pool_LBSK=wrong)


CFG = models.config(models.CSA, models.HCA)


def run_model(entries: str | None) -> tuple[np.ndarray, Any]:
    """Logits of two chunks of two rows and of tokens after them, and the cache of pages."""
    model = params.init(Model(CFG), jax.random.key(0), jnp.bfloat16)
    sizes = {"rows": 2, "pages": 7, "page": 128, "dtype": jnp.bfloat16}
    cache = paging.make(CFG, **sizes, entries=entries, numerics=numerics.OFFICIAL)
    table_BM = jnp.array([[4, 1, 6], [2, 5, 3]], jnp.int32)
    cache = dataclasses.replace(cache, table_BM=table_BM)

    @jax.jit
    def feed(tokens_BT: Any, cache: Any, count_B: Any) -> Any:
        x_BTM, cache, _ = transformer.forward(
            model, CFG, numerics.OFFICIAL, tokens_BT, cache, count_B
        )
        return transformer.head(model, transformer.hidden(model, CFG, x_BTM)), cache

    tokens_BT, logits = models.tokens(CFG, 2, 264), []
    for start, end in ((0, 128), (128, 256), *((at, at + 1) for at in range(256, 264))):
        count_B = jnp.full(2, end - start, jnp.int32)
        logits_BTV, cache = feed(tokens_BT[:, start:end], cache, count_B)
        logits.append(np.asarray(logits_BTV))
    return np.concatenate(logits, axis=1), cache


def test_logits_are_those_of_pages_of_bfloat16() -> None:
    actual, cache = run_model("fp8")
    expected, _ = run_model(None)
    np.testing.assert_array_equal(actual, expected)
    assert np.all(np.isfinite(actual))
    page = paging.read_page(cache, np.int32(4))
    assert {str(entries.dtype) for pools in page for entries in pools.values()} == {"uint8"}
    copied = paging.copy_page(cache, np.int32(4), np.int32(0))
    copied = paging.write_entries(copied, np.int32(5), np.int32(0), page)
    for number in (0, 5):
        jax.tree.map(
            np.testing.assert_array_equal, paging.read_page(copied, np.int32(number)), page
        )


def test_bytes_per_token_of_flash() -> None:
    """Of a row of 2^20 tokens, with its rings and all else."""
    cfg, pages = presets.get("flash"), 2**20 // 4096

    def kibibytes(**entries: Any) -> float:
        sizes = {"rows": 1, "page": 4096, "pages": 1 + pages, "dtype": jnp.bfloat16}
        table_1M = jnp.zeros((1, pages), jnp.int32)
        make = lambda: (paging.make(cfg, **sizes, **entries), table_1M)
        arrays = jax.tree.leaves(jax.eval_shape(make))
        return sum(x.size * x.dtype.itemsize for x in arrays) / 2**30

    nbytes = kibibytes(entries="fp8", numerics=numerics.OFFICIAL)
    assert nbytes <= 4.2
    assert nbytes == pytest.approx(4.07, abs=0.01)
    assert kibibytes() == pytest.approx(6.77, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"numerics": numerics.HF}, "numerics do not round to FP8; use numerics='official'"),
        ({}, "numerics do not round to FP8"),
        ({"numerics": numerics.OFFICIAL, "dtype": jnp.float32}, "this model's are float32"),
        ({"entries": "fp4"}, "entries is 'fp4'; it must be 'fp8' or None"),
    ],
)
def test_entries_that_bytes_would_change_are_refused(settings: Any, match: str) -> None:
    sizes = {"rows": 1, "pages": 2, "page": 128, "dtype": jnp.bfloat16, "entries": "fp8"}
    with pytest.raises(ValueError, match=match):
        paging.make(CFG, **(sizes | settings))
