"""`v4jax convert`: a Hugging Face checkpoint to a native one, a tensor at a time.

Tensors are read in file order, so that Hub shards can be downloaded and deleted one by one. A
journal records finished tensors, and an interrupted run resumes from it. `export` is the inverse.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import arguments, waiting
from v4jax.checkpoints import (
    disk,
    hosts,
    hub,
    native,
    passengers,
    release,
    release_weights,
    remote,
    safetensors_directory,
    tensor_names,
    unfinished,
    zarr_arrays,
)
from v4jax.checkpoints.disk import CheckpointError, require_space
from v4jax.checkpoints.export import export
from v4jax.checkpoints.formats import Format
from v4jax.checkpoints.native import Manifest, Weights
from v4jax.checkpoints.release import Release
from v4jax.checkpoints.remote import Folder
from v4jax.checkpoints.safetensors_directory import TensorFiles
from v4jax.checkpoints.safetensors_file import DTYPES, TensorInfo, write_safetensors
from v4jax.checkpoints.tensor_names import Slot
from v4jax.checkpoints.zarr_arrays import Arrays
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model
from v4jax.waiting import Progress

__all__ = ["convert", "export"]

_IN_FLIGHT_BYTES = 128 * 2**20
_FILE_BYTES = 4096  # most that a file occupies on a disk beyond its contents
_RESUME = "Free space or repair the disk, then run the command again: it resumes where it stopped."


class _Source(NamedTuple):
    """A checkpoint to convert: its tensors, and the directory of its small files."""

    files: TensorFiles
    folder: Path


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """Everything that will be written.

    Attributes:
      root: what the paths of the source's files begin with.
      tensors: its tensors by release name.
      config: its configuration.
      manifest: manifest of the native checkpoint.
      formats: how the source stores each leaf.
      structs: each array to write, by name, and the number of its leading stack dims.
      slots: destination of each release tensor.
    """

    root: PurePath
    tensors: Release
    config: ModelConfig
    manifest: Manifest
    formats: dict[str, Format]
    structs: dict[str, tuple[jax.ShapeDtypeStruct, int]]
    slots: dict[str, Slot]


@arguments.checked(**arguments.FILES)
def convert(
    source: str | Path,
    target: str | Path,
    *,
    weights: Weights = "keep",
    revision: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a native checkpoint; it appears under its name when it is complete.

    The files' headers are checked before anything is written. Until it is complete, the checkpoint
    is in `target` + '.unfinished'; after an interruption the same call resumes from there. The
    processes of `jax.distributed` share the work if all of them call this function; they must see
    the same directories. If one fails, all fail.

    Args:
      source: a Hugging Face directory; the URL of one, such as gs://bucket/folder, which is read
        tensor by tensor; or a Hub id, whose shards are downloaded one by one.
      target: directory to create.
      weights: 'keep' stores every tensor as the source does, FP8 and FP4 included; a dtype decodes
        everything to it, except tensors that the model needs in float32.
      revision: branch, tag or commit of a Hub id; the main branch by default.
      progress: called with the current activity, bytes done and total bytes; by default they are
        shown on a terminal and in a notebook.

    Raises:
      CheckpointError: the source is not a DeepSeek-V4 checkpoint or is damaged; the target exists;
        the disk is too full; an unfinished run there had another source or other weights.
    """
    if not arguments.one_of(weights, get_args(Weights)):
        raise ValueError(
            f"weights is {arguments.shown(weights)}; it must be one of {get_args(Weights)}."
        )
    target, team = Path(os.path.abspath(os.path.expanduser(target))), hosts.all_processes()
    with contextlib.ExitStack() as stack:
        with team.together():
            unfinished.check_target(target)
            scratch = unfinished.scratch(target)
            opened = stack.enter_context(_open(source, revision, scratch / f"process-{team.index}"))
            unfinished.check_target(target, opened.folder)
            conversion = _check(opened, weights)
            files = _passengers(opened.folder, conversion.config)
            identity = _identity(opened.files, weights)
        work = stack.enter_context(unfinished.begin(target, "convert", identity, team))
        work.team.first(lambda: _create(conversion, work))
        with work.team.together():
            _write(conversion, work, progress)
        work.team.first(lambda: _complete(conversion, opened.folder, files, work))
        work.finish()


def _complete(
    conversion: _Conversion, folder: Path, files: list[PurePath], work: unfinished.Work
) -> None:
    """Copy the small files; write the manifest, which makes it a checkpoint, last."""
    passengers.copy(folder, [*files, PurePath(safetensors_directory.CONFIG)], work.directory)
    manifest = conversion.manifest
    if manifest.weights == "keep" and manifest.index is not None:
        index = [PurePath(safetensors_directory.INDEX)]
        passengers.copy(folder, index, work.directory / native.EXTRAS)
    disk.write_json(work.directory / native.MANIFEST, manifest.to_json())


@contextlib.contextmanager
def _open(source: str | Path, revision: str | None, scratch: Path) -> Iterator[_Source]:
    path = hub.local(source, revision)
    if path is None and remote.is_url(source):
        names = [name for name in remote.listing(str(source)) if passengers.is_small(name)]
        is_native = native.MANIFEST in names
        path = remote.resolve(str(source), revision, remote.NAMES if is_native else names)
    if path is None:
        manifest = hub.resolve(source, revision=revision, allow_patterns=[native.MANIFEST])
        _refuse_native(manifest, str(source))
        later = (*passengers.FOREIGN, "*.safetensors")
        folder = hub.resolve(source, revision=revision, allow_patterns=["*"], ignore_patterns=later)
        # The snapshot's name is its commit: take the shards from the same one.
        with hub.HubCheckpoint.open(str(source), scratch, revision=folder.name) as files:
            yield _Source(files, folder)
        return
    _refuse_native(path, str(Folder(path).path))
    unfinished.refuse_unfinished(path)
    with safetensors_directory.Checkpoint.open(path) as files:
        yield _Source(files, path)


def _refuse_native(folder: Path, name: str) -> None:
    if native.is_native(folder):
        raise CheckpointError(f"{name}: is already a native checkpoint.")


def _passengers(folder: Path, cfg: ModelConfig) -> list[PurePath]:
    """The files to copy, checked."""
    files = passengers.find(folder)
    for inside in files:
        if inside.parts[0] in native.OWN:
            raise CheckpointError(
                f"{folder / inside}: native checkpoints reserve the name {inside.parts[0]}; move "
                "the file elsewhere."
            )
    passengers.check(folder, files, cfg.vocab_size)
    return files


def _check(source: _Source, weights: Weights) -> _Conversion:
    tensors, cfg, formats = release_weights.check(source.files, source.folder)
    held: dict[str, Format] = formats if weights == "keep" else dict.fromkeys(formats)
    structs = {}
    for leaf, spec in params.leaves(Model(cfg)):
        struct = _struct(leaf, spec, held[leaf], tensors, cfg, weights)
        arrays = zip(native.array_names(leaf, held[leaf]), jax.tree.leaves(struct), strict=True)
        structs |= {name: (array, spec.stack_dims) for name, array in arrays}
    manifest = Manifest(weights, held, source.files.declarations(), _index(source))
    slots = tensor_names.slots(cfg)
    return _Conversion(source.files.path, tensors, cfg, manifest, formats, structs, slots)


def _struct(
    leaf: str, spec: ParamSpec, held: Format, tensors: Release, cfg: ModelConfig, weights: Weights
) -> Any:
    if weights != "keep":
        return params.leaf_struct(spec, weights)
    if held is not None or spec.stored == "i64":
        return release_weights.leaf_struct(leaf, spec, held, tensors, cfg, jnp.bfloat16)
    names = tensor_names.flatten(tensor_names.release_names(leaf, cfg))
    dtypes = {tensors[name].dtype for name in names}
    # Float32 represents every value of the other dtypes.
    dtype = DTYPES[dtypes.pop() if len(dtypes) == 1 else "F32"]
    return jax.ShapeDtypeStruct(spec.shape, dtype)


def _index(source: _Source) -> dict[str, Any] | None:
    file = source.folder / safetensors_directory.INDEX
    if not file.is_file() or Folder(source.folder).exists(safetensors_directory.SINGLE):
        return None
    return disk.read_json(file).get("metadata", {})


def _identity(files: TensorFiles, weights: Weights) -> str:
    """A digest of the settings and of the source: its headers, configuration and version."""
    infos = [
        (name, info.dtype, info.shape, str(info.file))
        for name, info in files.declarations().items()
    ]
    parts = [native.VERSION, weights, files.config, files.version, infos]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _units(conversion: _Conversion) -> dict[str, int]:
    """The units of work in the order of the source's files, with their bytes there.

    A unit is a release tensor, written with its scales, or all extras of one file.
    """
    units: dict[str, int] = {}
    extras = set(release.extras(conversion.tensors, conversion.config))
    for name, tensor in conversion.tensors.tensors.items():
        unit = _extras_file(conversion, name) if name in extras else name
        if name in extras or name in conversion.slots:
            units[unit] = units.get(unit, 0) + TensorInfo(tensor.dtype, tensor.shape).nbytes
    return units


def _extras_file(conversion: _Conversion, name: str) -> str:
    root = conversion.root
    file = type(root)(conversion.tensors[name].file).relative_to(root)
    return f"{native.EXTRAS}/{file.as_posix()}"


def _left(conversion: _Conversion, work: unfinished.Work) -> dict[str, int]:
    units = _units(conversion)
    return {unit: size for unit, size in units.items() if unit not in work.done}


def _create(conversion: _Conversion, work: unfinished.Work) -> None:
    """Create the arrays, if there is room for all that is left to write."""
    left = sum(_left(conversion, work).values())
    _require_space(conversion, work, left / max(sum(_units(conversion).values()), 1))
    arrays = Arrays(work.directory / native.WEIGHTS)
    _open_arrays(conversion, arrays)
    arrays.write_metadata(list(conversion.structs))


def _open_arrays(conversion: _Conversion, arrays: Arrays) -> dict[str, Any]:
    return {
        name: arrays.create(name, struct.shape, struct.dtype, stack_dims)
        for name, (struct, stack_dims) in conversion.structs.items()
    }


def _write(conversion: _Conversion, work: unfinished.Work, progress: Progress | None) -> None:
    """Write this process's share of what is left."""
    left = _left(conversion, work)
    mine = work.team.share(left)
    done = sum(_units(conversion).values()) - sum(left.values()) if work.team.count == 1 else 0
    total = done + sum(left[unit] for unit in mine)
    stores = _open_arrays(conversion, Arrays(work.directory / native.WEIGHTS))
    with contextlib.closing(_Writer(work)) as writer, waiting.progress(progress) as report:
        for unit in mine:
            if unit in conversion.slots:
                writer.write(unit, _parts(conversion, stores, unit))
            else:
                _write_extras(conversion, work, unit)
            done += left[unit]
            report("converting", done, total)
        writer.flush()


def _require_space(conversion: _Conversion, work: unfinished.Work, share: float) -> None:
    nbytes = 0
    for struct, stack_dims in conversion.structs.values():
        chunk = zarr_arrays.chunk_shape(struct.shape, stack_dims, struct.dtype.itemsize)
        chunks = math.prod(map(math.ceil, np.divide(struct.shape, chunk)))
        nbytes += math.prod(struct.shape) * struct.dtype.itemsize + chunks * _FILE_BYTES
    extras = release.extras(conversion.tensors, conversion.config)
    infos = [conversion.tensors[name] for name in extras]
    nbytes += sum(TensorInfo(info.dtype, info.shape).nbytes for info in infos)
    require_space(work.directory, int(nbytes * share))


def _parts(
    conversion: _Conversion, stores: dict[str, Any], name: str
) -> Iterator[tuple[Any, np.ndarray]]:
    """Slices of arrays and the values to write there, for one release tensor."""
    leaf, index, _ = conversion.slots[name]
    stored, held = conversion.formats[leaf], conversion.manifest.leaves[leaf]
    places = [stores[array][index] for array in native.array_names(leaf, held)]
    if held is not None:
        yield from zip(
            places, release_weights.quantized(conversion.tensors, name, held), strict=True
        )
        return
    [store], [array] = places, native.array_names(leaf, held)
    dtype = store.dtype.numpy_dtype
    if stored is not None:
        yield store, release_weights.dense(conversion.tensors, name, stored, dtype)
        return
    struct, stack_dims = conversion.structs[array]
    height = zarr_arrays.chunk_shape(struct.shape, stack_dims, dtype.itemsize)[stack_dims]
    for start in range(0, store.shape[0], height):
        rows = slice(start, min(start + height, store.shape[0]))
        yield store[rows], conversion.tensors[name].read(rows).astype(dtype, copy=False)


def _write_extras(conversion: _Conversion, work: unfinished.Work, unit: str) -> None:
    tensors = {
        name: conversion.tensors[name]
        for name in release.extras(conversion.tensors, conversion.config)
        if _extras_file(conversion, name) == unit
    }
    infos = {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    path = work.directory / unit
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, infos, lambda name: tensors[name].read())
    work.add(unit)


class _Writer:
    """Writes slices of arrays while the next are read; journals a unit once it is on disk."""

    def __init__(self, work: unfinished.Work) -> None:
        self._work = work
        self._queue: collections.deque[tuple[Any, int, str | None]] = collections.deque()
        self._bytes = 0

    def write(self, unit: str, parts: Iterator[tuple[Any, np.ndarray]]) -> None:
        for store, values in parts:
            commit = store.write(values).commit
            commit.force()
            self._queue.append((commit, values.nbytes, None))
            self._bytes += values.nbytes
            while self._bytes > _IN_FLIGHT_BYTES:
                self._complete_oldest()
        self._queue.append((None, 0, unit))
        while self._queue and (self._queue[0][0] is None or self._queue[0][0].done()):
            self._complete_oldest()

    def flush(self) -> None:
        """Wait until everything is on disk."""
        while self._queue:
            self._complete_oldest()

    def close(self) -> None:
        """Wait for pending writes, ignoring their errors: nothing is written afterwards."""
        for future, _, _ in self._queue:
            if future is not None:
                with contextlib.suppress(Exception):
                    future.result()
        self._queue.clear()

    def _complete_oldest(self) -> None:
        future, nbytes, unit = self._queue.popleft()
        self._bytes -= nbytes
        if future is not None:
            with zarr_arrays.explained(self._work.directory, _RESUME):
                future.result()
        if unit is not None:
            self._work.add(unit)
