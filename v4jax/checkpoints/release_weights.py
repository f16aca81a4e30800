"""Load weights from a Hugging Face checkpoint, reading only what each device holds.

Axis letters: N rows, K columns of a stored matrix.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from v4jax.checkpoints import (
    assembly,
    config_file,
    release,
    safetensors_directory,
    tensor_names,
    unfinished,
)
from v4jax.checkpoints.assembly import Source
from v4jax.checkpoints.byte_files import Box
from v4jax.checkpoints.formats import BlockFormat, Format, Stored
from v4jax.checkpoints.release import Release
from v4jax.checkpoints.safetensors_directory import TensorFiles
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec, map_leaves
from v4jax.model.transformer import Model
from v4jax.waiting import Progress


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
    sources = functools.partial(_sources, tensors, cfg, formats)
    return assembly.fill(declared, structs, mesh, sources, progress), cfg


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


def _sources(
    tensors: Release, cfg: ModelConfig, formats: dict[str, Format], leaf: str, struct: Any
) -> Any:
    """Where a leaf's arrays come from; see `assembly.fill`."""
    names, stored = tensor_names.release_names(leaf, cfg), formats[leaf]
    name_of = functools.partial(_name_at, names)
    if stored is None or isinstance(struct, jax.ShapeDtypeStruct):
        read = lambda position, box: _dense_box(
            tensors, name_of(position), stored, struct.dtype, box
        )
        return Source(read, () if stored is None else (1, stored.values_unit))

    def codes(position: tuple[int, ...], box: Box) -> np.ndarray:
        values = tensors[name_of(position)].read_box(box[::-1])
        return stored.codes_to_kernels(values.view(stored.codes_dtype))

    def scale(position: tuple[int, ...], box: Box) -> np.ndarray:
        return tensors[tensor_names.scale_name(name_of(position))].read_box(box[::-1]).T

    return dataclasses.replace(
        struct, codes=Source(codes, (stored.unit,), rows=1), scale=Source(scale, rows=1)
    )


def _name_at(names: Any, position: tuple[int, ...]) -> str:
    for index in position:
        names = names[index]
    return names


def _dense_box(tensors: Release, name: str, stored: Format, dtype: Any, box: Box) -> np.ndarray:
    """A box of a tensor in `dtype`, dequantised if needed."""
    if stored is None:
        return tensors[name].read_box(box).astype(dtype, copy=False)
    codes = tensors[name].read_box(stored.codes_box(box)).view(stored.codes_dtype)
    scale = tensors[tensor_names.scale_name(name)].read_box(stored.scales_box(box))
    return stored.decode_box(box, codes, scale, dtype)


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
