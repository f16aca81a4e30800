"""Native checkpoints: the model's own arrays, stacked as in the model, in Orbax's layout.

```
config.json, tokenizer.json, ...   copied from the source: all but weights and hidden files
v4jax.json                         `Manifest`
weights/                           an Orbax checkpoint: an array for each leaf, or {leaf}.codes and
                                   {leaf}.scale if it is quantised
extras/                            tensors that the model does not run, as safetensors; and the
                                   source's index, if weights were kept as they were
```

Axis letters: N rows, K columns of a stored matrix.
"""

import dataclasses
import functools
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from v4jax.checkpoints import (
    assembly,
    config_file,
    disk,
    release,
    safetensors_directory,
    tensor_values,
    unfinished,
    zarr_files,
)
from v4jax.checkpoints.assembly import Source
from v4jax.checkpoints.byte_files import Box
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.formats import BY_NAME, BlockFormat, Format, Stored, name_of
from v4jax.checkpoints.remote import Folder
from v4jax.checkpoints.safetensors_file import TensorInfo
from v4jax.checkpoints.zarr_files import DAMAGED, Array
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec, map_leaves
from v4jax.model.transformer import Model
from v4jax.waiting import Progress

Weights = Literal["keep", "bfloat16", "float32"]
MANIFEST, WEIGHTS, EXTRAS = "v4jax.json", "weights", "extras"
VERSION = 1
OWN = (MANIFEST, WEIGHTS, EXTRAS)  # names that are not copied from the source


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of v4jax.json.

    Attributes:
      weights: the `weights` argument of the conversion.
      leaves: how each leaf is stored.
      sources: tensors of the source's files, in their order and under their names.
      index: metadata of the source's index; None if it had a single file without one.
    """

    weights: Weights
    leaves: dict[str, Format]
    sources: dict[str, TensorInfo]
    index: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "weights": self.weights,
            "leaves": {leaf: name_of(stored) for leaf, stored in self.leaves.items()},
            "index": self.index,
            "sources": {
                name: [info.dtype, list(info.shape), str(info.file)]
                for name, info in self.sources.items()
            },
        }


def is_native(path: Path) -> bool:
    """Whether a path is a finished native checkpoint."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read a native checkpoint's manifest; a CheckpointError says why there is none."""
    unfinished.refuse_unfinished(path)
    if not is_native(path):
        raise CheckpointError(
            f"{path}: is not a native checkpoint: it has no {MANIFEST}. Create one with "
            "'v4jax convert'."
        )
    file = path / MANIFEST
    raw = disk.read_json(file)
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: has format version {raw.get('version')!r}; this v4jax reads {VERSION}. "
            "Use the v4jax that wrote it, or convert the checkpoint again."
        )
    try:
        sources = {
            name: TensorInfo(dtype, tuple(shape), Path(_inside(file_name)))
            for name, (dtype, shape, file_name) in raw["sources"].items()
        }
        leaves = {leaf: BY_NAME[name] for leaf, name in raw["leaves"].items()}
        return Manifest(raw["weights"], leaves, sources, raw["index"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged ({error!r:.100}). {DAMAGED}") from error


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file {name!r} is outside the directory")
    return name


def read_config(path: Path, manifest: Manifest) -> ModelConfig:
    """The configuration of the weights that the checkpoint holds."""
    cfg = config_file.read(path / safetensors_directory.CONFIG)
    cfg = release.fit_config(manifest.leaves, cfg)
    if manifest.leaves.keys() != {leaf for leaf, _ in params.leaves(Model(cfg))}:
        raise CheckpointError(f"{path}: {MANIFEST} and config.json do not agree. {DAMAGED}")
    return cfg


def array_names(leaf: str, stored: Format) -> list[str]:
    """The arrays that hold a leaf."""
    return [leaf] if stored is None else [f"{leaf}.codes", f"{leaf}.scale"]


class Native:
    """A native checkpoint, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.config = read_config(path, self.manifest)
        self._folder = Folder(path)
        self._arrays: dict[str, Array] = {}

    def array(self, name: str) -> Array:
        """An array, which is a dense leaf or a part of another."""
        if name not in self._arrays:
            self._arrays[name] = zarr_files.open_array(self._folder, f"{WEIGHTS}/{name}")
        return self._arrays[name]

    def read(self, array: str, position: tuple[int, ...], box: Box | None = None) -> np.ndarray:
        """One matrix or vector of an array's stack, or a box of it; checks its values."""
        opened = self.array(array)
        if box is None:
            box = tuple(slice(0, size) for size in opened.shape[len(position) :])
        box = (*(slice(i, i + 1) for i in position), *box)
        values, start = opened.read(box), [part.start for part in box]
        where, leaf = str(self._folder.path / WEIGHTS / array), array.removesuffix(".scale")
        if leaf != array and self.manifest.leaves.get(leaf) is not None:
            tensor_values.check_scales(where, values, start=start)
        elif values.dtype.kind == "i":
            tensor_values.check_ids(where, values, self.config.n_routed_experts, start=start)
        else:
            tensor_values.check(where, values, start=start)
        return values.reshape(values.shape[len(position) :])

    def stored(self, leaf: str, position: tuple[int, ...]) -> Stored:
        """Codes [N, K] and scales of one quantised matrix, in a file's layout."""
        stored = self._quantised(leaf)
        codes, scale = (self.read(name, position) for name in array_names(leaf, stored))
        return stored.from_kernels(codes, scale)

    def values(self, leaf: str, position: tuple[int, ...], box: Box, dtype: Any) -> np.ndarray:
        """A box of one quantised matrix [N, K], decoded."""
        stored = self._quantised(leaf)
        boxes = stored.codes_box(box), stored.scales_box(box)
        codes, scale = (
            self.read(name, position, part[::-1])
            for name, part in zip(array_names(leaf, stored), boxes, strict=True)
        )
        return stored.decode_box(box, *stored.from_kernels(codes, scale), dtype)

    def _quantised(self, leaf: str) -> BlockFormat:
        stored = self.manifest.leaves[leaf]
        assert stored is not None
        return stored


def load(
    path: Path,
    *,
    dtype: Any,
    keep_quantised: bool,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[Model, ModelConfig]:
    """Load the model's weights in `dtype`; each host reads only what its devices hold.

    Args:
      path: a native checkpoint.
      dtype: dtype of everything that need not be float32 or integer.
      keep_quantised: keep the checkpoint's FP8 and FP4 weights quantised.
      mesh: mesh to put the weights on; by default they go to the first device.
      progress: called with the current activity, leaves done and total leaves.

    Raises:
      CheckpointError: it is not a native checkpoint, is unfinished, or is damaged.
    """
    native = Native(path)
    declared = Model(native.config)
    structs = map_leaves(
        lambda name, spec: _struct(native, name, spec, dtype, keep_quantised), declared
    )
    sources = functools.partial(_sources, native)
    return assembly.fill(declared, structs, mesh, sources, progress), native.config


def _struct(native: Native, name: str, spec: ParamSpec, dtype: Any, keep_quantised: bool) -> Any:
    """The leaf as it will be in memory; raises unless the arrays on disk fit it."""
    stored = native.manifest.leaves[name]
    on_disk = params.leaf_struct(spec, dtype, stored and stored.name)
    if stored is not None:
        dtype_on_disk = native.array(f"{name}.scale").dtype
        scale = jax.ShapeDtypeStruct(on_disk.scale.shape, dtype_on_disk)
        on_disk = dataclasses.replace(on_disk, scale=scale)
    for array, struct in zip(array_names(name, stored), jax.tree.leaves(on_disk), strict=True):
        shape = native.array(array).shape
        if shape != struct.shape:
            raise CheckpointError(
                f"{native.path / WEIGHTS / array}: has shape {list(shape)}; the configuration "
                f"needs {list(struct.shape)}. {DAMAGED}"
            )
    return on_disk if keep_quantised else params.leaf_struct(spec, dtype)


def _sources(native: Native, leaf: str, struct: Any) -> Any:
    """Where a leaf's arrays come from; see `assembly.fill`."""
    stored = native.manifest.leaves[leaf]

    def source(array: str, dtype: Any, units: tuple[int, ...] = ()) -> Source:
        read = lambda position, box: native.read(array, position, box).astype(dtype, copy=False)
        return Source(read, units)

    if stored is None:
        return source(leaf, struct.dtype)
    if isinstance(struct, jax.ShapeDtypeStruct):
        decoded = lambda position, box: native.values(leaf, position, box, struct.dtype)
        return Source(decoded, (1, stored.values_unit), rows=1)
    parts = zip(("codes", "scale"), array_names(leaf, stored), strict=True)
    return dataclasses.replace(
        struct, **{part: source(array, getattr(struct, part).dtype) for part, array in parts}
    )
