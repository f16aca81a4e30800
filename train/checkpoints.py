"""A run's states on disk, by Orbax: written beside the training, complete or not there at all."""

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
    """A state could not be written; nothing of it is left, and those before it are whole."""


class Checkpoints:
    """The saved states of one run.

    Each holds the arrays that a step changes, as they are spread over devices, and notes in JSON:
    what else is needed to go on as if nothing had happened.
    """

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False) -> None:
        """Open or begin a run's states.

        Args:
          directory: of the run.
          keep: how many states stay, the newest.
          read_only: make nothing.
        """
        options = lambda keep: ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only
        )
        where = lambda name: Path(directory).absolute() / name
        self._states = ocp.CheckpointManager(where(STATES), options=options(keep))
        if jax.process_count() > 1:
            # The first process has removed what is not complete; another may have seen it before.
            multihost_utils.sync_global_devices("states opened")
            self._states.reload()
        self._best_place, self._best_options = where(BEST), options(1)
        self._thread = ThreadPoolExecutor(1)
        self._finishing: Future[None] | None = None

    @property
    def latest(self) -> int | None:
        """The step of the newest state, as the first process sees it; None where there is none."""
        step = self._states.latest_step()
        step = processes.of_first(-1 if step is None else step)
        return None if step < 0 else step

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write a state; returns before it is written, once it cannot change any more."""
        if step == self.latest:
            return
        self.wait()
        with _explained(self._states.directory, step):
            self._states.save(step, args=_saved(state, notes))
        self._finishing = self._thread.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """When Orbax has written a state, add its checksums."""
        with _explained(self._states.directory, step):
            self._states.wait_until_finished()
            if jax.process_index() == 0:
                checksums.write(Path(self._states.directory) / str(step))

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """A state, the newest by default, with the notes that were saved with it.

        Args:
          like: arrays of its structure; it comes back with their shapes, dtypes and devices.
          step: which one.

        Raises:
          ValueError: there is none, or it is not of this structure.
        """
        return _restored(self._states, like, self.latest if step is None else step)

    def remove_after(self, step: int) -> bool:
        """Remove the states after a step: what comes next is saved in their place.

        Returns:
          Whether the best state was among them.
        """
        for later in [other for other in self._states.all_steps() if other > step]:
            self._states.delete(later)
        best = processes.of_first(runs.choose(self._best_place) or 0)
        if best > step and jax.process_index() == 0:
            shutil.rmtree(self._best_place)
        return best > step

    def save_best(self, step: int, parts: Any, notes: dict[str, Any]) -> None:
        """Keep what an evaluation found better than all before it."""
        best = ocp.CheckpointManager(self._best_place, options=self._best_options)
        try:
            if step in best.all_steps():
                return
            with _explained(self._best_place, step):
                best.save(step, args=_saved(parts, notes))
                best.wait_until_finished()
                if jax.process_index() == 0:
                    checksums.write(self._best_place / str(step))
        finally:
            _close(best)

    def wait(self) -> None:
        """Return when all that was saved is on disk.

        Raises:
          NotSaved: it could not be written.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def close(self) -> None:
        """Finish what is being written; see `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            _close(self._states)


def _close(manager: ocp.CheckpointManager) -> None:
    """Close it, of whose failure to save was told before."""
    with contextlib.suppress(Exception):
        manager.wait_until_finished()
    manager.close()


@contextlib.contextmanager
def _explained(folder: Any, step: int) -> Iterator[None]:
    """Make one sentence of whatever Orbax raises where it cannot write, and remove its leavings."""
    try:
        yield
    except Exception as error:
        folder = Path(folder)
        if jax.process_index() == 0:
            for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        text = " ".join(str(error).split())
        full = next((full for full in _FULL if full in text), None)
        steps = ocp.utils.checkpoint_steps(folder)
        what = "checksums" if step in steps else "state"
        whole = f" The one of step {max(steps)} is whole." if steps else ""
        raise NotSaved(
            f"{folder}: the {what} of step {step} cannot be saved: {full or text:.300}."
            f"{whole} {'Make room; then' if full else 'Then'} 'v4jax-train resume' goes on."
        ) from error


def restore_best(directory: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """What `save_best` kept; see `Checkpoints.restore`."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(Path(directory).absolute() / BEST, options=options) as best:
        return _restored(best, like, best.latest_step())


def _saved(tree: Any, notes: dict[str, Any]) -> Any:
    save = ocp.args.StandardSave(tree)  # pyright: ignore[reportCallIssue]
    return ocp.args.Composite(state=save, notes=ocp.args.JsonSave(notes))  # pyright: ignore


def _restored(manager: Any, like: Any, step: int | None) -> tuple[Any, dict[str, Any]]:
    if step is None or step not in manager.all_steps():
        which = "no state" if step is None else f"no state of step {step}"
        raise ValueError(f"{manager.directory}: there is {which} to go on from.")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),  # pyright: ignore[reportCallIssue]
                notes=ocp.args.JsonRestore(),
            ),
        )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{manager.directory}/{step}: is not a state of this model and recipe, or is damaged"
            f" ({error!r:.200})."
        ) from error
    return found.state, found.notes
