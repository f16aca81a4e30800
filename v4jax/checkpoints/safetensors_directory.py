"""Checkpoint directories in Hugging Face's layout.

That is `config.json`, and either `model.safetensors` or an index with shards. If both exist, the
single file is read and the index ignored, as in transformers.
"""

import abc
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Self

import numpy as np

from v4jax.checkpoints import unfinished
from v4jax.checkpoints.byte_files import Box
from v4jax.checkpoints.disk import CheckpointError, read_json, require_space, write_json
from v4jax.checkpoints.remote import Folder
from v4jax.checkpoints.safetensors_file import (
    SafetensorsFile,
    TensorInfo,
    lookup,
    open_safetensors,
    write_safetensors,
)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFiles(abc.ABC):
    """A checkpoint's tensors, of a directory (`Checkpoint`) or on the Hub (`HubCheckpoint`).

    One shard at a time is open; views are as from `SafetensorsFile.read`.

    Attributes:
      path: what its files' paths begin with: the directory, or the repository's id.
      config: contents of `config.json`.
      names: all tensors, shard by shard, in byte order.
    """

    def __init__(
        self,
        path: PurePath,
        config: dict[str, Any],
        shards: Mapping[Any, Mapping[str, TensorInfo]],
    ) -> None:
        self.path, self.config = path, config
        self._shards = shards
        self._infos = {name: info for infos in shards.values() for name, info in infos.items()}
        self._shard_of = {name: shard for shard, infos in shards.items() for name in infos}
        self.names = tuple(self._infos)

    @property
    @abc.abstractmethod
    def version(self) -> Any:
        """In JSON, what changes when the files do."""

    @property
    def total_bytes(self) -> int:
        """Total bytes of all tensors."""
        return sum(info.nbytes for info in self._infos.values())

    def info(self, name: str) -> TensorInfo:
        """The tensor's dtype, shape and file."""
        return lookup(self._infos, name, self.path)

    def declarations(self) -> dict[str, TensorInfo]:
        """Each tensor's dtype, shape, and file relative to `path`."""
        inside = lambda file: type(self.path)(str(file)).relative_to(self.path)
        return {
            name: TensorInfo(info.dtype, info.shape, inside(info.file))
            for name, info in self._infos.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A read-only view of a tensor or of some of its rows; see `SafetensorsFile.read`."""
        return self._hold(lookup(self._shard_of, name, self.path)).read(name, rows)

    def read_box(self, name: str, box: Box) -> np.ndarray:
        """A box of a tensor; see `SafetensorsFile.read_box`."""
        return self._hold(lookup(self._shard_of, name, self.path)).read_box(name, box)

    def shards(self) -> Iterator[SafetensorsFile]:
        """Yield the files in order; each is closed when the next is requested."""
        for shard in self._shards:
            yield self._hold(shard)

    @abc.abstractmethod
    def _hold(self, shard: Any) -> SafetensorsFile:
        """Open a shard instead of the one before it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the open shard; a later read opens it again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoint(TensorFiles):
    """The tensors of a checkpoint directory; `open` reads and checks every header."""

    def __init__(
        self, path: PurePath, config: dict[str, Any], shards: Sequence[SafetensorsFile]
    ) -> None:
        super().__init__(path, config, {shard: shard.tensors for shard in shards})
        self._mapped: SafetensorsFile | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a directory.

        Raises:
          CheckpointError: it is not a checkpoint, or a file is missing, damaged or unexpected.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: is not a directory; give a checkpoint's directory.")
        for name in (CONFIG, SINGLE, INDEX):
            if (path / name).is_symlink():
                locate(path, name)
        folder = Folder(path)
        is_single = folder.exists(SINGLE)
        if not (is_single or (path / INDEX).is_file()) or not (path / CONFIG).is_file():
            raise CheckpointError(
                f"{folder.path}: is not a checkpoint: expected {CONFIG}, and {SINGLE} or {INDEX} "
                "with its shards. Give the directory that holds them."
            )
        config = read_json(locate(path, CONFIG))
        if is_single:
            return cls(folder.path, config, [_open(path, folder, SINGLE)])
        index = locate(path, INDEX)
        file_of = read_index(index)
        shards = {name: _open(path, folder, name) for name in shard_names(file_of)}
        check_index(index, file_of, {name: shard.names for name, shard in shards.items()})
        return cls(folder.path, config, list(shards.values()))

    @property
    def version(self) -> list[tuple[int, int]]:
        """Sizes and times of the shards."""
        return [(shard.file.size(), shard.file.modified()) for shard in self._shards]

    def _hold(self, shard: SafetensorsFile) -> SafetensorsFile:
        if self._mapped is not shard:
            self.close()
            self._mapped = shard
        return shard

    def close(self) -> None:
        """Release the memory map; a later read creates a new one."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


def _open(directory: Path, folder: Folder, name: str) -> SafetensorsFile:
    if folder.is_local:
        return open_safetensors(locate(directory, name))
    return open_safetensors(folder.file(name))


def read_index(path: Path) -> dict[str, str]:
    """The index's map of tensor names to file names, none of them outside the directory."""
    file_of = read_json(path).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(v, str) for v in file_of.values()):
        raise CheckpointError(
            f"{path}: weight_map is missing or does not map tensor names to file names; download "
            "the file again."
        )
    for name in set(file_of.values()):
        _check_inside(path, name)
    return file_of


def shard_names(file_of: Mapping[str, str]) -> list[str]:
    """The file names of an index, sorted."""
    return sorted(set(file_of.values()))


def check_index(
    path: Path, file_of: Mapping[str, str], names_in: Mapping[str, Collection[str]]
) -> None:
    """Raise unless every shard holds exactly the tensors that the index assigns to it."""
    belong = "The index and the shards do not belong together; download them again."
    for name, file in file_of.items():
        if name not in names_in[file]:
            raise CheckpointError(
                f"{path}: lists tensor {name!r} in {file}, which does not hold it. {belong}"
            )
    for file, present in names_in.items():
        for name in present:
            if name not in file_of:
                raise CheckpointError(
                    f"{path}: does not list tensor {name!r}, which {file} holds. {belong}"
                )
            if file_of[name] != file:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is both in {file_of[name]} and in {file}. {belong}"
                )


def _check_inside(referrer: Path, name: str) -> None:
    path = PureWindowsPath(name)  # knows both separators
    if path.anchor or ".." in path.parts or not path.parts:
        raise CheckpointError(
            f"{referrer}: names the file {name!r}, which would be outside the checkpoint's "
            "directory; do not trust this checkpoint."
        )


def locate(directory: Path, name: str) -> Path:
    """The path of one of a checkpoint's files.

    Links may lead anywhere, as their owner set them: to another disk, or from `snapshots` to
    `blobs` in the Hub's cache. Names in an index may not lead out; see `read_index`.
    """
    path = directory / name
    if os.path.isfile(path):
        return path
    if "\0" not in name and os.path.islink(path):
        raise CheckpointError(
            f"{path}: is a link to {os.readlink(path)}, which does not exist; fix the link, or "
            "mount the disk."
        )
    raise CheckpointError(
        f"{path}: does not exist or is not a file, but the checkpoint needs it; download it too."
    )


def write_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    shards: Sequence[Mapping[str, TensorInfo]],
    read: Callable[[str], Any],
    *,
    extras: Sequence[Path] = (),
) -> None:
    """Write a checkpoint directory; it appears under its name when it is complete.

    What an interrupted run left is replaced; after an exception nothing is left.

    Args:
      directory: directory to create; may exist if empty.
      config: contents of `config.json`.
      shards: tensors of each file, in order.
      read: called once for each tensor, in order; see `write_safetensors`.
      extras: files to copy, such as the tokenizer's.

    Raises:
      CheckpointError: the directory exists and is not empty, the disk is too full, or a tensor
        differs from its declaration or is declared twice.
    """
    directory = Path(directory).resolve()
    unfinished.check_target(directory)
    weight_map = _weight_map(shards)
    total_bytes = sum(info.nbytes for shard in shards for info in shard.values())
    with unfinished.begin(directory, "write", "") as work:
        require_space(work.directory, total_bytes)
        write_json(work.directory / CONFIG, config, indent=2)
        for extra in extras:
            shutil.copyfile(extra, work.directory / extra.name)
        for i, shard in enumerate(shards):
            path = work.directory / _shard_name(i, len(shards))
            write_safetensors(path, shard, read, metadata={"format": "pt"})
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(work.directory / INDEX, index, indent=2)
        work.finish()


def _weight_map(shards: Sequence[Mapping[str, TensorInfo]]) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        if repeated := weight_map.keys() & shard.keys():
            raise CheckpointError(f"Tensor {min(repeated)!r} is declared in two shards.")
        weight_map |= dict.fromkeys(shard, _shard_name(i, len(shards)))
    return dict(sorted(weight_map.items()))


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"
