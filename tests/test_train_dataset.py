"""Batches depend only on their number: the same on any number of hosts, and after a restart."""

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax_train.data import dataset
from v4jax_train.data.dataset import Packs
from v4jax_train.data.documents import Documents, LoadReport
from v4jax_train.data.packing import PackSettings

# Any four tokens include a trained one that is not the first.
LENGTHS = st.lists(st.integers(4, 600), min_size=1, max_size=30)
SPLIT = PackSettings(seq_len=256, too_long="split")


def documents(lengths: list[int], first: int = 1) -> Documents:
    """Documents of distinct tokens, counted from `first`; every third token is trained."""
    ids_S = np.arange(first, first + sum(lengths), dtype=np.int32)
    report = LoadReport(rows=len(lengths), wrong=0, first_wrong=(), tokens=sum(lengths), trained=0)
    return Documents(
        path="rows.jsonl",
        ids_S=ids_S,
        trained_S=ids_S % 3 == 0,
        ends_D=np.cumsum(lengths),
        lines_D=np.arange(len(lengths)) + 1,
        report=report,
    )


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def joined(parts: Any) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 3))
def test_an_epoch_has_every_trained_piece_once_with_its_document_and_position(
    lengths, epochs
) -> None:
    rows = documents(lengths)
    packs = Packs(rows, SPLIT, epochs=epochs)
    whole = joined([packs[i] for i in range(len(packs))])
    real = whole["document"] > 0
    pieces = [
        range(begin, min(begin + 256, end))
        for end, length in zip(rows.ends_D, lengths, strict=True)
        for begin in range(end - length, end, 256)
    ]
    trained = [rows.ids_S[list(piece)] for piece in pieces if rows.trained_S[list(piece)[1:]].any()]
    assert sorted(whole["tokens"][real]) == sorted(np.concatenate(trained).tolist() * epochs)
    assert not any(whole[name][~real].any() for name in whole)
    begins = np.concatenate([[0], rows.ends_D[:-1]])
    owner = np.searchsorted(rows.ends_D, whole["tokens"] - 1, side="right")[real]
    position = (whole["tokens"][real] - 1 - begins[owner]) % 256
    assert np.array_equal(whole["position"][real], position)
    expected = (whole["tokens"] % 3 == 0) & (whole["position"] > 0)
    assert np.array_equal(whole["trained"], expected & real)


def test_documents_of_a_pack_are_numbered_from_1_and_begin_at_multiples_of_128() -> None:
    packs = Packs(documents([100, 129, 20, 300]), PackSettings(seq_len=512))
    for i in range(len(packs.packing(0))):
        pack = packs[i]
        starts = np.flatnonzero((pack["document"] > 0) & (pack["position"] == 0))
        assert not (starts % 128).any()
        assert pack["document"][starts].tolist() == list(range(1, len(starts) + 1))
        assert {name: array.dtype.name for name, array in pack.items()} == {
            "tokens": "int32",
            "trained": "bool",
            "document": "int32",
            "position": "int32",
        }


def mix(part: range | None = None, batch: int = 4) -> Any:
    sources = [Packs(documents([100, 300, 20, 250, 130]), SPLIT)]
    sources.append(Packs(documents([500, 60, 70], first=5000), SPLIT))
    return dataset.batches(sources, batch=batch, part=part, weights=[3, 1])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_reads_the_same_batches(hosts: int) -> None:
    parts = [mix(dataset.share(4, host, hosts)) for host in range(hosts)]
    whole = mix()
    for step in (0, 1, 7, 1000):
        assert same(joined([part[step] for part in parts]), whole[step])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_resuming_on_other_hosts_equals_never_stopping(stop, before, after) -> None:
    iterators = [dataset.iterate(mix(dataset.share(4, i, before))) for i in range(before)]
    for _ in range(stop):
        for iterator in iterators:
            next(iterator)
    states = [iterator.get_state() for iterator in iterators]
    assert states == [{"next_index": stop}] * before
    iterators += [dataset.iterate(mix(dataset.share(4, i, after)), step=stop) for i in range(after)]
    for step in range(stop, stop + 3):
        parts = [next(iterator) for iterator in iterators]
        assert same(joined(parts[:before]), mix()[step])
        assert same(joined(parts[before:]), mix()[step])
    for iterator in iterators:
        iterator.close()


def test_a_mix_keeps_its_weights_and_the_order_of_each_source() -> None:
    first = Packs(documents([100, 300, 20, 250, 130]), SPLIT)
    second = Packs(documents([500, 60, 70], first=5000), SPLIT)
    batches: Any = dataset.batches([first, second], batch=1, weights=[3, 1])
    counts = [0, 0]
    for step in range(80):
        pack = {name: rows[0] for name, rows in batches[step].items()}
        source = int(pack["tokens"].max() >= 5000)
        assert same(pack, (first, second)[source][counts[source]])
        counts[source] += 1
        assert abs(counts[1] - (step + 1) / 4) <= 1
    assert counts == [60, 20]


def test_a_pack_does_not_depend_on_what_was_read_before() -> None:
    rows = documents([100, 300, 20, 250, 130])
    forwards = Packs(rows, SPLIT)
    expected = [forwards[i] for i in range(40)]
    assert len(forwards.packing(0)) < 10
    backwards = Packs(rows, SPLIT)
    assert all(same(backwards[i], expected[i]) for i in reversed(range(40)))
    epochs = [joined(expected[i : i + 4]) for i in (0, 4)]
    assert not same(*epochs)


def test_the_last_batch_of_a_finite_source_is_padded() -> None:
    packs = Packs(documents([200] * 5), PackSettings(seq_len=256), epochs=1)
    assert len(packs) == 5
    batches = list(dataset.iterate(dataset.batches([packs], batch=4)))
    assert len(batches) == 2
    counts = [(batch["document"] > 0).sum(axis=1).tolist() for batch in batches]
    assert counts == [[200] * 4, [200, 0, 0, 0]]
    assert not any(array[1:].any() for array in batches[1].values())


def test_a_document_that_is_too_long_is_named_by_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has 300 tokens, but seq_len is 256"):
        Packs(documents([10, 300]), PackSettings(seq_len=256))


def test_invalid_batches_are_rejected() -> None:
    endless, short = (Packs(documents([10]), SPLIT, epochs=epochs) for epochs in (None, 1))
    assert len(endless) == sys.maxsize
    cases: list[tuple[str, list[Packs], dict[str, Any]]] = [
        ("sources is empty", [], {}),
        (r"weights are \[1\]; give 2 numbers", [endless, endless], {"weights": [1]}),
        (r"weights are \[1, 0\]; give 2 numbers", [endless, endless], {"weights": [1, 0]}),
        ("weights are", [endless], {"weights": [float("nan")]}),
        (r"part is range\(3, 5\); .* below batch, 4", [endless], {"part": range(3, 5)}),
        (r"part is range\(0, 0\); .* below batch, 4", [endless], {"part": range(0)}),
        ("a number of epochs cannot be mixed", [endless, short], {}),
    ]
    for problem, sources, fields in cases:
        with pytest.raises(ValueError, match=problem):
            dataset.batches(sources, batch=4, **fields)
    with pytest.raises(ValueError, match="batch is 6; use a multiple of the 4 groups"):
        dataset.share(6, 0, 4)


def test_shares_partition_a_batch_in_order() -> None:
    for hosts in (1, 2, 3, 6):
        shares = [dataset.share(6, host, hosts) for host in range(hosts)]
        assert list(itertools.chain(*shares)) == list(range(6))
