"""A run's states on disk, by Orbax: saved asynchronously, each complete or absent."""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from v4jax.adapters import runs
from v4jax.adapters.runs import BEST, STATES
from v4jax.checkpoints import checksums

from . import processes

_FULL = ("No space left on device", "File too large", "Disk quota exceeded")


class NotSaved(ValueError):
    """A state could not be written; it leaves no files, and earlier states are intact."""


class Checkpoints:
    """The saved states of one run.

    A state has the arrays that a step changes, as they are sharded, and notes in JSON: everything
    else needed to continue as if the run had not stopped.
    """

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False) -> None:
        """Open or create a run's states.

        Args:
          directory: directory of the run.
          keep: number of newest states to keep.
          read_only: create nothing.
        """
        options = lambda keep: ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only
        )
        folder = lambda name: Path(directory).absolute() / name
        self._states = ocp.CheckpointManager(folder(STATES), options=options(keep))
        if jax.process_count() > 1:
            # The first process removes incomplete states; others may have listed them before.
            multihost_utils.sync_global_devices("states opened")
            self._states.reload()
        self._best_folder, self._best_options = folder(BEST), options(1)
        self._thread = ThreadPoolExecutor(1)
        self._finishing: Future[None] | None = None

    @property
    def latest(self) -> int | None:
        """The step of the newest state, as the first process sees it; None if there is none."""
        step = self._states.latest_step()
        step = processes.of_first(-1 if step is None else step)
        return None if step < 0 else step

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Start to write a state; returns once its arrays may be changed again."""
        if step == self.latest:
            return
        self.wait()
        with _explained(self._states.directory, step):
            self._states.save(step, args=_saved(state, notes))
        self._finishing = self._thread.submit(_finish, self._states, step)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Read a state and the notes saved with it.

        Args:
          like: arrays with the state's structure, shapes, dtypes and shardings.
          step: step of the state; None: the newest.

        Raises:
          ValueError: there is no such state, or it has another structure.
        """
        return _restored(self._states, like, self.latest if step is None else step)

    def remove_after(self, step: int) -> bool:
        """Remove the states after a step, so that the run can save new ones in their place.

        Returns:
          Whether the best state was among them.
        """
        for later in [saved for saved in self._states.all_steps() if saved > step]:
            self._states.delete(later)
        best = processes.of_first(runs.choose(self._best_folder) or 0)
        if best > step and jax.process_index() == 0:
            shutil.rmtree(self._best_folder)
        return best > step

    def save_best(self, step: int, parts: Any, notes: dict[str, Any]) -> None:
        """Save the state with the best evaluation so far, instead of the previous best."""
        best = ocp.CheckpointManager(self._best_folder, options=self._best_options)
        try:
            if step in best.all_steps():
                return
            with _explained(self._best_folder, step):
                best.save(step, args=_saved(parts, notes))
            _finish(best, step)
        finally:
            _close(best)

    def wait(self) -> None:
        """Wait until the last saved state is on disk.

        Raises:
          NotSaved: it could not be written.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def close(self) -> None:
        """Finish pending writes; see `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            _close(self._states)


def _finish(manager: ocp.CheckpointManager, step: int) -> None:
    """Wait for Orbax to write a state, then add its checksums."""
    with _explained(manager.directory, step):
        manager.wait_until_finished()
        if jax.process_index() == 0:
            checksums.write(Path(manager.directory) / str(step))


def _close(manager: ocp.CheckpointManager) -> None:
    """Close a manager; a failure to save has already been reported."""
    with contextlib.suppress(Exception):
        manager.wait_until_finished()
    manager.close()


@contextlib.contextmanager
def _explained(folder: Any, step: int) -> Iterator[None]:
    """Turn an error of Orbax's writing into one sentence, and remove unfinished files."""
    try:
        yield
    except Exception as error:
        folder = Path(folder)
        if jax.process_index() == 0:
            for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        text = " ".join(str(error).split())
        full = next((reason for reason in _FULL if reason in text), None)
        steps = ocp.utils.checkpoint_steps(folder)
        what = "checksums" if step in steps else "state"
        intact = f" The one of step {max(steps)} is intact." if steps else ""
        room = "Free some space; " if full else ""
        raise NotSaved(
            f"{folder}: the {what} of step {step} cannot be saved: {full or text:.300}."
            f"{intact} {room}'v4jax-train resume' then continues."
        ) from error


def restore_best(directory: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Read the state that `save_best` saved; see `Checkpoints.restore`."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(Path(directory).absolute() / BEST, options=options) as best:
        return _restored(best, like, best.latest_step())


def _saved(tree: Any, notes: dict[str, Any]) -> Any:
    save = ocp.args.StandardSave(tree)  # pyright: ignore[reportCallIssue]
    return ocp.args.Composite(state=save, notes=ocp.args.JsonSave(notes))  # pyright: ignore


def _restored(manager: Any, like: Any, step: int | None) -> tuple[Any, dict[str, Any]]:
    if step is None or step not in manager.all_steps():
        which = "no state" if step is None else f"no state of step {step}"
        raise ValueError(f"{manager.directory}: there is {which} to continue from.")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),  # pyright: ignore[reportCallIssue]
                notes=ocp.args.JsonRestore(),
            ),
        )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{manager.directory}/{step}: is damaged, or not a state of this model and recipe"
            f" ({error!r:.200})."
        ) from error
    return restored.state, restored.notes
