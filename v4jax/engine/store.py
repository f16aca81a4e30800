"""Cached blocks and snapshots that have left device memory: in RAM, then on disk.

Files are only appended to, so that a process may be killed at any time: at most the last record is
not whole, and the next start cuts it off. The oldest file is removed when the budget is spent. A
file has `_MAGIC`, a digest of the model's fingerprint, and records of

    bytes of the payload (8), bytes of the key (2), digest of the payload (16)
    key
    digest of the fields above (8)
    payload

Its name begins with the digest of the fingerprint: files of other models are neither read, counted
nor removed. What is read from disk is verified; what is damaged counts as missing.
"""

import concurrent.futures
import hashlib
import logging
import struct
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple

import filelock

_log = logging.getLogger("v4jax.engine")

_MAGIC = b"v4jax cache 0001"
_FIELDS = struct.Struct("<QH16s")
_CHECK_BYTES = 8
# Bytes of a file at most, and its share of the budget.
_FILE_BYTES, _FILES = 2**30, 16
# Bytes that wait to be written at most; a disk that is further behind does not get what leaves RAM.
_QUEUE_BYTES = 2**28


def _digest(content: bytes, size: int = 16) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


class _Record(NamedTuple):
    """Where a payload is, and its digest."""

    path: Path
    offset: int
    size: int
    digest: bytes


class _Disk:
    """Records in files. One thread appends; any thread may read."""

    def __init__(self, directory: Path, budget: int, fingerprint: str) -> None:
        model = _digest(fingerprint.encode())
        self._directory, self._budget = directory, budget
        self._header, self._name = _MAGIC + model, model.hex()
        self._lock = _lock(directory)
        self._records: dict[bytes, _Record] = {}
        self._sizes: dict[Path, int] = {}  # bytes of whole records in each file; the oldest first
        self._number, self._output, self._failed = 0, None, False
        for path in sorted(directory.glob(self._file_name("[0-9]" * 8))):
            self._number = int(path.stem[-8:])
            try:
                self._scan(path)
            except OSError as error:
                _log.warning("%s: not used as cache: %s.", path, error.strerror)

    def __contains__(self, key: bytes) -> bool:
        return key in self._records

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def read(self, key: bytes) -> bytes | None:
        """The payload of a key; None if there is none, or it is damaged."""
        record = self._records.get(key)
        if record is None:
            return None
        try:
            with record.path.open("rb") as file:
                file.seek(record.offset)
                payload = file.read(record.size)
            if _digest(payload) == record.digest:
                return payload
            problem = "the record is damaged"
        except OSError as error:
            problem = error.strerror
        # The other thread may just have removed the file to make room.
        if self._records.get(key) is record:
            self._records.pop(key, None)
            _log.warning("%s: an entry of the cache is lost: %s.", record.path, problem)
        return None

    def append(self, key: bytes, payload: bytes) -> None:
        """Write a record if the key has none, the budget allows it, and no write has failed."""
        size = _FIELDS.size + len(key) + _CHECK_BYTES + len(payload)
        too_large = len(self._header) + size > self._budget
        if key in self._records or too_large or self._failed:
            return
        digest = _digest(payload)
        head = _FIELDS.pack(len(payload), len(key), digest) + key
        head += _digest(head, _CHECK_BYTES)
        try:
            path, output = self._writable(size)
            _write(output, head)
            _write(output, payload)
        except OSError as error:
            self._failed = True
            _log.warning(
                "%s: cannot be written (%s); the cache on disk takes no more until a restart.",
                *(self._directory, error.strerror),
            )
            return
        self._records[key] = _Record(path, self._sizes[path] + len(head), len(payload), digest)
        self._sizes[path] += size

    def close(self) -> None:
        """Release the directory."""
        if self._output:
            self._output.close()
        self._lock.release()

    def _file_name(self, number: str) -> str:
        return f"{self._name}-{number}.kvcache"

    def _scan(self, path: Path) -> None:
        """Index the whole records of a file, and cut off the rest."""
        with path.open("r+b") as file:
            length, end = path.stat().st_size, 0
            if file.read(len(self._header)) == self._header:
                end = len(self._header)
                while entry := _next_record(file, path, length):
                    key, record = entry
                    self._records[key] = record
                    end = file.seek(record.offset + record.size)
            if end < length:
                _log.warning(
                    "%s: the last %d of %d bytes of this cache file are damaged or not whole; "
                    "they are removed.",
                    *(path, length - end, length),
                )
                file.truncate(end)
        if end > len(self._header):
            self._sizes[path] = end
        else:
            path.unlink()

    def _writable(self, size: int) -> tuple[Path, BinaryIO]:
        """The newest file, or a new one if it would become too long, once the budget has room."""
        path = next(reversed(self._sizes), None)
        limit = min(_FILE_BYTES, self._budget // _FILES)
        if path and self._output and self._sizes[path] + size <= limit:
            self._make_room(size)
            return path, self._output
        if self._output:
            self._output.close()
        self._make_room(len(self._header) + size)
        self._number += 1
        path = self._directory / self._file_name(f"{self._number:08}")
        # Without a buffer, as other file objects read what was written.
        self._output = path.open("xb", buffering=0)
        self._sizes[path] = 0
        _write(self._output, self._header)
        self._sizes[path] = len(self._header)
        return path, self._output

    def _make_room(self, size: int) -> None:
        """Remove the oldest files until `size` bytes fit."""
        while self._sizes and self.size + size > self._budget:
            path = next(iter(self._sizes))
            for key in [key for key, record in [*self._records.items()] if record.path == path]:
                self._records.pop(key, None)
            path.unlink(missing_ok=True)
            del self._sizes[path]


def _lock(directory: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(directory / "lock", timeout=0, thread_local=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        problem = "another process keeps its cache there"
    except OSError as error:
        problem = f"no cache can be kept there ({error.strerror})"
    else:
        return lock
    raise ValueError(f"{directory}: {problem}; choose another directory.")


def _next_record(file: BinaryIO, path: Path, length: int) -> tuple[bytes, _Record] | None:
    """The record at the file's position and its key, if it is whole."""
    fields = file.read(_FIELDS.size)
    if len(fields) < _FIELDS.size:
        return None
    size, key_size, digest = _FIELDS.unpack(fields)
    key, check = file.read(key_size), file.read(_CHECK_BYTES)
    record = _Record(path, file.tell(), size, digest)
    whole = check == _digest(fields + key, _CHECK_BYTES) and record.offset + size <= length
    return (key, record) if whole else None


def _write(file: BinaryIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


class Store:
    """Payloads by key, within budgets of bytes; those least recently used leave RAM first.

    Any thread may call it. `put` does not wait for the disk: what leaves RAM while 256 MiB wait to
    be written is dropped, unless `flush` is called in between. No error of the disk is raised: what
    cannot be written or read is missing, and logged.
    """

    def __init__(
        self,
        ram_bytes: int,
        fingerprint: str,
        directory: Path | None = None,
        disk_bytes: int = 2**36,
    ) -> None:
        """Create a store with what an earlier one left on disk.

        Args:
          ram_bytes: bytes in RAM, and up to 256 MiB more that are being written.
          fingerprint: of the model, and of all settings that the payloads depend on.
          directory: where to keep what leaves RAM; by default, it is dropped.
          disk_bytes: bytes on disk; must be more than the largest payload.

        Raises:
          ValueError: the directory cannot be written, or another process has it.
        """
        self._budget, self._ram_bytes = ram_bytes, 0
        self._ram: dict[bytes, bytes] = {}  # least recently used first
        self._leaving: dict[bytes, bytes] = {}  # until they are on disk
        self._lock = threading.Lock()  # of what is in RAM
        self._disk = _Disk(directory, disk_bytes, fingerprint) if directory else None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "v4jax-cache")

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            in_ram = key in self._ram or key in self._leaving
        return in_ram or (self._disk is not None and key in self._disk)

    @property
    def bytes_in_ram(self) -> int:
        """Bytes of payloads in RAM."""
        with self._lock:
            return self._ram_bytes + sum(map(len, self._leaving.values()))

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of this model's files."""
        return self._disk.size if self._disk else 0

    def get(self, key: bytes) -> bytes | None:
        """The payload of a key, which becomes the most recently used; None if it is missing."""
        with self._lock:
            payload = self._ram.get(key, self._leaving.get(key))
        if payload is None and self._disk:
            payload = self._disk.read(key)
        if payload is not None:
            self.put(key, payload)
        return payload

    def put(self, key: bytes, payload: bytes) -> None:
        """Keep a payload, which must be the same whenever the key is."""
        with self._lock:
            self._ram_bytes += len(payload) - len(self._ram.pop(key, b""))
            self._ram[key] = payload
            while self._ram_bytes > self._budget:
                oldest = next(iter(self._ram))
                left = self._ram.pop(oldest)
                self._ram_bytes -= len(left)
                self._leave(oldest, left)

    def flush(self) -> None:
        """Write to disk what is in RAM, and wait for it."""
        if self._disk:
            with self._lock:
                unwritten = [entry for entry in self._ram.items() if entry[0] not in self._disk]
                entries = [*self._leaving.items(), *unwritten]
            for writing in [self._writer.submit(self._write, *entry) for entry in entries]:
                writing.result()

    def close(self) -> None:
        """Finish writing what has left RAM, and release the directory."""
        self._writer.shutdown()
        if self._disk:
            self._disk.close()
            self._disk = None

    def _leave(self, key: bytes, payload: bytes) -> None:
        """Have a payload written unless it is on disk or the disk is behind; the lock is held."""
        if self._disk is None or key in self._disk or key in self._leaving:
            return
        if sum(map(len, self._leaving.values())) < _QUEUE_BYTES:
            self._leaving[key] = payload
            self._writer.submit(self._write, key, payload)

    def _write(self, key: bytes, payload: bytes) -> None:
        if self._disk:
            self._disk.append(key, payload)
        with self._lock:
            self._leaving.pop(key, None)
