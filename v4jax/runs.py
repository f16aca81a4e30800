"""What a training run has made so far, read back without the package that trains."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4jax import checkpoint_files
from v4jax.lora import Lora
from v4jax.safetensors_file import CheckpointError
from v4jax.zarr_arrays import Arrays

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
    """Whether this is the directory of a run."""
    return (path / RECIPE).is_file()


def open_run(path: Path, *, best: bool = False) -> Run:
    """Find the newest state of a run, or the one that evaluations found best.

    Raises:
      CheckpointError: it is no run, has no such state yet, or its recipe is damaged.
    """
    if not is_run(path):
        raise CheckpointError(f"{path}: is not the directory of a run: it has no {RECIPE}.")
    recipe = checkpoint_files.read_json(path / RECIPE)
    try:
        adapter = Lora(**_with_tuples(recipe["adapter"])) if "adapter" in recipe else None
        fp4_experts = adapter is None and bool(recipe["full"].get("fp4_experts", False))
        model = str(recipe.get("model", {}).get("path", ""))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / RECIPE}: is damaged, or was written by another version ({error!r:.100})."
        ) from error
    folder = path / (BEST if best else STATES)
    step = _newest(folder)
    if step is None:
        which = "state that an evaluation found best" if best else "saved state"
        raise CheckpointError(f"{path}: has no {which} yet; train further.")
    return Run(path, model, adapter, fp4_experts, step, folder / str(step) / "state")


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    """The same with its lists as the tuples that they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _newest(folder: Path) -> int | None:
    """The newest state that is complete."""
    import orbax.checkpoint as ocp

    steps = ocp.utils.checkpoint_steps(folder.absolute()) if folder.is_dir() else []
    return max(steps, default=None)


def trained(run: Run) -> dict[str, Any]:
    """The trained part as NumPy arrays: of a weight's dotted name its value, or its two factors.

    Of weights trained in full the routers' biases are among them.

    Raises:
      CheckpointError: the state is damaged.
    """
    saved = checkpoint_files.read_json(run.state / _METADATA)
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
