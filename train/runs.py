"""The directory of a run: its lock, its recipe, and evaluation of its states."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4jax.adapters import runs
from v4jax.adapters.runs import BEST, RECIPE, STATES
from v4jax.checkpoints import disk, unfinished
from v4jax.model import sharding
from v4jax.text.files import read_text

from . import fingerprint, preparation, processes, tables
from .checkpoints import Checkpoints, restore_best
from .evaluation import Evaluator
from .local_states import LocalStates
from .recipe import Recipe, from_table
from .trainable import Parts

LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a directory against training by other processes; creates it if necessary.

    The lock ends with its process, however that ends. A directory that is still empty is removed.

    Raises:
      CheckpointError: another process is working there.
    """
    with contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(_lock(directory)))
        yield


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with path.open("ab") as file:
        unfinished.lock(file, directory)
        try:
            yield
        finally:
            path.unlink()
            with contextlib.suppress(OSError):
                directory.rmdir()


def is_empty(directory: Path) -> bool:
    """Whether a directory has no files but those of a run that ended before it had begun."""
    return all(file.name in (LOCK, fingerprint.FILE) for file in directory.iterdir())


def has_begun(directory: Path) -> bool:
    """Whether a run has begun in a directory."""
    return (directory / RECIPE).is_file()


def newer_on_hosts(recipe: Recipe, directory: Path) -> int | None:
    """The step of the newest state on all hosts, if it is newer than the run's own."""
    local = LocalStates(recipe.checkpoints.local, directory).latest()
    saved = processes.of_first(runs.choose(directory / STATES) or 0)
    return local if local is not None and local > saved else None


def choose_state(directory: Path, step: int | None = None, *, best: bool = False) -> int | None:
    """The step of a run's newest state, its best, or the requested one, checked for damage.

    Returns:
      None if there is no state yet.

    Raises:
      CheckpointError: there is no state of that step, or it is damaged.
    """
    folder = directory / (BEST if best else STATES)
    step = runs.choose(folder, step)
    if step is not None:
        processes.first(lambda: runs.check(folder, step))
    return step


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """Write the recipe, with absolute paths, to the directory, which is created if necessary."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tables.to_table(_with_absolute_paths(recipe)), indent=1)
    disk.write_file(directory / RECIPE, f"{text}\n".encode())


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe in a form that does not depend on the current directory."""
    absolute = lambda name: str(Path(name).absolute())
    # A model path that does not exist locally is an id on the Hub.
    local = Path(os.path.expanduser(recipe.model.path))
    is_here = bool(recipe.model.path) and local.exists()
    model = str(local.absolute()) if is_here else recipe.model.path
    trained, held_out = (tuple(map(absolute, x.files)) for x in (recipe.data, recipe.evaluation))
    return dataclasses.replace(
        recipe,
        out=recipe.out and absolute(recipe.out),
        model=dataclasses.replace(recipe.model, path=model),
        data=dataclasses.replace(recipe.data, files=trained),
        evaluation=dataclasses.replace(recipe.evaluation, files=held_out),
        checkpoints=dataclasses.replace(
            recipe.checkpoints,
            local=recipe.checkpoints.local and absolute(recipe.checkpoints.local),
        ),
    )


def read_recipe(directory: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
      ValueError: the directory is not that of a run, or its recipe is damaged.
    """
    path = directory / RECIPE
    if not path.is_file():
        raise ValueError(f"{directory}: is not the directory of a run: it has no {RECIPE}.")
    try:
        return from_table(json.loads(read_text(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_recipe(directory: Path, recipe: Recipe) -> None:
    """Reject a recipe that is not the one of the run in a directory.

    Raises:
      ValueError: names the differences.
    """
    new, old = _fields(recipe), _fields(read_recipe(directory))
    different = sorted(name for name in old | new if old.get(name) != new.get(name))
    if different:
        raise ValueError(
            f"{directory}: the run has begun with another recipe ({', '.join(different)}); give"
            " the same one, or choose another directory."
        )


def _fields(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe by 'table.field', without the run's directory."""
    return {
        f"{name}.{field}": value
        for name, values in tables.to_table(_with_absolute_paths(recipe)).items()
        if name != "out"
        for field, value in values.items()
    }


def evaluate(
    directory: Path, *, files: tuple[str, ...] = (), best: bool = False, step: int | None = None
) -> dict[str, Any]:
    """Evaluate a state of a run.

    Args:
      directory: directory of the run.
      files: files to use instead of the recipe's.
      best: evaluate the best state instead of the newest.
      step: evaluate the state of this step.

    Returns:
      The results of `evaluation.Evaluator.measure`, and the state's `step`.

    Raises:
      ValueError: there is no such state, or nothing to evaluate.
    """
    recipe = read_recipe(directory)
    if files:
        settings = dataclasses.replace(recipe.evaluation, files=files)
        recipe = dataclasses.replace(recipe, evaluation=settings)
    if not (recipe.evaluation.files or recipe.evaluation.prompts):
        raise ValueError("There is nothing to evaluate; give --data, or evaluation.files.")
    if best and step is not None:
        raise ValueError("--best and --state exclude each other; choose one.")
    step = choose_state(directory, step, best=best)
    tokenizer = preparation.text_tokenizer(recipe)
    held_out = preparation.read_data(recipe, tokenizer, recipe.evaluation.files)
    prepared, state = preparation.prepare(recipe, recipe.steps.steps or 1)
    if best:
        (trained, balanced), notes = restore_best(directory, (state.trained, state.balanced))
    else:
        saved = Checkpoints(directory, keep=recipe.checkpoints.keep, read_only=True)
        state, notes = saved.restore(state, step)
        trained, balanced = state.trained, state.balanced
        saved.close()
    parts = Parts(trained, balanced, prepared.frozen)
    evaluator = Evaluator(recipe, prepared, held_out)
    with sharding.on(prepared.mesh):
        return {"step": notes["step"]} | evaluator.measure(parts)
