"""`v4jax merge`: a release with a training run's update merged in, as a new release.

Names and files are those of the source. Tensors are processed one at a time, in the order of the
files, and an interrupted run resumes file by file.
"""

import hashlib
import json
import os
import re
from pathlib import Path, PurePath
from typing import Literal, get_args

import numpy as np

from v4jax import arguments
from v4jax.adapters import requantise, updates
from v4jax.adapters.requantise import Ledger, Retention
from v4jax.adapters.updates import Update
from v4jax.checkpoints import (
    disk,
    export,
    hub,
    native,
    passengers,
    release,
    release_weights,
    remote,
    safetensors_directory,
    tensor_names,
    unfinished,
)
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.formats import Format
from v4jax.checkpoints.release import Release
from v4jax.checkpoints.safetensors_directory import Checkpoint
from v4jax.checkpoints.safetensors_file import DTYPES
from v4jax.model.config import ModelConfig
from v4jax.waiting import Progress

Weights = Literal["bfloat16", "keep"]
_NUMBERS = re.compile(r"^layers\.\d+\.|(?<=^mtp\.)\d+\.|(?<=experts\.)\d+\.|\.weight$")


@arguments.checked(**arguments.FILES, update=arguments.PATH, best=arguments.FLAG)
def merge(
    source: str | Path,
    update: str | Path,
    target: str | Path,
    *,
    weights: Weights,
    best: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> list[Retention]:
    """Write a release with the update merged into its weights.

    It appears under its name once it is complete. With 'keep', unchanged tensors keep the source's
    bytes. Tensors that the model does not use, such as DSpark's, are copied.

    Args:
      source: a Hugging Face directory, 'tiny', or an id on the Hub.
      update: the directory of a run or of a PEFT adapter, or an adapter's id on the Hub.
      target: directory to create.
      weights: 'keep' stores each changed tensor in its original format; 'bfloat16' makes all of
        them dense, except for float32 ones.
      best: use a run's best state instead of its newest.
      revision: branch, tag or commit of a source on the Hub; the main branch by default.
      progress: called with the current activity, bytes done and total bytes; by default they are
        shown on a terminal and in a notebook.

    Returns:
      How much of the update survives rounding, for each kind of weight.

    Raises:
      CheckpointError: a directory is of the wrong kind or damaged; the target exists or is inside
        one of the others; the disk is too full; what an interrupted merge left is from other files.
    """
    if not arguments.one_of(weights, get_args(Weights)):
        raise ValueError(
            f"weights is {arguments.shown(weights)}; it must be one of {get_args(Weights)}."
        )
    target = Path(os.path.abspath(os.path.expanduser(target)))
    unfinished.check_target(target)
    update = updates.resolve(update)
    remote.refuse(source, "a release to merge with")
    source = hub.resolve(
        source, revision=revision, allow_patterns=["*"], ignore_patterns=passengers.FOREIGN
    )
    unfinished.check_target(target, source, update)
    if native.is_native(source):
        raise CheckpointError(
            f"{source}: is a native checkpoint; merging needs a release, which 'v4jax export "
            f"{source} HF_DIR' makes of it."
        )
    opened = release_weights.open_release(source)
    files = Checkpoint.open(source)
    change = updates.read(update, opened[1], best=best)
    identity = _identity(files, weights, updates.identity(update, best=best))
    merged = _Merged(files, opened, change, weights)
    others = passengers.find(source)
    passengers.check(source, others, opened[1].vocab_size)
    with unfinished.begin(target, "merge", identity) as work:
        return _write(merged, others, work, unfinished.scratch(target) / "kept", progress)


def _identity(files: Checkpoint, weights: Weights, update: str) -> str:
    """A digest of everything the result depends on, judged by headers, sizes and times."""
    infos = [(name, files.info(name).dtype, files.info(name).shape) for name in files.names]
    inputs = [weights, update, files.config, files.version, infos]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _write(
    merged: "_Merged",
    others: list[PurePath],
    work: unfinished.Work,
    ledgers: Path,
    progress: Progress | None,
) -> list[Retention]:
    source, weights = merged.path, merged.weights
    ledgers.mkdir(exist_ok=True)
    place = {file: ledgers / f"{i}.json" for i, file in enumerate(merged.files)}

    def written(file: str) -> None:
        disk.write_json(place[file], {"sums": merged.ledger.to_json()})
        merged.ledger = Ledger()

    export.write_shards(merged, work, progress, what="merging", written=written)
    if not merged.is_single and weights == "keep":
        others = [*others, PurePath(safetensors_directory.INDEX)]
    elif not merged.is_single:
        metadata = disk.read_json(source / safetensors_directory.INDEX).get("metadata", {})
        export.write_index(metadata, merged.files, work.directory, same=False)
    passengers.copy(source, others, work.directory)
    export.write_config(source, work.directory, weights)
    total = Ledger()
    for file in place.values():
        total.add_json(disk.read_json(file)["sums"])
    work.finish()
    return total.report()


class _Merged(export.Tensors):
    """The merged tensors.

    Attributes:
      path: path of the source.
      weights: formats in which to store the tensors.
      is_single: whether there is one file without an index.
      ledger: sums over the tensors read so far.
    """

    def __init__(
        self,
        files: Checkpoint,
        opened: tuple[Release, ModelConfig, dict[str, Format]],
        update: Update,
        weights: Weights,
    ) -> None:
        self._tensors, cfg, formats = opened
        extras = set(release.extras(self._tensors, cfg))
        super().__init__(files.declarations(), cfg, formats, weights, extras)
        self.path, self.ledger = Path(files.path), Ledger()
        self.weights: Weights = weights
        self._update = update
        self._scales: dict[str, np.ndarray] = {}
        self.is_single = list(self.files) == [safetensors_directory.SINGLE]

    def read_one(self, name: str, dtype: str) -> np.ndarray:
        if name in self.matrices:
            return self._scale(self.matrices[name])
        if name in self.slots and self.slots[name].spec.stored != "i64":
            return self._weight(name, dtype)
        return self._tensors[name].read()

    def _weight(self, name: str, dtype: str) -> np.ndarray:
        stored = self.formats[self.slots[name].leaf]
        base, new = self._values(name)
        if new is None:
            if self.weights == "keep":
                return self._tensors[name].read()
            return release_weights.dense(self._tensors, name, stored, DTYPES[dtype])
        if self.weights == "keep" and stored is not None:
            scale = self._new_scale(name, new)
            codes = stored.codes(new, scale)
            self._account(name, stored.name.upper(), new, stored.decode(codes, scale), base)
            return codes.view(DTYPES[dtype])
        out = new.astype(DTYPES[dtype])
        self._account(name, dtype, new, out.astype(np.float32), base)
        return out

    def _values(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A weight before and after the update, float32; the second is None if unchanged."""
        leaf, at, _ = self.slots[name]
        if not updates.touches(self._update, leaf):
            return np.empty(0, np.float32), None
        base = release_weights.dense(self._tensors, name, self.formats[leaf], np.float32)
        return base, updates.changed(self._update, leaf, at, base)

    def _scale(self, name: str) -> np.ndarray:
        """The scales of a matrix."""
        if name not in self._scales:
            _, new = self._values(name)
            if new is None:
                return self._tensors[tensor_names.scale_name(name)].read()
            return self._new_scale(name, new)
        return self._scales.pop(name)

    def _new_scale(self, name: str, new: np.ndarray) -> np.ndarray:
        """The scales of a changed matrix, cached between reading its values and its scales."""
        if name in self._scales:
            return self._scales.pop(name)
        stored = self.formats[self.slots[name].leaf]
        assert stored is not None
        old = self._tensors[tensor_names.scale_name(name)].read()
        self._scales[name] = requantise.scales(new, old, stored)
        return self._scales[name]

    def _account(
        self, name: str, stored: str, new: np.ndarray, rounded: np.ndarray, base: np.ndarray
    ) -> None:
        self.ledger.add(_NUMBERS.sub("", name), stored, new - base, rounded - base)
