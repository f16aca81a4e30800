"""States that each process keeps on its own host: quick to write, and gone with the host."""

import hashlib
import json
import secrets
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import (
    DTYPE_NAMES,
    TensorInfo,
    open_safetensors,
    write_safetensors,
)

from . import processes

_KEPT = 2  # one that all processes have, while some write the next


class LocalStates:
    """The newest states of one run on this host, without a directory for them: none.

    A process writes the parts of arrays that its devices hold, in one file. So a state is of use to
    the same number of processes with the same mesh, if each still has its own part. States of the
    same step from different starts of a run are told apart.
    """

    def __init__(self, directory: str, run: Path) -> None:
        """Name the files; nothing is read or created.

        Args:
          directory: directory on each host; empty: states are neither saved nor read.
          run: directory of the run.
        """
        path = run.absolute()
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        self._run = Path(directory) / f"{path.name}-{digest}" if directory else None
        self._like = f"of{jax.process_count()}"
        self._start = processes.of_first(secrets.randbelow(2**31)) if directory else 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def latest(self) -> int | None:
        """The step of the newest state that all processes have; None if there is none."""
        common = self._common()
        return max(common)[0] if common else None

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Start to write a state; returns once its arrays may be changed again.

        If it cannot be written, there is a warning.
        """
        if self._run is None:
            return
        self._wait()
        shards = _shards(state)
        for array in shards.values():
            array.copy_to_host_async()
        # On CPUs an array in NumPy may share memory with one that the next step overwrites.
        arrays = {name: np.array(array) for name, array in shards.items()}
        self._writing = self._thread.submit(self._write, step, arrays, json.dumps(notes))

    def restore(self, like: Any, step: int) -> tuple[Any, dict[str, Any]] | None:
        """Read a state and the notes saved with it.

        Args:
          like: arrays with the state's structure, shapes, dtypes and shardings.
          step: step of the state, from `latest`.

        Returns:
          None, after a warning, if a process cannot read its part.
        """
        restored = None
        start = max(pair for pair in self._common() if pair[0] == step)[1]
        try:
            restored = _read(self._file(step, start), like)
        except CheckpointError as error:
            warnings.warn(f"{error} The last state of the run is used instead.", stacklevel=2)
        return restored if processes.all_agree(restored is not None) else None

    def remove_after(self, step: int) -> None:
        """Remove states after a step, and those of other numbers of processes."""
        if self._run is None:
            return
        for folder in self._run.glob("*of*"):
            if not folder.name.endswith(self._like):
                shutil.rmtree(folder, ignore_errors=True)
        for later, start in self._saved():
            if later > step:
                self._file(later, start).unlink()

    def close(self) -> None:
        """Finish pending writes."""
        self._wait()
        self._thread.shutdown()

    @property
    def _folder(self) -> Path:
        assert self._run is not None
        return self._run / f"{jax.process_index()}{self._like}"

    def _file(self, step: int, start: int) -> Path:
        return self._folder / f"{step}.{start}.safetensors"

    def _saved(self) -> list[tuple[int, int]]:
        """The step and start of each complete state of this process, the newest last."""
        files = self._folder.glob("*.*.safetensors") if self._run is not None else ()
        numbers = [file.name.split(".")[:2] for file in files]
        return sorted((int(step), int(start)) for step, start in numbers)

    def _common(self) -> set[tuple[int, int]]:
        """The step and start of the states that all processes have."""
        if self._run is None:
            return set()
        newest = [(0, 0)] * _KEPT + self._saved()
        everywhere = processes.gather(np.array(newest[-_KEPT:], np.int32))
        pairs = [{(int(a), int(b)) for a, b in steps} for steps in everywhere]
        return set.intersection(*pairs) - {(0, 0)}

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (CheckpointError, OSError) as error:
            warnings.warn(f"No state was saved on this host: {error}", stacklevel=3)

    def _write(self, step: int, arrays: dict[str, np.ndarray], notes: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.glob("*.part"):
            file.unlink()
        # Room for the next: a process that dies before it is complete still has one.
        for older in self._saved()[: 1 - _KEPT]:
            self._file(*older).unlink()
        infos = {
            name: TensorInfo(DTYPE_NAMES[array.dtype], array.shape)
            for name, array in arrays.items()
        }
        file = self._file(step, self._start)
        write_safetensors(file, infos, arrays.__getitem__, metadata={"notes": notes})


def _read(file: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    with open_safetensors(file) as saved:

        def restored(path: Any, leaf: jax.Array) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                array = saved.read(_name(path, index, leaf.shape))
                if array.dtype != leaf.dtype:
                    raise CheckpointError(f"{file}: is of another recipe.")
                return np.array(array)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        try:
            notes = json.loads(saved.metadata["notes"])
        except (KeyError, ValueError):
            raise CheckpointError(f"{file}: is damaged.") from None
        return jax.tree.map_with_path(restored, like), notes


def _shards(tree: Any) -> dict[str, jax.Array]:
    """The different parts of arrays on this process's devices, by name."""
    return {
        _name(path, shard.index, leaf.shape): shard.data
        for path, leaf in jax.tree.leaves_with_path(tree)
        for shard in leaf.addressable_shards
    }


def _name(path: Any, index: Any, shape: tuple[int, ...]) -> str:
    ends = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return jax.tree_util.keystr(path) + "".join(f"[{start}:{stop}]" for start, stop in ends)
