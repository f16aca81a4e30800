"""`v4jax export`: a native checkpoint back to the files that it was converted from."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from v4jax import arguments, waiting
from v4jax.checkpoints import (
    disk,
    hosts,
    hub,
    native,
    passengers,
    remote,
    safetensors_directory,
    tensor_names,
    unfinished,
)
from v4jax.checkpoints.disk import CheckpointError, require_space
from v4jax.checkpoints.formats import Format
from v4jax.checkpoints.native import Native
from v4jax.checkpoints.safetensors_file import (
    DTYPES,
    TensorInfo,
    open_safetensors,
    write_safetensors,
)
from v4jax.checkpoints.zarr_files import DAMAGED
from v4jax.model.config import ModelConfig
from v4jax.waiting import Progress

_DTYPE_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_QUANTISATION_KEYS = ("quantization_config", "expert_dtype")


@arguments.checked(**arguments.FILES)
def export(
    source: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a Hugging Face checkpoint; it appears under its name when it is complete.

    Names, shapes and files are those of the source that was converted. If it was converted with
    weights 'keep', so are dtypes and every byte of the tensors and of the other files; only the
    headers of the tensors' files are rewritten. Otherwise tensors are dense, without scales, and
    the configuration has no quantisation; DSpark's tensors stay as they were. An interrupted run
    leaves `target` + '.unfinished', and the same call resumes from it, file by file. Processes of
    `jax.distributed` share the files if all of them call this function; see `convert`.

    Args:
      source: a native checkpoint, or a Hub id.
      target: directory to create.
      revision: branch, tag or commit of a Hub id; the main branch by default.
      progress: called with the current activity, bytes done and total bytes; by default they are
        shown on a terminal and in a notebook.

    Raises:
      CheckpointError: the source is not a native checkpoint or is damaged; the target exists; the
        disk is too full.
    """
    target, team = Path(os.path.abspath(os.path.expanduser(target))), hosts.all_processes()
    with team.together():
        unfinished.check_target(target)
        remote.refuse(source, "a native checkpoint to export")
        opened = Native(_resolve(source, revision))
        unfinished.check_target(target, opened.path)
        files = passengers.find(opened.path, besides=native.OWN)
        passengers.check(opened.path, files, opened.config.vocab_size)
        identity = hashlib.sha256((opened.path / native.MANIFEST).read_bytes()).hexdigest()
        tensors, index = _Native(opened), _source_index(opened)
    with unfinished.begin(target, "export", identity, team) as work:
        write_shards(tensors, work, progress, what="exporting")
        work.team.first(lambda: _complete(opened, index, files, tensors, work))
        work.finish()


def _complete(
    opened: Native,
    index: Path | None,
    files: list[PurePath],
    tensors: "Tensors",
    work: unfinished.Work,
) -> None:
    """Write the index and the configuration, and copy the other small files."""
    weights, metadata = opened.manifest.weights, opened.manifest.index
    if index is not None:
        passengers.copy(index, [PurePath(safetensors_directory.INDEX)], work.directory)
    elif metadata is not None:
        write_index(metadata, tensors.files, work.directory, same=weights == "keep")
    passengers.copy(opened.path, files, work.directory)
    write_config(opened.path, work.directory, weights)


def _resolve(source: str | Path, revision: str | None) -> Path:
    """The local directory; weights are downloaded only if it is a native checkpoint."""
    small = [native.MANIFEST, safetensors_directory.CONFIG]
    directory = hub.resolve(source, revision=revision, allow_patterns=small)
    if not native.is_native(directory):
        return directory
    return hub.resolve(
        source, revision=revision, allow_patterns=["*"], ignore_patterns=passengers.FOREIGN
    )


def _source_index(opened: Native) -> Path | None:
    """The folder that holds a copy of the source's own index, or None.

    Raises:
      CheckpointError: the index is damaged, or another checkpoint's.
    """
    file = opened.path / native.EXTRAS / safetensors_directory.INDEX
    if opened.manifest.index is None or not file.is_file():
        return None
    sources = {name: str(info.file) for name, info in opened.manifest.sources.items()}
    if safetensors_directory.read_index(file) != sources:
        raise CheckpointError(f"{file}: does not list the tensors of {native.MANIFEST}. {DAMAGED}")
    return file.parent


class Tensors:
    """The tensors to write, by their names in the source.

    Attributes:
      files: tensors of each file, in order.
      slots: where the model holds each release tensor.
      formats: how each leaf is stored.
      matrices: the quantised matrices, by the names of their scales.
    """

    def __init__(
        self,
        sources: Mapping[str, TensorInfo],
        cfg: ModelConfig,
        formats: Mapping[str, Format],
        weights: native.Weights,
        extras: Collection[str],
    ) -> None:
        """Declare what to write.

        Args:
          sources: tensors of the source's files, in order, by their names there.
          cfg: the model's configuration.
          formats: how each leaf is stored.
          weights: 'keep', or the dtype of everything that need not be float32.
          extras: release tensors that stay as they are in the source.
        """
        self.formats, self.slots = formats, tensor_names.slots(cfg)
        quantised = [name for name, slot in self.slots.items() if formats[slot.leaf] is not None]
        self.matrices = {tensor_names.scale_name(name): name for name in quantised}
        translate = tensor_names.to_release(sources)
        self._ours = {theirs: translate(theirs) for theirs in sources}
        self.files: dict[str, dict[str, TensorInfo]] = {}
        for theirs, info in sources.items():
            name = self._ours[theirs]
            declared = _stored_as(name, info, self.slots, "keep" if name in extras else weights)
            if declared is not None:
                self.files.setdefault(str(info.file), {})[theirs] = declared

    def read(self, theirs: str, declared: TensorInfo) -> np.ndarray:
        """A tensor's values, in the declared dtype and shape."""
        name = self._ours[theirs]
        if not tensor_names.is_fused(name):
            return self.read_one(name, declared.dtype)
        out = np.empty(declared.shape, DTYPES[declared.dtype])
        for matrix, e, rows in tensor_names.of_fused(name, declared.shape):
            out[e, rows] = self.read_one(matrix, declared.dtype)
        return out

    def read_one(self, name: str, dtype: str) -> np.ndarray:
        """The values of a release tensor."""
        raise NotImplementedError


class _Native(Tensors):
    """The tensors of a native checkpoint's source."""

    def __init__(self, opened: Native) -> None:
        self._native = opened
        self._extras = {}
        for file in sorted((opened.path / native.EXTRAS).rglob("*.safetensors")):
            extras = open_safetensors(file)
            self._extras |= dict.fromkeys(extras.names, extras)
        manifest = opened.manifest
        super().__init__(
            manifest.sources, opened.config, manifest.leaves, manifest.weights, self._extras
        )

    def read_one(self, name: str, dtype: str) -> np.ndarray:
        if name in self._extras:
            return self._extras[name].read(name)
        if name in self.matrices:
            leaf, index, _ = self.slots[self.matrices[name]]
            return self._native.read(f"{leaf}.scale", index).T
        leaf, index, _ = self.slots[name]
        if self.formats[leaf] is None:
            return self._native.read(leaf, index).astype(DTYPES[dtype], copy=False)
        return self._native.stored(leaf, index)[0].view(DTYPES[dtype])


def _stored_as(
    name: str, source: TensorInfo, slots: Mapping[str, tensor_names.Slot], weights: native.Weights
) -> TensorInfo | None:
    """How a tensor is written; None for the scales of a weight that is now dense."""
    if weights == "keep":
        return TensorInfo(source.dtype, source.shape)
    if tensor_names.is_fused(name):
        return TensorInfo(_DTYPE_NAMES[weights], source.shape)
    if name not in slots:
        return None
    spec = slots[name].spec
    if spec.stored == "i64":
        return TensorInfo(source.dtype, source.shape)
    dtype = "F32" if spec.stored == "f32" else _DTYPE_NAMES[weights]
    return TensorInfo(dtype, spec.shape[spec.stack_dims :])


def write_shards(
    tensors: Tensors,
    work: unfinished.Work,
    progress: Progress | None,
    *,
    what: str,
    written: Callable[[str], None] = lambda file: None,
) -> None:
    """Write each file that is not done yet, one tensor at a time; a team's processes share them.

    Args:
      tensors: what to write; each is read once, in order.
      work: the directory to write to, and what is done.
      progress: called with `what`, bytes done and total bytes.
      what: current activity, for `progress`.
      written: called with each file before it counts as done.
    """
    sizes = {f: sum(i.nbytes for i in infos.values()) for f, infos in tensors.files.items()}
    left = {file: size for file, size in sizes.items() if file not in work.done}
    work.team.first(lambda: require_space(work.directory, sum(left.values())))
    mine = work.team.share(left)
    done = sum(sizes.values()) - sum(left.values()) if work.team.count == 1 else 0
    total = done + sum(left[file] for file in mine)
    with work.team.together(), waiting.progress(progress) as report:
        for file in mine:
            infos = tensors.files[file]

            def read_one(theirs: str, infos: Mapping[str, TensorInfo] = infos) -> np.ndarray:
                nonlocal done
                done += infos[theirs].nbytes
                report(what, done, total)
                return tensors.read(theirs, infos[theirs])

            path = work.directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, infos, read_one, metadata={"format": "pt"})
            written(file)
            work.add(file)


def write_index(
    metadata: Mapping[str, Any],
    files: Mapping[str, Mapping[str, TensorInfo]],
    directory: Path,
    *,
    same: bool,
) -> None:
    """Write the index; `same` says that sizes have not changed since `metadata` was written."""
    total = sum(info.nbytes for infos in files.values() for info in infos.values())
    weight_map = {theirs: file for file, infos in files.items() for theirs in infos}
    disk.write_json(
        directory / safetensors_directory.INDEX,
        {
            "metadata": {**metadata} if same else {**metadata, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def write_config(source: Path, directory: Path, weights: native.Weights) -> None:
    """Copy a directory's configuration, without its quantisation if weights become dense."""
    file = source / safetensors_directory.CONFIG
    if weights == "keep":
        shutil.copyfile(file, directory / safetensors_directory.CONFIG)
        return
    config = disk.read_json(file)
    config = {key: value for key, value in config.items() if key not in _QUANTISATION_KEYS}
    config |= {key: weights for key in ("dtype", "torch_dtype") if key in config}
    disk.write_json(directory / safetensors_directory.CONFIG, config)
