"""A run from its beginning or a saved state to its end."""

import collections
import contextlib
import dataclasses
import io
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from v4jax import waiting
from v4jax.checkpoints import hub, unfinished
from v4jax.checkpoints.disk import write_file
from v4jax.model import sharding

from . import fingerprint, flops, preparation, processes, runs, step
from .checkpoints import Checkpoints
from .data import dataset
from .evaluation import Evaluator
from .journal import Clock, Journal
from .preparation import Progress, Setup
from .recipe import Recipe
from .trainable import Parts

BAD = "bad_batches"
_PATIENCE = 3600  # seconds that processes wait for another one's compiler
_REMEMBERED = 50  # losses, of which the median says what is usual
Show = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: steps made.
      why: 'finished', 'early' where evaluations did not get better, or 'signal'.
      loss: of the last step.
    """

    step: int
    why: str
    loss: float


class Stopped(ValueError):
    """Training went wrong, and the recipe says to stop."""


def begin(recipe: Recipe, *, show: Show, progress: Progress | None = None) -> Outcome:
    """Train from the first step, in a directory that must not exist yet.

    Args:
      recipe: the run's settings.
      show: told the metrics of each step.
      progress: told of the model's loading.

    Raises:
      ValueError: something in the recipe, the model or the data is wrong.
      Stopped: training went wrong.
    """
    if not recipe.out:
        raise ValueError("No directory is named; give --out, or out in the recipe.")
    directory = Path(recipe.out)
    processes.first(lambda: _refuse_inside_model(directory, recipe.model.path))
    with runs.locked(directory):
        processes.first(lambda: _refuse_existing(directory))
        run = _Run(recipe, directory, progress)
        processes.first(lambda: _write_down(run))
        return run.go(show)


def resume(
    directory: Path,
    *,
    show: Show,
    progress: Progress | None = None,
    step: int | None = None,
    changed_data: bool = False,
) -> Outcome:
    """Go on from the newest state of a run, or from its beginning where there is none yet.

    Args:
      directory: of the run.
      show: told the metrics of each step.
      progress: told of the model's loading.
      step: go on from the state of this step; what was made after it is dropped.
      changed_data: go on where the data is not what the run began with.

    Raises:
      ValueError: the run is another process's, its state is damaged, or its data has changed.
      Stopped: training went wrong.
    """
    recipe = runs.read_recipe(directory)
    with runs.locked(directory):
        chosen = runs.choose_state(directory, step)
        run = _Run(recipe, directory, progress, same_data=not changed_data)
        if changed_data:
            processes.first(lambda: fingerprint.write(directory, run.files))
        return run.go(show, chosen)


def _write_down(run: "_Run") -> None:
    fingerprint.write(run.directory, run.files)
    runs.write_recipe(run.directory, run.recipe)


def _refuse_inside_model(directory: Path, model: str) -> None:
    base = hub.local(model) if model else None
    is_new = not directory.exists() or not any(directory.iterdir())
    if base is not None and is_new:
        unfinished.check_target(directory, base)


def _refuse_existing(directory: Path) -> None:
    if not runs.is_empty(directory):
        raise ValueError(
            f"{directory}: is not empty; 'v4jax-train resume {directory}' goes on with a run, or"
            " choose another directory."
        )


class _Run:
    """What goes on while a run runs. Metrics of a step are read when the next one is under way."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        progress: Progress | None,
        *,
        same_data: bool = False,
    ) -> None:
        self.recipe, self.directory, self.clock = recipe, directory, Clock()
        with self.clock.spent_on("data"):
            tokenizer = preparation.text_tokenizer(recipe)
            documents = preparation.read_data(recipe, tokenizer, recipe.data.files)
            self.data = preparation.batches(recipe, documents)
            held_out = preparation.read_data(recipe, tokenizer, recipe.evaluation.files)
            self.files = [*documents, *held_out]
            if same_data:
                processes.together(lambda: fingerprint.check(directory, self.files))
        self.steps = preparation.count_steps(recipe, self.data)
        tokens = recipe.steps.batch * recipe.data.seq_len
        with self.clock.spent_on("load"):
            prepared = preparation.prepare(recipe, self.steps, tokens, progress)
        self.setup: Setup
        self.setup, self.state = prepared
        # All at once: a schedule asked step by step costs more than all else beside a step.
        self.rates = np.asarray(jax.vmap(self.setup.rate)(np.arange(self.steps)))
        self.last_end = 0.0
        self.evaluator = Evaluator(recipe, self.setup, held_out)
        self.losses: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self.best: float | None = None
        self.waited = self.wrong = 0
        lengths = np.concatenate([one.lengths_D for one in documents])
        length = float(np.sum(lengths.astype(np.float64) ** 2) / np.sum(lengths))
        settings = self.setup.settings
        self.flops = flops.per_token(
            settings.cfg,
            settings.what,
            min(length, float(recipe.data.seq_len)),
            mtp=settings.mtp_weight > 0,
            indexer=settings.indexer_weight > 0,
        )

    def go(self, show: Show, state: int | None = None) -> Outcome:
        """Make the steps that are left after a saved state."""
        self.checkpoints = Checkpoints(self.directory, keep=self.recipe.checkpoints.keep)
        try:
            first = self._restore(state)
            write = jax.process_index() == 0
            board = self.recipe.log.tensorboard
            # A run that has a journal can be ended: the signal first.
            with (
                _Signal() as self.signal,
                contextlib.closing(
                    Journal(self.directory, after=first, write=write, tensorboard=board)
                ) as self.journal,
            ):
                return self._steps(first, show)
        except Stopped:
            # Wrong steps have changed nothing.
            self._save(int(self.state.step))
            raise
        finally:
            self.checkpoints.close()

    def _restore(self, state: int | None) -> int:
        if state is None:
            return 0
        with self.clock.spent_on("checkpoint"):
            self.state, notes = self.checkpoints.restore(self.state, state)
            best_is_gone = self.checkpoints.remove_after(state)
        self.losses.extend(notes["losses"])
        self.wrong = notes["wrong"]
        if not best_is_gone:
            self.best, self.waited = notes["best"], notes["waited"]
        return notes["step"]

    def _steps(self, first: int, show: Show) -> Outcome:
        run: Any = step.make(self.setup.settings, self.setup.rule, like=self.state)
        frozen = self.setup.frozen
        iterator = dataset.iterate(self.data, step=first)
        why, made = "finished", first
        pending: tuple[int, Any, Any, float] | None = None
        for number in range(first, self.steps):
            began = time.perf_counter()
            with self.clock.spent_on("data"):
                local = next(iterator)
                batch = preparation.place_batch(local, self.recipe.steps.parts, self.setup.mesh)
            if number == first:
                run = self._compiled(run, batch)
            with self.clock.spent_on("step"), sharding.on(self.setup.mesh):
                self.state, metrics = run(self.state, frozen, batch, self._limit())
                if pending is not None:
                    self._account(pending, show)
            pending = number + 1, metrics, local, began
            made = number + 1
            if self._due(made):
                with self.clock.spent_on("step"):
                    self._account(pending, show)
                pending = None
                why = self._pause(made) or why
                if why != "finished":
                    break
        if pending is not None:
            self._account(pending, show)
        self._save(made)
        return Outcome(made, why, self.losses[-1] if self.losses else float("nan"))

    def _compiled(self, run: Any, batch: Any) -> Any:
        """The step's program, when every process has it: devices wait for each other not long."""
        with self.clock.spent_on("compile"), sharding.on(self.setup.mesh):
            with waiting.compilation("Compiling"):
                program = run.lower(self.state, self.setup.frozen, batch, self._limit()).compile()
            ocp.multihost.sync_global_processes("compiled", timeout=_PATIENCE)
        return program

    def _limit(self) -> Any:
        """The loss above which a step is wrong."""
        spike = self.recipe.guard.spike
        usual = len(self.losses) == _REMEMBERED and spike
        return np.float32(spike * statistics.median(self.losses) if usual else np.inf)

    def _due(self, made: int) -> bool:
        """Whether there is more to do after this step than to go on."""
        self.ended = self.signal.arrived(made)
        every = self.recipe.checkpoints.every, self.recipe.evaluation.every
        return self.ended or made == self.steps or any(made % n == 0 for n in every)

    def _pause(self, made: int) -> str | None:
        """Evaluate and save; why the run ends here, if it does."""
        why = "signal" if self.ended else None
        evaluate = made % self.recipe.evaluation.every == 0 or made == self.steps
        if self.evaluator.wanted and evaluate and not self.ended:
            with self.clock.spent_on("evaluation"), sharding.on(self.setup.mesh):
                why = self._evaluate(made)
        if made % self.recipe.checkpoints.every == 0:
            self._save(made)
        return why

    def _evaluate(self, made: int) -> str | None:
        parts = Parts(self.state.trained, self.state.balanced, self.setup.frozen)
        found = self.evaluator.measure(parts)
        self.journal.write("evaluation", made, **found)
        if "loss" not in found:
            return None
        if self.best is None or found["loss"] < self.best:
            self.best, self.waited = found["loss"], 0
            self.checkpoints.save_best(
                made, (parts.trained, parts.balanced), {"step": made} | found
            )
            return None
        self.waited += 1
        patience = self.recipe.evaluation.patience
        return "early" if patience and self.waited >= patience else None

    def _save(self, made: int) -> None:
        notes = {
            "step": made,
            "losses": list(self.losses),
            "best": self.best,
            "waited": self.waited,
            "wrong": self.wrong,
        }
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.save(made, self.state, notes)

    def _account(self, pending: tuple[int, Any, Any, float], show: Show) -> None:
        """Write down a step that is made; act if it was wrong."""
        number, metrics, local, began = pending
        found: dict[str, Any] = {n: float(x) for n, x in jax.device_get(metrics).items()}
        # It began on the device when the one before it ended there.
        ended = time.perf_counter()
        seconds, self.last_end = ended - max(began, self.last_end), ended
        rate = found["tokens_seen"] / seconds / jax.device_count()
        peak = flops.peak(jax.devices()[0])
        found |= {
            "rate": float(self.rates[number - 1]),
            "seconds": seconds,
            "tokens_per_second_per_device": rate,
            "mfu": rate * self.flops / peak if peak else None,
            "memory_bytes": _memory(),
            "goodput": self.clock.goodput,
        }
        self.journal.write("step", number, **found)
        show({"step": number, "steps": self.steps, **found})
        if not found["skipped"]:
            self.losses.append(found["loss"])
            self.wrong = 0
            return
        self.wrong += 1
        self._wrong_step(number, local, found)

    def _wrong_step(self, number: int, local: Any, found: dict[str, Any]) -> None:
        place = self.directory / BAD / f"step{number}.process{jax.process_index()}.npz"
        place.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(content, **local)
        write_file(place, content.getvalue())
        guard = self.recipe.guard
        if guard.action == "stop" or self.wrong >= guard.most:
            raise Stopped(
                f"Step {number} had a loss of {found['loss']} and a gradient of length"
                f" {found['gradient_norm']}, {self.wrong} wrong in a row; weights are as they were"
                f" before. Its batch is in {place}."
            )


def _memory() -> int | None:
    """The most bytes of the first device that were ever in use, where it tells."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


class _Signal:
    """Remembers SIGTERM, so that a run can be saved before it ends."""

    def __enter__(self) -> "_Signal":
        self._seen = False
        self._old = None
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._remember)
        return self

    def _remember(self, *_: Any) -> None:
        self._seen = True

    def arrived(self, made: int) -> bool:
        """Whether it has come, to any process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(made)
        return self._seen

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
