"""safetensors files: a reader of tensors or boxes of them, and a writer that streams.

The format: the header's length in eight bytes (little-endian), the header (JSON: tensor name to
dtype, shape and offsets), then the tensors' bytes without gaps. The safetensors package does not
read F8_E4M3, F8_E8M0 or F4 into NumPy arrays, and V4's weights are in these.
"""

import dataclasses
import difflib
import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from v4jax.checkpoints import byte_files
from v4jax.checkpoints.byte_files import Box, ByteFile, LocalFile
from v4jax.checkpoints.disk import CheckpointError, replacing, require_space, sync_directory
from v4jax.text.files import parse_json

DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F4": np.dtype("u1"),  # two elements per byte
}
# The first name of each dtype: U8, not F4.
DTYPE_NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors package's limit
_MAX_RANK = 32
_MAX_BYTES = 2**62
# Mapped pages stay resident until dropped, which happens every so many bytes of views returned.
_DROP_AFTER_BYTES = 256 * 2**20
_DAMAGED = "The file is damaged; download it again."


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's declaration, and its place in a file.

    Attributes:
      dtype: dtype name in the format, a key of `DTYPES`.
      shape: shape in elements, also for F4.
      file: file that holds it; None for a tensor that is not written yet.
      start: offset of its first byte from the end of the file's header.
    """

    dtype: str
    shape: tuple[int, ...]
    file: PurePath | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes it occupies in a file."""
        return math.prod(self.array_shape) * DTYPES[self.dtype].itemsize

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape it is read in: F4's last dim is halved, as one uint8 holds two elements."""
        if self.dtype == "F4":
            return (*self.shape[:-1], self.shape[-1] // 2)
        return self.shape


class SafetensorsFile:
    """One file's tensors, declared in `tensors` in byte order.

    Whole tensors and rows of a file on this machine are views of a memory map.
    """

    def __init__(
        self,
        file: ByteFile,
        tensors: dict[str, TensorInfo],
        metadata: dict[str, str],
        data_start: int,
    ) -> None:
        self.file, self.path = file, file.path
        self.names = tuple(tensors)
        self.metadata = metadata
        self.tensors = tensors
        self._data_start = data_start
        self._size = data_start + sum(info.nbytes for info in tensors.values())
        self._map: mmap.mmap | None = None
        self._viewed_bytes = 0

    def info(self, name: str) -> TensorInfo:
        """The tensor's dtype, shape and place in the file."""
        return lookup(self.tensors, name, self.path)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A read-only view of a tensor, or of some of its rows; nothing is copied.

        The view stays valid after `close`. Later reads may drop its pages, which are reloaded from
        the file when touched, so resident memory stays bounded while streaming. Of a remote file,
        it is a copy.

        Args:
          name: one of `names`.
          rows: slice of the first dim.

        Returns:
          An array of the dtype in `DTYPES`; F4 is uint8, its last dim halved.
        """
        info = self.info(name)
        if not isinstance(self.file, LocalFile):
            box = [slice(0, size) for size in info.array_shape]
            if rows is not None:
                box[0] = slice(*rows.indices(info.array_shape[0])[:2])
            return self.read_box(name, tuple(box))
        start = self._data_start + info.start
        view = np.ndarray(info.array_shape, DTYPES[info.dtype], self._mapped(), start)
        if rows is not None:
            view = view[rows]
        self._count(view.nbytes)
        return view

    def read_box(self, name: str, box: Box) -> np.ndarray:
        """A box of a tensor, of which little else is read; may be called by several threads.

        Args:
          name: one of `names`.
          box: slices of the dims of `TensorInfo.array_shape`, whose bounds are given and inside.
        """
        info = self.info(name)
        start = self._data_start + info.start
        return byte_files.read_box(self.file, start, info.array_shape, DTYPES[info.dtype], box)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file has become empty
                raise CheckpointError(f"{self.path}: cannot be mapped ({error}).") from error
            if len(self._map) != self._size:
                self._map = None
                raise CheckpointError(f"{self.path}: changed while it was in use; open it again.")
        return self._map

    def _count(self, nbytes: int) -> None:
        self._viewed_bytes += nbytes
        if self._viewed_bytes > _DROP_AFTER_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped().madvise(mmap.MADV_DONTNEED)
            self._viewed_bytes = nbytes

    def close(self) -> None:
        """Release the map; the next read creates a new one, and views keep theirs."""
        self._map = None
        self._viewed_bytes = 0

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_safetensors(file: str | Path | ByteFile) -> SafetensorsFile:
    """Read and check a file's header; a CheckpointError says what is wrong with it."""
    opened = LocalFile(Path(file)) if isinstance(file, str | Path) else file
    path, size = opened.path, opened.size()
    header = _read_header(opened, size)
    entries, metadata = _parse_header(path, header)
    data_start = 8 + len(header)
    infos = check_entries(path, entries, size - data_start)
    return SafetensorsFile(opened, infos, metadata, data_start)


def lookup(tensors: Mapping[str, Any], name: str, where: PurePath | str) -> Any:
    """`tensors[name]`, or a CheckpointError with the nearest name."""
    if name in tensors:
        return tensors[name]
    near = difflib.get_close_matches(name, tensors, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise CheckpointError(f"{where}: has no tensor {name!r}{hint}.")


def _read_header(file: ByteFile, size: int) -> bytes:
    path = file.path
    if size < 8:
        raise CheckpointError(
            f"{path}: has {size} bytes; a safetensors file has at least 8. {_DAMAGED}"
        )
    prefix = byte_files.read(file, 0, 8)
    if prefix == b"version ":
        raise CheckpointError(
            f"{path}: looks like a Git LFS pointer, not the file itself; run 'git lfs pull'."
        )
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: declares a header of {length:,} bytes; the limit is {_MAX_HEADER_BYTES:,}. "
            "Damaged, or not a safetensors file; download it again."
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: ends inside its header, {8 + length - size:,} bytes early. {_DAMAGED}"
        )
    return byte_files.read(file, 8, length)


def _parse_header(path: PurePath, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        entries = parse_json(header.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not valid JSON: {error}. {_DAMAGED}"
        ) from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ in the header does not map strings to strings."
        )
    return entries, metadata


def check_entries(
    file: PurePath, entries: Mapping[str, Any], data_bytes: int | None = None
) -> dict[str, TensorInfo]:
    """Check a header's entries and return them in byte order.

    Args:
      file: file to name in errors and in the result.
      entries: tensor name to a mapping with dtype, shape and data_offsets.
      data_bytes: bytes in the file after its header, if known.
    """
    infos = sorted(
        ((name, _tensor_info(file, name, entry)) for name, entry in entries.items()),
        key=lambda item: (item[1].start, item[1].nbytes),
    )
    end = 0
    for name, info in infos:
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "has a gap before it"
            raise CheckpointError(
                f"{file}: tensor {name!r} begins at byte {info.start:,}, not {end:,}: it {fault}. "
                f"{_DAMAGED}"
            )
        end += info.nbytes
    if data_bytes is not None and end > data_bytes:
        name = next(name for name, info in infos if info.start + info.nbytes > data_bytes)
        raise CheckpointError(
            f"{file}: the file is cut off: {end - data_bytes:,} of {end:,} bytes of tensors are "
            f"missing, from {name!r} on. Download it again."
        )
    if data_bytes is not None and end < data_bytes:
        raise CheckpointError(
            f"{file}: {data_bytes - end:,} bytes follow the last tensor. {_DAMAGED}"
        )
    return dict(infos)


def _tensor_info(file: PurePath, name: str, entry: Any) -> TensorInfo:
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, Mapping) or any(field not in entry for field in fields):
        raise CheckpointError(f"{file}: tensor {name!r} lacks dtype, shape or offsets. {_DAMAGED}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if fault := _fault(dtype, shape):
        raise CheckpointError(f"{file}: tensor {name!r} has {fault}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{file}: tensor {name!r} has offsets {offsets!r:.100}. {_DAMAGED}")
    info = TensorInfo(dtype, tuple(shape), file, offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} ({dtype} {list(shape)}) needs {info.nbytes:,} bytes, but its "
            f"offsets span {offsets[1] - offsets[0]:,}. {_DAMAGED}"
        )
    return info


def _fault(dtype: Any, shape: Any) -> str | None:
    """What is wrong with a declaration, to follow 'has' in a message; None if nothing is."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {dtype!r:.100}; convert it to one of {', '.join(DTYPES)}."
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        return (
            f"shape {shape!r:.100}; a shape is a list of at most {_MAX_RANK} sizes, none negative. "
            f"{_DAMAGED}"
        )
    if dtype == "F4" and (not shape or shape[-1] % 2):
        return (
            f"shape {list(shape)} in F4; a byte holds two elements, so the last dim must be even."
        )
    # Ignore dims of 0: NumPy rejects the other dims of an empty array too.
    if math.prod(size or 1 for size in shape) * DTYPES[dtype].itemsize > _MAX_BYTES:
        return f"shape {list(shape)!r:.100}, which is too large to be real. {_DAMAGED}"
    return None


def _are_sizes(values: Any) -> bool:
    # Not isinstance: JSON's true is an int in Python.
    return isinstance(values, list | tuple) and all(type(v) is int and v >= 0 for v in values)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of declared tensors, holding one of them at a time.

    The file appears under its name when it is complete and on disk; until then it is `path` +
    '.part'. An exception removes that file, and leaves `path` as it was.

    Args:
      path: file to create or replace.
      tensors: declarations in file order. As in the safetensors package, larger dtypes first keep
        every tensor aligned.
      read: called once for each name, in order; returns an array as `SafetensorsFile.read` would.
      metadata: any strings for the header.

    Raises:
      CheckpointError: a declaration is invalid, an array differs from its declaration, or the disk
        is too full, which is checked before any work is done.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; give a file name.")
    header = _encode_header(path, tensors, metadata or {})
    with replacing(path) as file:
        require_space(path.parent, len(header) + sum(info.nbytes for info in tensors.values()))
        file.write(header)
        for name, info in tensors.items():
            file.write(_array_bytes(path, name, info, read(name)))
    sync_directory(path.parent)


def _encode_header(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in tensors.items():
        if name == "__metadata__":
            raise CheckpointError(f"{path}: no tensor can be named __metadata__; rename it.")
        if fault := _fault(info.dtype, info.shape):
            raise CheckpointError(f"{path}: tensor {name!r} has {fault}")
        start, end = end, end + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _array_bytes(path: Path, name: str, info: TensorInfo, value: Any) -> memoryview:
    array = np.asarray(value)
    if (array.dtype, array.shape) != (DTYPES[info.dtype], info.array_shape):
        raise CheckpointError(
            f"{path}: tensor {name!r} was declared {info.dtype} {list(info.shape)}, but "
            f"read as {array.dtype} {list(array.shape)}."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
