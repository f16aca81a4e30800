"""`v4jax export`: a native checkpoint to the files that it was made of."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from v4jax import checkpoint_files, hf_names, native, unfinished, zarr_arrays
from v4jax.native import Native
from v4jax.safetensors_file import (
    DTYPES,
    TensorInfo,
    open_safetensors,
    require_space,
    write_safetensors,
)

Progress = Callable[[str, int, int], None]
_NAMED = {"bfloat16": "BF16", "float32": "F32"}
_QUANTISATION_KEYS = ("quantization_config", "expert_dtype")


def export(source: str | Path, target: str | Path, *, progress: Progress | None = None) -> None:
    """Make a Hugging Face checkpoint; it appears under its name when it is complete.

    Names, shapes and files are those of the source that was converted; with weights 'keep', so are
    dtypes and every byte of the tensors. Otherwise tensors are dense, without scales, and the
    configuration names no quantisation; DSpark's tensors stay as they were. An interrupted run
    leaves `target` + '.unfinished', and the same call goes on there, file by file.

    Args:
      source: a native checkpoint.
      target: a directory to be made.
      progress: told what is being done, bytes done, and bytes in all.

    Raises:
      CheckpointError: the source is not a native checkpoint or is damaged; the target exists; the
        disk is too full.
    """
    target = Path(os.path.abspath(target))
    unfinished.refuse_existing(target)
    opened = Native(Path(source))
    identity = hashlib.sha256((opened.path / native.MANIFEST).read_bytes()).hexdigest()
    tensors = _Tensors(opened)
    with unfinished.begin(target, "export", identity) as work:
        _write_shards(tensors, work, progress)
        _write_index(opened, tensors.files, work.directory)
        for file in opened.path.iterdir():
            if file.is_file() and file.name not in (native.MANIFEST, checkpoint_files.CONFIG):
                shutil.copyfile(file, work.directory / file.name)
        _write_config(opened, work.directory)
        work.finish()


class _Tensors:
    """A native checkpoint as the tensors of its source, by their names there.

    Attributes:
      files: each file's tensors in order.
    """

    def __init__(self, opened: Native) -> None:
        self._native = opened
        self._slots = native.slots(opened.config)
        quantised = [n for n, slot in self._slots.items() if not self._is_dense(slot)]
        self._scales = {hf_names.scale_name(name): self._slots[name] for name in quantised}
        self._extras = {}
        for file in sorted((opened.path / native.EXTRAS).rglob("*.safetensors")):
            extras = open_safetensors(file)
            self._extras |= dict.fromkeys(extras.names, extras)
        sources = opened.manifest.sources
        translate = hf_names.to_release(sources)
        self._ours = {theirs: translate(theirs) for theirs in sources}
        self.files: dict[str, dict[str, TensorInfo]] = {}
        for theirs, info in sources.items():
            declared = self._declared(theirs, info)
            if declared is not None:
                self.files.setdefault(str(info.file), {})[theirs] = declared

    def _is_dense(self, slot: native.Slot) -> bool:
        return self._native.manifest.leaves[slot.leaf] == "dense"

    def _declared(self, theirs: str, source: TensorInfo) -> TensorInfo | None:
        """How a tensor is exported; None: it is not, being the scales of what is now dense."""
        name, weights = self._ours[theirs], self._native.manifest.weights
        if weights == "keep" or name in self._extras:
            return TensorInfo(source.dtype, source.shape)
        if hf_names.FUSED.match(name):
            return TensorInfo(_NAMED[weights], source.shape)
        if name not in self._slots:
            return None
        spec = self._slots[name].spec
        if spec.stored == "i64":
            return TensorInfo(source.dtype, source.shape)
        dtype = "F32" if spec.stored == "f32" else _NAMED[weights]
        return TensorInfo(dtype, spec.shape[spec.stack_dims :])

    def read(self, theirs: str, declared: TensorInfo) -> np.ndarray:
        """A tensor's values, as declared."""
        name, dtype = self._ours[theirs], DTYPES[declared.dtype]
        if name in self._extras:
            return self._extras[name].read(name)
        if name in self._scales:
            leaf, index, _ = self._scales[name]
            return self._native.arrays.read(f"{leaf}.scale", index).T
        if fused := hf_names.FUSED.match(name):
            return self._fused(fused, declared)
        slot = self._slots[name]
        if self._is_dense(slot):
            return self._native.dense(slot.leaf, slot.at).astype(dtype, copy=False)
        return self._native.stored(slot.leaf, slot.at)[0].view(dtype)

    def _fused(self, fused: Any, declared: TensorInfo) -> np.ndarray:
        out = np.empty(declared.shape, DTYPES[declared.dtype])
        matrices = ("w1", "w3") if fused[2] == "gate_up_proj" else ("w2",)
        height = declared.shape[1] // len(matrices)
        for e in range(declared.shape[0]):
            for i, matrix in enumerate(matrices):
                slot = self._slots[f"{fused[1]}{e}.{matrix}.weight"]
                out[e, i * height : (i + 1) * height] = self._native.dense(slot.leaf, slot.at)
        return out


def _write_shards(tensors: _Tensors, work: unfinished.Work, progress: Progress | None) -> None:
    sizes = {f: sum(i.nbytes for i in infos.values()) for f, infos in tensors.files.items()}
    total = sum(sizes.values())
    done = sum(size for file, size in sizes.items() if file in work.done)
    require_space(work.directory, total - done)

    def read(theirs: str) -> np.ndarray:
        nonlocal done
        info = infos[theirs]
        done += info.nbytes
        if progress is not None:
            progress("exporting", done, total)
        return tensors.read(theirs, info)

    for file, infos in tensors.files.items():
        if file not in work.done:
            path = work.directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, infos, read, metadata={"format": "pt"})
            work.add(file)


def _write_index(opened: Native, files: dict[str, dict[str, TensorInfo]], directory: Path) -> None:
    metadata = opened.manifest.index
    if metadata is None:
        return
    if opened.manifest.weights != "keep":
        total = sum(info.nbytes for infos in files.values() for info in infos.values())
        metadata = metadata | {"total_size": total}
    weight_map = {theirs: file for file, infos in files.items() for theirs in infos}
    zarr_arrays.write_json(
        directory / checkpoint_files.INDEX,
        {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_config(opened: Native, directory: Path) -> None:
    source = opened.path / checkpoint_files.CONFIG
    weights = opened.manifest.weights
    if weights == "keep":
        shutil.copyfile(source, directory / checkpoint_files.CONFIG)
        return
    config = checkpoint_files.read_json(source)
    config = {key: value for key, value in config.items() if key not in _QUANTISATION_KEYS}
    config |= {key: weights for key in ("dtype", "torch_dtype") if key in config}
    zarr_arrays.write_json(directory / checkpoint_files.CONFIG, config)
