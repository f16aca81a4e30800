"""Training runs on disk, read without the training package."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4jax.adapters.lora_settings import Lora
from v4jax.checkpoints import checksums, disk
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.zarr_arrays import Arrays

RECIPE, STATES, BEST = "recipe.json", "states", "best"
_METADATA = "_METADATA"  # Orbax's file about a state's arrays


@dataclasses.dataclass(frozen=True)
class Run:
    """One state of a run.

    Attributes:
      path: the run's directory.
      model: path or Hub id of the model that training started from.
      adapter: settings of the run's adapter; None: it trains in full.
      fp4_experts: whether the run rounds the routed experts to FP4.
      step: the state's step.
      state: path of the state.
    """

    path: Path
    model: str
    adapter: Lora | None
    fp4_experts: bool
    step: int
    state: Path


def is_run(path: Path) -> bool:
    """Whether this is the directory of a run or of one of its states."""
    return (locate(path)[0] / RECIPE).is_file()


def locate(path: Path) -> tuple[Path, int | None]:
    """Split a path into the run's directory and the step of a state, None if it names no state."""
    if path.parent.name == STATES and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def open_run(path: Path, *, best: bool = False) -> Run:
    """Find the newest state of a run, or its best.

    Args:
      path: the run's directory, or that of one of its states.
      best: whether to find the state with the best evaluation.

    Raises:
      CheckpointError: this is not a run, it has no such state yet, or its recipe is damaged.
    """
    path, step = locate(path)
    if best and step is not None:
        raise CheckpointError(
            f"{path}: asked for both the best state and that of step {step}; choose one."
        )
    if not is_run(path):
        raise CheckpointError(f"{path}: is not the directory of a run: it has no {RECIPE}.")
    recipe = disk.read_json(path / RECIPE)
    try:
        adapter = Lora(**_with_tuples(recipe["adapter"])) if "adapter" in recipe else None
        fp4_experts = adapter is None and bool(recipe["full"].get("fp4_experts", False))
        model = str(recipe.get("model", {}).get("path", ""))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / RECIPE}: is damaged, or was written by another version ({error!r:.100})."
        ) from error
    folder = path / (BEST if best else STATES)
    step = choose(folder, step)
    if step is None:
        which = "best state" if best else "saved state"
        raise CheckpointError(f"{path}: has no {which} yet; train further.")
    return Run(path, model, adapter, fp4_experts, step, folder / str(step) / "state")


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    """The table with its lists turned back into the tuples that JSON cannot represent."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def choose(folder: Path, step: int | None = None) -> int | None:
    """The step of the newest complete state in a folder, or the requested one.

    Returns:
      None if there is no state and no step was requested.

    Raises:
      CheckpointError: there is no state of the requested step.
    """
    steps = _steps(folder)
    if step is None or step in steps:
        return max(steps, default=None) if step is None else step
    available = f"it has {', '.join(map(str, steps))}" if steps else "it has none yet"
    raise CheckpointError(f"{folder}: has no state of step {step}; {available}.")


def _steps(folder: Path) -> list[int]:
    """The steps of the complete states."""
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(folder.absolute())) if folder.is_dir() else []


def check(folder: Path, step: int) -> None:
    """Reject a state with a file that has changed since it was saved.

    Raises:
      CheckpointError: names the damaged file and another, intact state.
    """
    state = folder / str(step)
    if not _has_checksums(state):
        warnings.warn(
            f"{state}: has no {checksums.FILE}, so damage would go unnoticed: the state is still"
            " being saved, its run was killed while saving, or it is from an older v4jax.",
            stacklevel=2,
        )
        return
    damaged = checksums.damage(state)
    if damaged is None:
        return
    others = (folder / str(other) for other in reversed(_steps(folder)) if other != step)
    intact = next((x for x in others if _has_checksums(x) and not checksums.damage(x)), None)
    remedy = "no other state is intact; restore the directory from a copy"
    if intact is not None:
        remedy = f"the state of step {intact.name} is intact: --state {intact.name} uses {intact}"
    raise CheckpointError(f"{state}: is damaged: {damaged} has changed since saving; {remedy}.")


def _has_checksums(state: Path) -> bool:
    return (state / checksums.FILE).is_file()


def trained(run: Run) -> dict[str, Any]:
    """The trained part as NumPy arrays: by dotted name, a weight or an adapter's two factors.

    After full training it includes the routers' biases.

    Raises:
      CheckpointError: the state is damaged.
    """
    check(run.state.parent.parent, run.step)
    saved = disk.read_json(run.state / _METADATA)
    arrays = Arrays(
        run.state.absolute(),
        database=saved.get("use_ocdbt") is True,
        zarr3=saved.get("use_zarr3") is True,
        remedy="The state is damaged; remove it to use the one before it.",
    )
    values: dict[str, Any] = {}
    for part, name, *factor in _names(run.state / _METADATA, saved):
        value = arrays.read(".".join((part, name, *factor)), (...,))
        if factor:
            values.setdefault(name, {})[factor[0]] = value
        else:
            values[name] = value
    return values


def _names(file: Path, saved: dict[str, Any]) -> Iterator[list[str]]:
    """The keys of each array in the trained part and the routers' biases."""
    # The best state is just that pair; an empty entry has one key.
    parts = ("trained", "balanced", "0", "1")
    try:
        for entry in saved["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            if keys[0] in parts and len(keys) > 1:
                yield keys
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: is damaged ({error!r:.100}).") from error
