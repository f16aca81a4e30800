"""The store in RAM and on disk: budgets, restarts, and files that are cut, damaged or full."""

import contextlib
import itertools
import logging
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.engine.store import Store

ENTRIES = {b"b%d" % i: bytes([i]) * 3 * i for i in range(5)}


def opened(directory: Path, ram: int = 0, disk: int = 2**20, model: str = "m"):
    return contextlib.closing(Store(ram, model, directory, disk))


def fill(directory: Path, entries: dict[bytes, bytes] = ENTRIES) -> Path:
    """Write entries through a store; returns the file that it wrote."""
    before = set(directory.iterdir())
    with opened(directory) as store:
        for key, payload in entries.items():
            store.put(key, payload)
    (file,) = {*directory.glob("*.kvcache")} - before
    return file


def test_what_leaves_ram_is_on_disk_and_without_one_missing(tmp_path):
    payloads = {b"%d" % i: bytes([i]) * 40 for i in range(5)}
    alone = Store(100, "m")
    with opened(tmp_path, ram=100) as store:
        for key, payload in payloads.items():
            for each in (store, alone):
                each.put(key, payload)
                assert each.get(b"0") in (payloads[b"0"], None)
        store.flush()
        assert store.bytes_in_ram == alone.bytes_in_ram == 80
        assert all(key in store and store.get(key) == payloads[key] for key in payloads)
        assert b"5" not in store
        assert store.get(b"5") is None
    # The first one was used after each of the others.
    assert [key for key in payloads if key in alone] == [b"0", b"4"]
    assert alone.bytes_on_disk == 0


def test_an_entry_is_there_while_it_is_written_unless_the_disk_is_behind(tmp_path, monkeypatch):
    large = bytes(2**25)
    with opened(tmp_path, disk=2**30) as store:
        store.put(b"large", large)
        assert b"large" in store
        assert store.get(b"large") == large
        monkeypatch.setattr("v4jax.engine.store._QUEUE_BYTES", 0)
        store.put(b"surplus", large)
        store.flush()
        assert [key in store for key in (b"large", b"surplus")] == [True, False]
        assert store.bytes_in_ram == 0


def test_a_restart_finds_what_was_flushed(tmp_path):
    with opened(tmp_path, ram=2**20) as store:
        for key, payload in ENTRIES.items():
            store.put(key, payload)
        store.flush()
        # Not flushed: lost with the process.
        store.put(b"late", b"x")
    for number in range(3):
        with opened(tmp_path) as store:
            assert {key: store.get(key) for key in ENTRIES} == ENTRIES
            assert b"late" not in store
            store.put(b"from start %d" % number, b"y")
    with opened(tmp_path) as store:
        assert all(b"from start %d" % number in store for number in range(3))


@pytest.mark.parametrize("disk", [100, 1000, 5000, 20000])
def test_budgets_are_kept_and_the_newest_entries_are_on_disk(tmp_path, disk, caplog):
    sizes = [1 + i * 37 % 300 for i in range(200)]
    for start in range(0, 200, 50):
        with opened(tmp_path, ram=500, disk=disk) as store:
            for i in range(start, start + 50):
                store.put(b"%d" % i, bytes([i]) * sizes[i])
                store.flush()
                assert store.bytes_in_ram <= 500
                assert store.bytes_on_disk <= disk
                files = tmp_path.glob("*.kvcache")
                assert store.bytes_on_disk == sum(file.stat().st_size for file in files)
                if sizes[i] < disk / 2:
                    assert store.get(b"%d" % i) == bytes([i]) * sizes[i]
            for i in range(start + 50):
                assert (b"%d" % i in store) == (store.get(b"%d" % i) is not None)
    assert not caplog.records
    with opened(tmp_path, disk=disk) as store:
        kept = [i for i in range(200) if b"%d" % i in store]
        assert all(store.get(b"%d" % i) == bytes([i]) * sizes[i] for i in kept)
        assert sum(sizes[i] for i in kept) > disk / 2 - 300


def test_a_file_cut_at_any_byte_gives_its_whole_records_and_a_log_line(tmp_path, caplog):
    content = fill(tmp_path).read_bytes()
    sizes = [len(content)]
    for length in range(len(content) + 1):
        for file in tmp_path.glob("*.kvcache"):
            file.unlink()
        file = tmp_path / f"{content[16:32].hex()}-00000007.kvcache"
        file.write_bytes(content[:length])
        caplog.clear()
        with opened(tmp_path) as store:
            there = [key for key in ENTRIES if key in store]
            assert there == [*ENTRIES][: len(there)]
            assert all(store.get(key) == ENTRIES[key] for key in there)
            sizes.append(store.bytes_on_disk)
            assert sizes[-1] == sum(file.stat().st_size for file in tmp_path.glob("*.kvcache"))
            assert bool(caplog.records) == (sizes[-1] < length and length not in (0, 32))
            store.put(b"new", b"payload")
        caplog.clear()
        with opened(tmp_path) as store:
            assert not caplog.records
            assert store.get(b"new") == b"payload"
            assert [key for key in ENTRIES if key in store] == there
    assert sizes[-1] == len(content)
    assert len(set(sizes)) == 1 + len(ENTRIES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("written"))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=2))
def test_bad_bytes_are_a_miss_and_a_log_line(written, changes):
    original = written.read_bytes()
    damaged = bytearray(original)
    for place, difference in changes:
        damaged[place % len(damaged)] ^= difference
    written.write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        logger = logging.getLogger("v4jax.engine")
        patch.setattr(logger, "warning", lambda *line: lines.append(line))
        with opened(written.parent) as store:
            values = {key: store.get(key) for key in ENTRIES}
            assert all(values[key] in (ENTRIES[key], None) for key in ENTRIES)
            assert bool(lines) == (values != ENTRIES) == (damaged != original)
            for key, payload in ENTRIES.items():
                store.put(key, payload)
        with opened(written.parent) as store:
            assert {key: store.get(key) for key in ENTRIES} == ENTRIES
    for file in written.parent.glob("*.kvcache"):
        file.unlink()
    written.write_bytes(original)


def test_files_of_another_model_are_left_alone(tmp_path):
    other = fill(tmp_path)
    content = other.read_bytes()
    with opened(tmp_path, model="another", disk=300) as store:
        assert not any(key in store for key in ENTRIES)
        assert store.bytes_on_disk == 0
        for i in range(50):
            store.put(b"%d" % i, bytes(50))
    assert other.read_bytes() == content


def test_a_second_process_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(ValueError, match="another process keeps its cache"):
        Store(0, "m", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file.*: no cache can be kept .*; choose another"):
        Store(0, "m", tmp_path / "file")


def test_a_full_disk_ends_writing_only(tmp_path, caplog):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    payload = bytes(range(256)) * 2**12
    with opened(tmp_path, disk=2**30) as store:
        store.put(b"before", payload)
        store.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * len(payload) // 2, hard))
        try:
            store.put(b"too much", payload)
            store.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store.put(b"after", payload)
        store.flush()
        assert [key in store for key in (b"before", b"too much", b"after")] == [True, False, False]
        assert store.get(b"before") == payload
    (line,) = caplog.messages
    assert re.search("cannot be written .*too large.*; the cache on disk takes no more", line)
    with opened(tmp_path, disk=2**30) as store:
        assert store.get(b"before") == payload
        assert b"too much" not in store


def test_files_that_vanish_are_a_miss_and_a_log_line(tmp_path, caplog):
    fill(tmp_path)
    with opened(tmp_path) as store:
        for file in tmp_path.glob("*.kvcache"):
            file.unlink()
        assert [store.get(key) for key in ENTRIES] == [None] * len(ENTRIES)
    assert len(caplog.records) == len(ENTRIES)


WRITER = """
import pathlib, sys
from v4jax.engine.store import Store
store = Store(0, "m", pathlib.Path(sys.argv[1]), 2**24)
for number in range(10**9):
    store.put(b"%d" % number, b"%d" % number * 10000)
    if number % 16 == 0:
        store.flush()
        print(number, flush=True)
"""


def test_a_killed_process_leaves_all_that_it_flushed(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        number = [int(line) for line in itertools.islice(process.stdout, 30)][-1]
        time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
    with opened(tmp_path, disk=2**24) as store:
        recent = range(number - 30, number + 1)
        assert all(store.get(b"%d" % i) == b"%d" % i * 10000 for i in recent)


def test_many_threads_may_use_it(tmp_path):
    payloads = {b"%d" % i: bytes([i]) * 1000 for i in range(60)}

    def use(number: int) -> None:
        for i in range(200):
            key = b"%d" % ((i * 7 + number * 13) % 60)
            assert store.get(key) in (payloads[key], None)
            store.put(key, payloads[key])

    with opened(tmp_path, ram=10_000, disk=30_000) as store:
        with ThreadPoolExecutor(4) as threads:
            for each in [threads.submit(use, number) for number in range(4)]:
                each.result()
        store.flush()
        assert store.bytes_in_ram <= 10_000
        assert store.bytes_on_disk <= 30_000
