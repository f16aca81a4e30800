"""Boxes of a native checkpoint's arrays, read from zarr's chunk files.

A chunk that is not compressed is its values row by row, so parts of it can be read. TensorStore,
which writes the arrays, reads entire chunks.
"""

import dataclasses
import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np

from v4jax.checkpoints import byte_files
from v4jax.checkpoints.byte_files import Box, Incomplete, lengths
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.remote import Folder
from v4jax.text.files import parse_json

DAMAGED = "The checkpoint is damaged; convert it again."
# How `zarr_arrays.Arrays` writes, and what zarr files may have otherwise.
_LAYOUT = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a folder of chunk files."""

    folder: Folder
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype

    def read(self, box: Box) -> np.ndarray:
        """A box of the array, of which little else is read; may be called by several threads."""
        out = np.empty(lengths(box), self.dtype)
        grid = [
            range(part.start // size, math.ceil(part.stop / size))
            for part, size in zip(box, self.chunks, strict=True)
        ]
        for chunk in itertools.product(*grid):
            corner = [i * size for i, size in zip(chunk, self.chunks, strict=True)]
            overlap = [
                (max(part.start, first), min(part.stop, first + size))
                for part, first, size in zip(box, corner, self.chunks, strict=True)
            ]
            inside = _shifted(overlap, corner)
            out[_shifted(overlap, [part.start for part in box])] = self._read_chunk(chunk, inside)
        return out

    def _read_chunk(self, chunk: tuple[int, ...], box: Box) -> np.ndarray:
        name = f"{self.name}/{'.'.join(map(str, chunk)) or '0'}"
        try:
            return byte_files.read_box(self.folder.file(name), 0, self.chunks, self.dtype, box)
        except Incomplete as error:
            raise CheckpointError(f"{error} {DAMAGED}") from error


def _shifted(intervals: list[tuple[int, int]], origin: list[int]) -> Box:
    """The intervals as slices that count from an origin."""
    return tuple(slice(a - o, b - o) for (a, b), o in zip(intervals, origin, strict=True))


def open_array(folder: Folder, name: str) -> Array:
    """Open an array of a folder; a CheckpointError says what is wrong with it."""
    file = folder.file(f"{name}/.zarray")
    try:
        values = parse_json(byte_files.read(file, 0, file.size()).decode())
        shape, chunks = tuple(values["shape"]), tuple(values["chunks"])
        unlike = [key for key, value in _LAYOUT.items() if values.get(key) != value]
        if unlike or len(shape) != len(chunks) or not all(size > 0 for size in chunks):
            raise ValueError(f"unexpected {', '.join(unlike) or 'chunks'}")
        return Array(folder, name, shape, chunks, _dtype(values["dtype"]))
    except Incomplete as error:
        raise CheckpointError(f"{error} {DAMAGED}") from error
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file.path}: is damaged ({error!r:.100}). {DAMAGED}") from error


def _dtype(name: Any) -> np.dtype:
    # TensorStore's names for small floats, which zarr has none for, are those of ml_dtypes.
    return np.dtype(getattr(ml_dtypes, name, name))
