"""What a training run has made so far, read back without the package that trains."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4jax.adapters.lora import Lora
from v4jax.checkpoints import checksums, disk
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.zarr_arrays import Arrays

RECIPE, STATES, BEST = "recipe.json", "states", "best"
_METADATA = "_METADATA"  # Orbax's, of a state's arrays


@dataclasses.dataclass(frozen=True)
class Run:
    """One state of a run.

    Attributes:
      path: the run's directory.
      model: path or Hub id of the model that it began from.
      adapter: what its adapter is made with; None: it trains the weights themselves.
      fp4_experts: it computes with the routed experts as FP4 holds them.
      step: how many steps the state has behind it.
      state: where the state lies.
    """

    path: Path
    model: str
    adapter: Lora | None
    fp4_experts: bool
    step: int
    state: Path


def is_run(path: Path) -> bool:
    """Whether this is the directory of a run, or of one of its states."""
    return (locate(path)[0] / RECIPE).is_file()


def locate(path: Path) -> tuple[Path, int | None]:
    """The directory of a run, and the step where the path is that of one of its states."""
    if path.parent.name == STATES and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def open_run(path: Path, *, best: bool = False) -> Run:
    """Find the newest state of a run, or the one that evaluations found best.

    Args:
      path: the run's directory, or that of one state, which is taken then.
      best: the best state.

    Raises:
      CheckpointError: it is no run, has no such state yet, or its recipe is damaged.
    """
    path, step = locate(path)
    if best and step is not None:
        raise CheckpointError(f"{path}: the best state or that of step {step}; choose one.")
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
        which = "state that an evaluation found best" if best else "saved state"
        raise CheckpointError(f"{path}: has no {which} yet; train further.")
    return Run(path, model, adapter, fp4_experts, step, folder / str(step) / "state")


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    """The same with its lists as the tuples that they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def choose(folder: Path, step: int | None = None) -> int | None:
    """The step of the newest complete state in a folder, or the one that is asked for.

    Returns:
      None where there is no state at all.

    Raises:
      CheckpointError: there are states, and none of this step.
    """
    steps = _steps(folder)
    if step is None or step in steps:
        return max(steps, default=None) if step is None else step
    there = f"there are {', '.join(map(str, steps))}" if steps else "there is none yet"
    raise CheckpointError(f"{folder}: has no state of step {step}; {there}.")


def _steps(folder: Path) -> list[int]:
    """The steps of the states that are complete."""
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(folder.absolute())) if folder.is_dir() else []


def check(folder: Path, step: int) -> None:
    """Refuse a state of which a file is not as it was saved.

    Raises:
      CheckpointError: which file of it is, and which other state is whole.
    """
    state = folder / str(step)
    if not _has_checksums(state):
        warnings.warn(
            f"{state}: has no {checksums.FILE}, so damage to it would not be seen: it is being"
            " saved, or its run was killed then, or it is from an older v4jax.",
            stacklevel=2,
        )
        return
    damaged = checksums.damage(state)
    if damaged is None:
        return
    others = (folder / str(other) for other in reversed(_steps(folder)) if other != step)
    whole = next((x for x in others if _has_checksums(x) and not checksums.damage(x)), None)
    offer = "no other state of it is whole; restore the directory from a copy"
    if whole is not None:
        offer = f"the state of step {whole.name} is whole: --state {whole.name} takes {whole}"
    raise CheckpointError(f"{state}: is damaged: {damaged} is not as it was saved; {offer}.")


def _has_checksums(state: Path) -> bool:
    return (state / checksums.FILE).is_file()


def trained(run: Run) -> dict[str, Any]:
    """The trained part as NumPy arrays: of a weight's dotted name its value, or its two factors.

    Of weights trained in full the routers' biases are among them.

    Raises:
      CheckpointError: the state is damaged.
    """
    check(run.state.parent.parent, run.step)
    saved = disk.read_json(run.state / _METADATA)
    arrays = Arrays(
        run.state.absolute(),
        database=saved.get("use_ocdbt") is True,
        zarr3=saved.get("use_zarr3") is True,
        remedy="The state is damaged; remove it, and the one before it is taken.",
    )
    found: dict[str, Any] = {}
    for part, name, *factor in _names(run.state / _METADATA, saved):
        value = arrays.read(".".join((part, name, *factor)), (...,))
        if factor:
            found.setdefault(name, {})[factor[0]] = value
        else:
            found[name] = value
    return found


def _names(file: Path, saved: dict[str, Any]) -> Iterator[list[str]]:
    """The keys of each array of the trained part and of the routers' biases."""
    # The best is that pair by itself, and what is empty has one key.
    parts = ("trained", "balanced", "0", "1")
    try:
        for entry in saved["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            if keys[0] in parts and len(keys) > 1:
                yield keys
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: is damaged ({error!r:.100}).") from error
