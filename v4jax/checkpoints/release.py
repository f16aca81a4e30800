"""A checkpoint in any spelling as the release's tensors, and checks of what it must contain.

Axis letters: E experts, F expert hidden, N rows, K columns.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from v4jax.checkpoints import tensor_names, tensor_values
from v4jax.checkpoints.byte_files import Box
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.formats import ALLOWED, Format, name_of
from v4jax.checkpoints.safetensors_directory import TensorFiles
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model

_DENSE = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
_SCALES = ("F8_E8M0", "F32")
_INTEGERS = ("I64", "I32")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A release tensor: its file, dtype and shape, and how to read it, some rows, or a box."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    read: Callable[..., np.ndarray]
    read_box: Callable[[Box], np.ndarray]


class Release:
    """Tensors of a checkpoint by release name; values are checked as they are read."""

    def __init__(self, files: TensorFiles, cfg: ModelConfig) -> None:
        self._experts = cfg.n_routed_experts
        self._sound: set[str] = set()
        translate = tensor_names.to_release(files.names)
        self.tensors: dict[str, Tensor] = {}
        for theirs in files.names:
            for tensor in _views(files, theirs, translate(theirs)):
                if tensor.name in self.tensors:
                    raise CheckpointError(
                        f"{tensor.file}: tensor '{theirs}' and another one both hold "
                        f"'{tensor.name}'; remove one of them."
                    )
                self.tensors[tensor.name] = self._checked(tensor)

    def _checked(self, tensor: Tensor) -> Tensor:
        """The tensor, whose bad values are rejected when read, until all have been read once."""

        def read(rows: slice | None = None) -> np.ndarray:
            values = tensor.read(rows)
            if tensor.name not in self._sound:
                self._check(tensor, values, ((rows and rows.start) or 0,))
                if rows is None:
                    self._sound.add(tensor.name)
            return values

        def read_box(box: Box) -> np.ndarray:
            values = tensor.read_box(box)
            if tensor.name not in self._sound:
                self._check(tensor, values, [part.start for part in box])
            return values

        return dataclasses.replace(tensor, read=read, read_box=read_box)

    def _check(self, tensor: Tensor, values: np.ndarray, start: Sequence[int]) -> None:
        where = f"{tensor.file}: '{tensor.name}'"
        if tensor_names.are_ids(tensor.name):
            tensor_values.check_ids(where, values, self._experts, start=start)
        elif tensor_names.are_scales(tensor.name):
            tensor_values.check_scales(where, values, start=start)
        else:
            tensor_values.check(where, values, start=start)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def _views(files: TensorFiles, theirs: str, name: str) -> Iterator[Tensor]:
    """The release tensors inside one stored tensor: itself, or the matrices of fused experts."""
    info = files.info(theirs)
    if not tensor_names.is_fused(name):
        read_all = lambda rows=None: files.read(theirs, rows)
        read_box = lambda box: files.read_box(theirs, box)
        yield Tensor(name, info.dtype, tuple(info.shape), str(info.file), read_all, read_box)
        return
    if len(info.shape) != 3:
        raise CheckpointError(
            f"{info.file}: '{theirs}' has shape {list(info.shape)}; fused experts need 3 dims."
        )
    for matrix, e, part in tensor_names.of_fused(name, info.shape):

        def read(rows: slice | None = None, e: int = e, part: slice = part) -> np.ndarray:
            return files.read(theirs, slice(e, e + 1))[0, part][rows or slice(None)]

        def read_part(box: Box, e: int = e, first: int = part.start) -> np.ndarray:
            rows = slice(first + box[0].start, first + box[0].stop)
            return files.read_box(theirs, (slice(e, e + 1), rows, box[1]))[0]

        shape = (part.stop - part.start, info.shape[2])
        yield Tensor(matrix, info.dtype, shape, str(info.file), read, read_part)


def fit_config(names: Iterable[str], cfg: ModelConfig) -> ModelConfig:
    """The configuration, without MTP layers if no tensor or leaf belongs to one.

    transformers keeps `num_nextn_predict_layers` but drops the MTP tensors.
    """
    if any(name.startswith("mtp.") for name in names):
        return cfg
    return dataclasses.replace(cfg, num_nextn_predict_layers=0)


def extras(release: Release, cfg: ModelConfig) -> list[str]:
    """Tensors that the model does not use but conversion keeps: DSpark's."""
    if cfg.dspark is None:
        return []
    return sorted(name for name in release.tensors if name.startswith("mtp."))


def check(release: Release, cfg: ModelConfig) -> dict[str, Format]:
    """Check every tensor's presence, dtype and shape; return how each leaf is stored.

    Only declarations are checked; no values are read.

    Raises:
      CheckpointError: the message says which file and tensor, and what to do.
    """
    formats: dict[str, Format] = {}
    known = set(extras(release, cfg))
    for leaf, spec in params.leaves(Model(cfg)):
        names = list(tensor_names.flatten(tensor_names.release_names(leaf, cfg)))
        if missing := [name for name in names if name not in release]:
            raise CheckpointError(_missing(missing, release))
        stored: set[Format] = {_check_one(release, name, spec) for name in names}
        _check_alike(release, names[0], map(name_of, stored))
        formats[leaf] = stored.pop()
        known.update(names)
        if formats[leaf] is not None:
            scales = [tensor_names.scale_name(name) for name in names]
            _check_alike(release, scales[0], (release[name].dtype for name in scales))
            known.update(scales)
    if unexpected := sorted(release.tensors.keys() - known):
        name = unexpected[0]
        raise CheckpointError(
            f"{release[name].file}: unexpected tensor '{name}' and {len(unexpected) - 1} more; "
            "config.json defines no such weight. Check that it belongs to these files."
        )
    return formats


def _check_alike(release: Release, name: str, formats: Iterable[str]) -> None:
    if len(different := sorted(set(formats))) > 1:
        raise CheckpointError(
            f"{release[name].file}: '{name}' and its counterparts are stored in different formats "
            f"({', '.join(different)}); convert them to the same one first."
        )


def _missing(missing: list[str], release: Release) -> str:
    near = difflib.get_close_matches(missing[0], release.tensors, n=1)
    hint = f"the nearest name is '{near[0]}'" if near else "there is no similar name"
    return (
        f"Tensor '{missing[0]}' is missing ({len(missing)} of its kind); {hint}. "
        "Check that config.json belongs to these files and that no shard is missing."
    )


def _check_one(release: Release, name: str, spec: ParamSpec) -> Format:
    tensor = release[name]
    shape = needed = spec.shape[spec.stack_dims :]
    stored = _format(tensor, spec)
    if stored is not None:
        needed = stored.codes_shape(shape, tensor.dtype)
    if tensor.shape != needed:
        raise CheckpointError(
            f"{tensor.file}: '{name}' has shape {list(tensor.shape)}; the configuration needs "
            f"{list(needed)}. Check that config.json belongs to these files."
        )
    if stored is not None:
        _check_scale(release, name, stored.scales_shape(shape), shape)
    return stored


def _format(tensor: Tensor, spec: ParamSpec) -> Format:
    dtype = tensor.dtype
    if spec.stored == "i64":
        if dtype in _INTEGERS:
            return None
        raise CheckpointError(_bad_dtype(tensor, _INTEGERS))
    if dtype in _DENSE:
        return None
    allowed = ALLOWED.get(spec.stored, ())
    for stored in allowed:
        if dtype in stored.dtypes:
            return stored
    names = (name for stored in allowed for name in stored.dtypes)
    raise CheckpointError(_bad_dtype(tensor, [*_DENSE, *names]))


def _bad_dtype(tensor: Tensor, allowed: Any) -> str:
    return (
        f"{tensor.file}: '{tensor.name}' has dtype {tensor.dtype}; expected one of "
        f"{', '.join(allowed)}. Convert the file, or get the original checkpoint."
    )


def _check_scale(
    release: Release, name: str, expected: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    scale = tensor_names.scale_name(name)
    if scale not in release:
        raise CheckpointError(
            f"{release[name].file}: '{name}' is quantised, but its scales '{scale}' are missing. "
            "Get the complete checkpoint."
        )
    tensor = release[scale]
    if tensor.dtype not in _SCALES:
        raise CheckpointError(_bad_dtype(tensor, _SCALES))
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: '{scale}' has shape {list(tensor.shape)}; a weight of "
            f"{list(shape)} needs scales {list(expected)}."
        )
