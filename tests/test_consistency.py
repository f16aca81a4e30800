"""A text has the same logits however it is fed: chunks, rows, padding, rejected drafts."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import models
from tests.models import CSA, HCA, SLIDING, Runner
from v4jax.model import cache as caches
from v4jax.model.numerics import HF, OFFICIAL, Numerics

CFG = models.config(SLIDING, CSA, HCA, CSA)
LENGTH = 90
TOKENS = models.tokens(CFG, 2, LENGTH)
# Few chunk sizes, so that few programs are compiled. Chunks of up to 8 tokens fit into the ring.
SIZES = (1, 3, 8, 9, 32)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to float32 rounding through four layers: 1e-5 of the largest logit."""
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return models.full_logits(CFG, TOKENS)


def feed_in_chunks(runner: Runner, tokens_BT: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Feed all tokens in chunks of the given sizes, cyclically; past the end, one by one."""
    parts, at, turn = [], 0, 0
    while at < tokens_BT.shape[1]:
        size = sizes[turn % len(sizes)]
        if at + size > tokens_BT.shape[1]:
            size = 1
        parts.append(runner.feed(tokens_BT[:, at : at + size]))
        at, turn = at + size, turn + 1
    return np.concatenate(parts, axis=1)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=6))
def test_any_split_into_chunks_equals_feeding_all_at_once(sizes: list[int]) -> None:
    got = feed_in_chunks(Runner(CFG, 2, LENGTH), TOKENS, sizes)
    close(got, models.full_logits(CFG, TOKENS))


def test_token_by_token_equals_feeding_all_at_once(expected: np.ndarray) -> None:
    close(feed_in_chunks(Runner(CFG, 2, LENGTH), TOKENS, [1]), expected)


def test_official_numerics_do_not_depend_on_chunks_in_one_layer() -> None:
    """With more layers a single rounding flipped by float32 noise changes all later logits."""
    for kind in (CSA, HCA):
        cfg = models.config(kind, hashed=0)
        got = feed_in_chunks(Runner(cfg, 2, LENGTH, OFFICIAL), TOKENS, [9, 1, 32])
        same = (
            np.abs(got - models.full_logits(cfg, TOKENS, OFFICIAL)).max(-1)
            <= 1e-5 * np.abs(got).max()
        )
        assert same.mean() > 0.95


@pytest.mark.parametrize("numerics", [HF, OFFICIAL], ids=["hf", "official"])
def test_rows_do_not_see_each_other(numerics: Numerics) -> None:
    got = models.full_logits(CFG, TOKENS, numerics)
    swapped = models.full_logits(CFG, TOKENS[::-1], numerics)
    np.testing.assert_array_equal(got, swapped[::-1])


def test_a_row_has_the_same_logits_alone_and_in_a_batch(expected: np.ndarray) -> None:
    close(models.full_logits(CFG, TOKENS[1:]), expected[1:])


def test_padding_and_rows_of_other_lengths_have_no_effect(expected: np.ndarray) -> None:
    runner = Runner(CFG, 2, LENGTH)
    first = runner.feed(TOKENS[:, :32], [32, 20])
    close(first[0], expected[0, :32])
    close(first[1, :20], expected[1, :20])
    second = np.stack([TOKENS[0, 32:64], TOKENS[1, 20:52]])
    got = runner.feed(second, [32, 32])
    close(got[0], expected[0, 32:64])
    close(got[1], expected[1, 20:52])
    # A row that is fed nothing keeps its state.
    runner.feed(TOKENS[:, :9], [9, 0])
    got = runner.feed(np.stack([TOKENS[0, :1], TOKENS[1, 52:53]]), [1, 1])
    close(got[1], expected[1, 52:53])


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=5),
    st.integers(20, 40),
)
def test_rewind_then_replay_equals_never_drafting(
    drafts: list[tuple[int, int]], start: int
) -> None:
    expected = models.full_logits(CFG, TOKENS)
    runner = Runner(CFG, 2, LENGTH)
    runner.feed(TOKENS[:, :32])
    at = 32
    for drafted, rejected in drafts:
        rejected = min(rejected, drafted)
        accepted = drafted - rejected
        wrong = np.full((2, 8), start % CFG.vocab_size, np.int32)
        wrong[:, :accepted] = TOKENS[:, at : at + accepted]
        got = runner.feed(wrong, [drafted, drafted])
        if accepted:
            close(got[:, :accepted], expected[:, at : at + accepted])
        runner.rewind(rejected, rejected)
        at += accepted
    close(runner.feed(TOKENS[:, at : at + 9]), expected[:, at : at + 9])


def test_rewind_changes_no_buffer() -> None:
    runner = Runner(CFG, 2, LENGTH)
    runner.feed(TOKENS[:, :32])
    rewound = caches.rewind(runner.cache, jax.numpy.array([3, 0], jax.numpy.int32))
    assert rewound.segments is runner.cache.segments
    assert rewound.length_B.tolist() == [29, 32]


@pytest.mark.parametrize(
    "layers", [(SLIDING,), (CSA,), (HCA,), (("csa", 3), ("hca", 5)), (("csa", 1), ("hca", 1))]
)
@pytest.mark.parametrize("length", [2, 37])
def test_any_layers_and_length_can_be_split_into_chunks(
    layers: tuple[tuple[str, int], ...], length: int
) -> None:
    cfg = models.config(*layers, hashed=0)
    text = models.tokens(cfg, 1, length, seed=length)
    expected = models.full_logits(cfg, text)
    assert np.all(np.isfinite(expected))
    close(feed_in_chunks(Runner(cfg, 1, length), text, [9, 3]), expected)


def test_selecting_more_entries_than_exist_selects_all() -> None:
    cfg = models.config(CSA, CSA, index_topk=1000)
    few = dataclasses.replace(cfg, index_topk=LENGTH // 4)
    close(models.full_logits(cfg, TOKENS), models.full_logits(few, TOKENS))


def test_growing_text_compiles_no_new_program() -> None:
    runner = Runner(models.config(CSA, HCA), 2, 4 * LENGTH)
    runner.feed(TOKENS[:, :9])
    step = lambda at: runner.feed(TOKENS[:, at : at + 1])
    with models.programs() as first:
        step(9)
    assert "jit(logits)" in first
    with models.programs() as later:
        for at in range(10, LENGTH):
            step(at)
    assert not later
