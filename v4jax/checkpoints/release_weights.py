"""Load weights from a Hugging Face checkpoint, reading only what each device holds.

Axis letters: N rows, K columns of a stored matrix.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from v4jax import waiting
from v4jax.checkpoints import config_file, release, safetensors_directory, tensor_names, unfinished
from v4jax.checkpoints.formats import BlockFormat, Format, Stored
from v4jax.checkpoints.release import Release
from v4jax.checkpoints.safetensors_directory import TensorFiles
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec, map_leaves
from v4jax.model.transformer import Model
from v4jax.waiting import Progress

# Reads a tensor, by release name, in the layout of the leaf's arrays.
_Read = Callable[[str], np.ndarray]


def open_release(path: Path) -> tuple[Release, ModelConfig, dict[str, Format]]:
    """Open and check a Hugging Face directory: tensors, configuration, and formats of leaves.

    Raises:
      CheckpointError: the directory is not a DeepSeek-V4 checkpoint, or is damaged.
    """
    unfinished.refuse_unfinished(path)
    return check(safetensors_directory.Checkpoint.open(path), path)


def check(files: TensorFiles, folder: Path) -> tuple[Release, ModelConfig, dict[str, Format]]:
    """`open_release` of open files; the configuration is in the folder."""
    cfg = config_file.read(folder / safetensors_directory.CONFIG)
    tensors = Release(files, cfg)
    cfg = release.fit_config(tensors.tensors, cfg)
    return tensors, cfg, release.check(tensors, cfg)


def load(
    path: Path,
    *,
    dtype: Any,
    keep_quantised: bool,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[Model, ModelConfig]:
    """Load the model's weights in `dtype`; `keep_quantised` leaves FP8 and FP4 quantised."""
    tensors, cfg, formats = open_release(path)
    declared = Model(cfg)
    held: dict[str, Format] = formats if keep_quantised else dict.fromkeys(formats)
    structs = map_leaves(
        lambda name, spec: leaf_struct(name, spec, held[name], tensors, cfg, dtype), declared
    )
    make = lambda name, struct, place: _make_leaf(name, struct, place, formats[name], tensors, cfg)
    return fill(declared, structs, mesh, make, progress), cfg


def fill(
    declared: Model,
    structs: Any,
    mesh: Mesh | None,
    make: Callable[[str, Any, Any], Any],
    progress: Progress | None,
) -> Model:
    """The model, whose leaves are `make(name, struct, placement)`.

    They are placed by `sharding.RULES`, or without a mesh on the first device.
    """
    if mesh is not None:
        places = sharding.shardings(declared, mesh, structs)
    else:
        first = SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: first, structs)
    total, done = sum(1 for _ in params.leaves(declared)), 0

    with waiting.progress(progress) as report:

        def one(name: str, _: ParamSpec, struct: Any, place: Any) -> Any:
            nonlocal done
            leaf = make(name, struct, place)
            done += 1
            report("loading", done, total)
            return leaf

        return map_leaves(one, declared, structs, places)


def leaf_struct(
    name: str, spec: ParamSpec, held: Format, tensors: Release, cfg: ModelConfig, dtype: Any
) -> Any:
    """The leaf as ShapeDtypeStructs, dense in `dtype` or quantised as `held` says."""
    if held is None:
        return params.leaf_struct(spec, dtype)
    struct = params.leaf_struct(spec, dtype, held.name)
    first = next(tensor_names.flatten(tensor_names.release_names(name, cfg)))
    if tensors[tensor_names.scale_name(first)].dtype == "F32":
        scale = jax.ShapeDtypeStruct(struct.scale.shape, jnp.float32)
        struct = dataclasses.replace(struct, scale=scale)
    return struct


def _make_leaf(
    name: str, struct: Any, place: Any, stored: Format, tensors: Release, cfg: ModelConfig
) -> Any:
    """One leaf on its devices; each device's slice is read when JAX requests it."""
    names = tensor_names.release_names(name, cfg)

    def make(part: Any, placement: Any, read: _Read) -> jax.Array:
        fill = lambda index: _gather(names, index, part, read)
        return jax.make_array_from_callback(part.shape, placement, fill)

    if stored is not None and not isinstance(struct, jax.ShapeDtypeStruct):
        return dataclasses.replace(
            struct,
            codes=make(struct.codes, place.codes, lambda name: quantized(tensors, name, stored)[0]),
            scale=make(struct.scale, place.scale, lambda name: quantized(tensors, name, stored)[1]),
        )
    return make(struct, place, lambda name: dense(tensors, name, stored, struct.dtype))


def _gather(names: Any, index: tuple[slice, ...], struct: Any, read: _Read) -> np.ndarray:
    """The slice `index` of an array stacked from many tensors."""
    lengths = [
        len(range(*part.indices(size))) for part, size in zip(index, struct.shape, strict=True)
    ]
    out = np.empty(lengths, struct.dtype)

    def fill(names: Any, index: tuple[slice, ...], into: np.ndarray) -> None:
        if isinstance(names, str):
            into[...] = read(names)[index]
            return
        for i, name in enumerate(names[index[0]]):
            fill(name, index[1:], into[i : i + 1].reshape(into.shape[1:]))

    fill(names, index, out)
    return out


def quantized(tensors: Release, name: str, stored: BlockFormat) -> Stored:
    """A matrix's codes and scales in the kernels' layout."""
    return stored.to_kernels(*_stored(tensors, name, stored))


def dense(tensors: Release, name: str, stored: Format, dtype: Any) -> np.ndarray:
    """A tensor in `dtype`, dequantised if needed."""
    if stored is None:
        return tensors[name].read().astype(dtype)
    return stored.decode(*_stored(tensors, name, stored)).astype(dtype)


def _stored(tensors: Release, name: str, stored: BlockFormat) -> Stored:
    scale = tensors[tensor_names.scale_name(name)].read()
    return tensors[name].read().view(stored.codes_dtype), scale
