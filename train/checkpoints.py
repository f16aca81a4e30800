"""A run's states on disk, by Orbax: written beside the training, complete or not there at all."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from v4jax.runs import BEST, STATES


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

    @property
    def latest(self) -> int | None:
        """The step of the newest state, as the first process sees it; None where there is none."""
        step = self._states.latest_step()
        if jax.process_count() == 1:
            return step
        found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if found < 0 else found

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write a state; returns before it is written, once it cannot change any more."""
        if step != self.latest:
            self._states.save(step, args=_saved(state, notes))

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """A state, the newest by default, with the notes that were saved with it.

        Args:
          like: arrays of its structure; it comes back with their shapes, dtypes and devices.
          step: which one.

        Raises:
          ValueError: there is none, or it is not of this structure.
        """
        return _restored(self._states, like, self.latest if step is None else step)

    def save_best(self, step: int, parts: Any, notes: dict[str, Any]) -> None:
        """Keep what an evaluation found better than all before it."""
        with ocp.CheckpointManager(self._best_place, options=self._best_options) as best:
            if step not in best.all_steps():
                best.save(step, args=_saved(parts, notes))

    def wait(self) -> None:
        """Return when all that was saved is on disk."""
        self._states.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written."""
        self._states.close()


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
