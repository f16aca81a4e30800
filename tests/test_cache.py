"""Rings and pools of the cache are addressed by position and never erased."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax import presets
from v4jax.model import cache as caches

LAYER = jnp.int32(1)
ROWS = 13


def ring_after(chunks: list[int], rejected: list[int]) -> tuple[np.ndarray, int]:
    """A ring written in chunks, each followed by a rewind; the token at position p has value p."""
    ring = jnp.full((2, 1, ROWS, 1), -1.0)
    length = 0
    for tokens, back in zip(chunks, rejected, strict=True):
        new = jnp.arange(length, length + tokens, dtype=jnp.float32).reshape(1, tokens, 1)
        at = lambda n: jnp.array([n], jnp.int32)
        ring = caches.ring_write(ring, LAYER, new, at(length), at(tokens))
        length += tokens - min(back, tokens)
    return np.asarray(ring), length


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 3, 8, 9, 20]), st.integers(0, 8)), min_size=1, max_size=6
    )
)
def test_a_ring_holds_the_last_window_after_any_rewinds(
    steps: list[tuple[int, int]],
) -> None:
    ring, length = ring_after([tokens for tokens, _ in steps], [back for _, back in steps])
    assert np.all(ring[0] == -1), "another layer was written"
    for position in range(max(0, length - (ROWS - caches.SPARE)), length):
        assert ring[1, 0, position % ROWS, 0] == position


def test_padding_is_not_written() -> None:
    for tokens in (4, 20):
        ring = jnp.full((2, 2, ROWS, 1), -1.0)
        new = jnp.ones((2, tokens, 1))
        count_B = jnp.array([2, 0], jnp.int32)
        ring = caches.ring_write(ring, LAYER, new, jnp.zeros(2, jnp.int32), count_B)
        assert np.asarray(ring[1, 0, :, 0]).tolist() == [1, 1] + [-1] * (ROWS - 2)
        assert np.all(np.asarray(ring[1, 1]) == -1)


def test_ring_mask_shows_the_window_up_to_the_query() -> None:
    query_BT = jnp.array([[20, 21]], jnp.int32)
    mask = caches.ring_mask(jnp.array([22], jnp.int32), ROWS, query_BT, 5)
    visible = lambda t: {int(p) % ROWS for p in range(t - 4, t + 1)}
    assert [set(np.flatnonzero(row).tolist()) for row in mask[0]] == [visible(20), visible(21)]


def test_ring_mask_shows_nothing_before_the_text() -> None:
    mask = caches.ring_mask(jnp.array([2], jnp.int32), ROWS, jnp.array([[1]], jnp.int32), 5)
    assert np.flatnonzero(mask[0, 0]).tolist() == [0, 1]


@pytest.mark.parametrize("first", [0, 3, 5, 6])
def test_pool_write_changes_only_completed_entries(first: int) -> None:
    pool = jnp.full((2, 2, 6, 1), -1.0)
    new = jnp.arange(6.0).reshape(2, 3, 1)
    count = min(2, 6 - first)
    got = caches.pool_write(
        pool, LAYER, new, jnp.full(2, first, jnp.int32), jnp.array([count, 0], jnp.int32)
    )
    expected = np.full(6, -1.0)
    expected[first : first + count] = np.arange(count)
    assert np.asarray(got[1, 0, :, 0]).tolist() == expected.tolist()
    assert np.all(np.asarray(got[1, 1]) == -1)
    assert np.all(np.asarray(got[0]) == -1)


def test_buckets_are_few_and_hold_the_text() -> None:
    buckets = {caches.bucket(tokens, 1_048_576) for tokens in range(1, 5000)}
    assert buckets == {128 * 2**n for n in range(7)}
    assert all(caches.bucket(n, 10_000) >= n for n in (1, 128, 129, 9999))
    assert caches.bucket(9999, 10_000) == 10_112


def test_only_the_pools_of_a_cache_grow_with_capacity() -> None:
    cfg = presets.get("flash")
    kinds = [kind.attention for kind in cfg.layers]
    names = ("window_LBRK", "tail_LBRK", "index_tail_LBRK", "pool_LBSK", "index_LBSK")
    capacities = (8192, 16384)
    sizes = []
    for capacity in capacities:
        make = functools.partial(caches.make, cfg, 1, capacity, jnp.bfloat16)
        layers = [vars(layer) for part in jax.eval_shape(make).segments for layer in part]
        sizes.append({name: sum(x[name].size for x in layers if x[name]) for name in names})
    for name in names[:3]:
        assert sizes[0][name] == sizes[1][name] > 0
    for capacity, size in zip(capacities, sizes, strict=True):
        # One entry more than the text has, rounded up to tiles of 32.
        rows = {ratio: -(-(capacity // ratio + 1) // 32) * 32 for ratio in (4, 128)}
        entries = kinds.count("csa") * rows[4]
        assert size["index_LBSK"] == entries * cfg.index_head_dim
        entries += kinds.count("hca") * rows[128]
        assert size["pool_LBSK"] == entries * cfg.head_dim
