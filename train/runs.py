"""The directory of a run: its recipe, and its states read back."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from v4jax.runs import RECIPE
from v4jax.text_files import read_text

from . import preparation, tables
from .checkpoints import Checkpoints, restore_best
from .evaluation import Evaluator
from .recipe import Recipe, from_table
from .trainable import Parts


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """Make the directory, with the recipe in it, its paths absolute."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tables.to_table(_anywhere(recipe)), indent=1)
    (directory / RECIPE).write_text(text + "\n", encoding="utf-8")


def _anywhere(recipe: Recipe) -> Recipe:
    """The recipe as it is read the same from any folder."""
    absolute = lambda name: str(Path(name).absolute())
    # What is no path here is a name on the Hub.
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
    )


def read_recipe(directory: Path) -> Recipe:
    """The recipe of a run.

    Raises:
      ValueError: the directory is not a run's.
    """
    path = directory / RECIPE
    if not path.is_file():
        raise ValueError(f"{directory}: is not the directory of a run: it has no {RECIPE}.")
    try:
        return from_table(json.loads(read_text(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def evaluate(directory: Path, *, files: tuple[str, ...] = (), best: bool = False) -> dict[str, Any]:
    """Measure a state of a run.

    Args:
      directory: of the run.
      files: instead of those that its recipe is evaluated on.
      best: the state that evaluations found best, not the newest.

    Returns:
      What `evaluation.Evaluator.measure` does, and the state's `step`.

    Raises:
      ValueError: there is no such state, or nothing to measure.
    """
    recipe = read_recipe(directory)
    if files:
        settings = dataclasses.replace(recipe.evaluation, files=files)
        recipe = dataclasses.replace(recipe, evaluation=settings)
    if not (recipe.evaluation.files or recipe.evaluation.prompts):
        raise ValueError("There is nothing to measure; give --data, or evaluation.files.")
    tokenizer = preparation.text_tokenizer(recipe)
    held_out = preparation.read_data(recipe, tokenizer, recipe.evaluation.files)
    tokens = recipe.steps.batch * recipe.data.seq_len
    prepared, state = preparation.prepare(recipe, recipe.steps.steps or 1, tokens)
    if best:
        (trained, balanced), notes = restore_best(directory, (state.trained, state.balanced))
    else:
        saved = Checkpoints(directory, keep=recipe.checkpoints.keep, read_only=True)
        state, notes = saved.restore(state)
        trained, balanced = state.trained, state.balanced
        saved.close()
    parts = Parts(trained, balanced, prepared.frozen)
    evaluator = Evaluator(recipe, prepared, held_out)
    with preparation.on(prepared.mesh):
        return {"step": notes["step"]} | evaluator.measure(parts)
