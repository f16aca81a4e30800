"""Files that hold arrays row by row, read as byte ranges by many threads at once.

A file is on this machine (`LocalFile`) or behind a URL (`remote.RemoteFile`). `read_box` reads a
box of an array, which is a slice of each dim, and little else.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from v4jax.checkpoints.disk import CheckpointError

Box = tuple[slice, ...]
_ALIGNMENT = 64  # bytes; JAX uses arrays on the host without a copy from here on


class Incomplete(CheckpointError):
    """A file of a checkpoint does not exist or ends early."""


class ByteFile(Protocol):
    """A file's bytes.

    Attributes:
      path: the file, for messages.
      gap: ranges that are no further apart are best read as one.
    """

    path: PurePath
    gap: int

    def size(self) -> int:
        """Its number of bytes."""
        ...

    def modified(self) -> int:
        """When it was changed last, in ns; 0 if unknown."""
        ...

    def read_into(self, offsets: Sequence[int], parts: Sequence[memoryview]) -> None:
        """Fill each part with the bytes from its offset on."""
        ...


class LocalFile:
    """A file on this machine."""

    gap = 0

    def __init__(self, path: Path) -> None:
        self.path: PurePath = path

    def size(self) -> int:
        with _explained(self.path):
            return os.stat(self.path).st_size

    def modified(self) -> int:
        with _explained(self.path):
            return os.stat(self.path).st_mtime_ns

    def read_into(self, offsets: Sequence[int], parts: Sequence[memoryview]) -> None:
        with _explained(self.path), open(self.path, "rb", buffering=0) as file:
            for offset, part in zip(offsets, parts, strict=True):
                while part:
                    count = os.preadv(file.fileno(), [part], offset)
                    if not count:
                        raise Incomplete(f"{self.path}: ends early: a part is missing.")
                    part, offset = part[count:], offset + count


@contextlib.contextmanager
def _explained(path: PurePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = Incomplete if isinstance(error, FileNotFoundError) else CheckpointError
        raise kind(f"{path}: cannot be read: {error.strerror}.") from error


def read(file: ByteFile, start: int, size: int) -> bytes:
    """A range of a file."""
    content = bytearray(size)
    file.read_into([start], [memoryview(content)])
    return bytes(content)


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array like `np.empty`, whose first byte is aligned for JAX."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def lengths(box: Box) -> list[int]:
    """The shape of a box."""
    return [part.stop - part.start for part in box]


def read_box(file: ByteFile, start: int, shape: Sequence[int], dtype: Any, box: Box) -> np.ndarray:
    """A box of an array in row-major order that begins at byte `start`."""
    dtype = np.dtype(dtype)
    if not math.prod(lengths(box)):
        return np.empty(lengths(box), dtype)
    box = (slice(0, 1), *box)  # so that there is a first dim
    wide = _widened(file.gap, (1, *shape), dtype.itemsize, box)
    out = np.empty(lengths(wide), dtype)
    offsets, size = _runs((1, *shape), dtype.itemsize, wide)
    flat = out.reshape(-1).view(np.uint8).data
    parts = [flat[i * size : (i + 1) * size] for i in range(len(offsets))]
    file.read_into([start + offset for offset in offsets], parts)
    inner = (slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True))
    return out[tuple(inner)][0]


def _widened(gap: int, shape: tuple[int, ...], itemsize: int, box: Box) -> Box:
    """The box with whole rows in its last dims, as far as no more than `gap` is between ranges."""
    dims = list(box)
    for dim in reversed(range(1, len(shape))):
        row = itemsize * math.prod(shape[dim:])
        between = row - itemsize * (dims[dim].stop - dims[dim].start) * math.prod(shape[dim + 1 :])
        if between > gap or all(part.stop - part.start == 1 for part in dims[:dim]):
            break
        dims[dim] = slice(0, shape[dim])
    return tuple(dims)


def _runs(shape: tuple[int, ...], itemsize: int, box: Box) -> tuple[list[int], int]:
    """Offsets of the box's contiguous ranges, and the bytes of each."""
    dim = len(shape) - 1
    while dim and box[dim] == slice(0, shape[dim]):
        dim -= 1
    strides = [itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    outer = [
        np.arange(part.start, part.stop) * stride
        for part, stride in zip(box[:dim], strides[:dim], strict=True)
    ]
    offsets = np.array([box[dim].start * strides[dim]])
    for positions in reversed(outer):
        offsets = (positions[:, None] + offsets).reshape(-1)
    return offsets.tolist(), (box[dim].stop - box[dim].start) * strides[dim]
