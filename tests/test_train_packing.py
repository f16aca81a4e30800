"""Packing plans: every token once, documents at multiples of 128, the same on any machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax_train.data import packing
from v4jax_train.data.packing import Packing, PackSettings

LENGTHS = st.lists(st.integers(1, 1500), min_size=1, max_size=60).map(np.array)
SETTINGS = st.builds(
    PackSettings,
    seq_len=st.sampled_from([128, 256, 640]),
    too_long=st.sampled_from(["truncate", "split"]),
    window=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)


def pieces(plan: Packing) -> list[list[tuple[int, int, int, int]]]:
    """The pieces of each pack as (start, length, document, begin), from left to right."""
    fields = (plan.start_P, plan.length_P, plan.document_P, plan.begin_P)
    rows = np.stack(fields, axis=1).tolist()
    ends = zip(plan.first_K1[:-1], plan.first_K1[1:], strict=True)
    return [sorted(map(tuple, rows[first:end])) for first, end in ends]


@settings(deadline=None, max_examples=200)
@given(LENGTHS, SETTINGS, st.integers(0, 3))
def test_no_token_is_lost_repeated_or_overlapped(lengths_D, how, epoch) -> None:
    plan = packing.pack(lengths_D, how, epoch=epoch)
    counts_D = [np.zeros(length, int) for length in lengths_D]
    assert len(pieces(plan)) == len(plan)
    for pack in pieces(plan):
        assert pack
        free = 0
        for start, length, document, begin in pack:
            assert start % 128 == 0
            assert free <= start
            free = start + length
            assert length > 0
            assert free <= how.seq_len
            counts_D[document][begin : begin + length] += 1
    limit = how.seq_len if how.too_long == "truncate" else 10**6
    assert all((counts[:limit] == 1).all() and not counts[limit:].any() for counts in counts_D)
    assert plan.dropped == sum(len(counts[limit:]) for counts in counts_D)
    assert plan.too_long == sum(lengths_D > how.seq_len)
    assert plan.tokens == sum(lengths_D) - plan.dropped
    assert plan.efficiency == plan.tokens / (len(plan) * how.seq_len)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 12), max_size=40))
def test_best_fit_places_everything_and_leaves_no_two_packs_that_fit_in_one(sizes) -> None:
    placed = packing.best_fit(sizes, 12)
    full = sorted(np.bincount(placed, weights=sizes)) if sizes else []
    assert len(placed) == len(sizes)
    assert all(0 < size <= 12 for size in full)
    assert len(full) < 2 or full[0] + full[1] > 12


def test_best_fit_uses_the_fullest_pack_with_room() -> None:
    assert packing.best_fit([6, 2, 7, 3, 1, 1], 10) == [1, 1, 0, 0, 1, 1]


def test_the_plan_is_pinned() -> None:
    """A different order after an update would break resuming."""
    lengths_D = np.array([100, 300, 128, 129, 512, 40, 260])
    plan = packing.pack(lengths_D, PackSettings(seq_len=512, seed=7), epoch=2)
    assert plan.document_P.tolist() == [0, 1, 5, 6, 4, 2, 3]
    assert plan.first_K1.tolist() == [0, 2, 4, 5, 7]
    assert plan.start_P.tolist() == [0, 128, 0, 128, 0, 0, 128]


def test_each_epoch_and_seed_has_its_own_order() -> None:
    lengths_D = np.random.default_rng(0).integers(1, 400, 200)
    orders = [
        packing.pack(lengths_D, PackSettings(seq_len=512, seed=seed), epoch=epoch).document_P
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({order.tobytes() for order in orders}) == 4


def test_a_document_that_is_too_long_is_an_error_by_default() -> None:
    message = (
        "b has 1,281 tokens, but seq_len is 1,280 \\(2 of 3 documents are too long\\);"
        " raise it, or set"
    )
    with pytest.raises(ValueError, match=message):
        packing.pack(
            np.array([1280, 1281, 5000]), PackSettings(seq_len=1280), where="abc".__getitem__
        )


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"seq_len": 0}, "seq_len is 0; use a multiple of 128"),
        ({"seq_len": 200}, "seq_len is 200; use a multiple of 128"),
        ({"seq_len": 128, "too_long": "drop"}, "too_long is 'drop'; use error, truncate or split"),
        ({"seq_len": 128, "window": 0}, "window is 0; use 1 or more"),
        ({"seq_len": 128, "seed": -1}, "seed is -1; use 0 or more"),
    ],
)
def test_invalid_settings_are_rejected(fields, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        PackSettings(**fields)
