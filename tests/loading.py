"""One process of `test_loading_processes`: converts, loads, and counts what it reads.

python -m tests.loading COORDINATOR PROCESSES PROCESS CASES, which is a JSON file.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.checkpoints import convert, native, release_weights, tensor_names, zarr_arrays
from v4jax.checkpoints.formats import BlockFormat, Format
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.checkpoints.safetensors_file import DTYPES
from v4jax.model import params, sharding

CHUNK_BYTES = 2**15  # several chunks a matrix


def bytes_read() -> int:
    """Bytes that this process has read from files, by the kernel's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@dataclasses.dataclass(frozen=True)
class Files:
    """How a checkpoint stores each leaf, and the bytes of an element if it is dense."""

    formats: dict[str, Format]
    itemsizes: dict[str, int]


def files(directory: Path) -> Files:
    """The files of a checkpoint of either kind."""
    if native.is_native(directory):
        opened = native.Native(directory)
        formats = opened.manifest.leaves
        dense = [leaf for leaf, stored in formats.items() if stored is None]
        return Files(formats, {leaf: opened.array(leaf).dtype.itemsize for leaf in dense})
    tensors, cfg, formats = release_weights.open_release(directory)
    names = {leaf: tensor_names.flatten(tensor_names.release_names(leaf, cfg)) for leaf in formats}
    dtypes = {leaf: DTYPES[tensors[next(name)].dtype] for leaf, name in names.items()}
    return Files(formats, {leaf: dtype.itemsize for leaf, dtype in dtypes.items()})


class Values:
    """A release's values, by the functions that read entire tensors."""

    def __init__(self, directory: Path) -> None:
        self.tensors, self.cfg, self.formats = release_weights.open_release(directory)

    @functools.lru_cache  # noqa: B019
    def array(self, leaf: str, part: str | None, dtype: np.dtype) -> np.ndarray:
        """A leaf, or its codes or scales."""
        stored = self.formats[leaf]

        def matrix(name: str) -> np.ndarray:
            if part is None:
                return release_weights.dense(self.tensors, name, stored, dtype)
            assert stored is not None
            pair = release_weights.quantized(self.tensors, name, stored)
            return pair[("codes", "scale").index(part)]

        names = tensor_names.flatten(tensor_names.release_names(leaf, self.cfg))
        return np.stack([matrix(name) for name in names])


def parts(leaf: Any) -> Iterator[tuple[str | None, jax.Array]]:
    """A leaf's arrays: itself, or its codes and scales."""
    if isinstance(leaf, jax.Array):
        yield None, leaf
    else:
        yield from (("codes", leaf.codes), ("scale", leaf.scale))


def stored_bytes(mask: np.ndarray, stored: Format, itemsize: int) -> int:
    """The bytes in files of these elements of a dense leaf: itself, or codes and scales."""
    if stored is None:
        return int(mask.sum()) * itemsize
    return int(mask.sum()) // stored.packed + int(_blocks(mask, stored).sum())


def _blocks(mask: np.ndarray, stored: BlockFormat) -> np.ndarray:
    for dim, size in zip((-2, -1), stored.block, strict=True):
        firsts = np.arange(0, mask.shape[dim], size)
        mask = np.maximum.reduceat(mask, firsts, axis=dim)
    return mask


def check(directory: Path, values: Values, mesh: Any, keep: bool, dtype: str) -> float:
    """Load; compare all values; return the bytes read over those of what is held."""
    start = bytes_read()
    stored = files(directory)
    headers, before = bytes_read() - start, bytes_read()
    model, _ = open_checkpoint(directory).load(
        jnp.dtype(dtype), keep_quantised=keep, mesh=mesh, progress=None
    )
    count, needed = bytes_read() - before - headers, 0
    for leaf, value in params.leaves(model):
        for part, array in parts(value):
            expected = values.array(leaf, part, array.dtype).reshape(array.shape)
            mask = np.zeros(array.shape, bool)
            for shard in array.addressable_shards:
                mask[shard.index] = True
                theirs = expected[shard.index]
                assert shard.data.dtype == theirs.dtype, (leaf, part)
                assert np.asarray(shard.data).tobytes() == theirs.tobytes(), (leaf, part)
            if part is None:
                needed += stored_bytes(mask, stored.formats[leaf], stored.itemsizes.get(leaf, 0))
            else:
                needed += int(mask.sum()) * array.dtype.itemsize
    assert count <= 1.1 * needed, (str(directory), mesh, keep, count, needed)
    return count / needed


def convert_together(source: Path, target: Path, exported: Path) -> None:
    """Convert and export on all processes; the last one fails at first."""
    calls = 0

    def fail(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 30 and jax.process_index() == jax.process_count() - 1:
            raise OSError("the disk is gone")

    try:
        convert.convert(source, target, progress=fail)
    except (OSError, ValueError) as error:
        sys.stdout.write(f"{error}\n")
    assert not target.exists()
    assert calls > 1
    convert.convert(source, target, progress=lambda what, done, total: None)
    convert.export(target, exported, progress=lambda what, done, total: None)


def main(coordinator: str, processes: str, process: str, cases: str) -> None:
    """Convert, then load all cases and print a line for each."""
    jax.distributed.initialize(coordinator, int(processes), int(process))
    given = json.loads(Path(cases).read_text())
    zarr_arrays._CHUNK_BYTES = CHUNK_BYTES
    convert_together(*map(Path, given["convert"]))
    values: dict[str, Values] = {}
    for directory, source, keep, dtype, meshes in given["load"]:
        expected = values.setdefault(source, Values(Path(source)))
        for sizes in meshes:
            mesh = sharding.make_mesh(**sizes)
            ratio = check(Path(directory), expected, mesh, keep, dtype)
            sys.stdout.write(f"{Path(directory).name} {keep} {dtype} {sizes}: {ratio:.3f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
