"""The training loop: a run from its start or a saved state to its end."""

import collections
import contextlib
import dataclasses
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from v4jax import waiting
from v4jax.checkpoints import hub, unfinished
from v4jax.checkpoints.disk import write_file
from v4jax.model import sharding

from . import fingerprint, flops, goodput, preparation, processes, runs, step
from .checkpoints import Checkpoints
from .data import dataset
from .evaluation import Evaluator
from .journal import Clock, Journal
from .local_states import LocalStates
from .preparation import Setup
from .recipe import Recipe
from .trainable import Parts
from .watchdog import Watchdog

BAD = "bad_batches"
_PATIENCE = 3600  # seconds to wait for other processes to compile
_REMEMBERED = 50  # recent losses, whose median is the usual loss
Show = Callable[[dict[str, Any]], None]
# A step in progress: its number, its metrics on the device, its batch, and when it began.
_Pending = tuple[int, Any, Any, float]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: number of the last step.
      why: 'finished', 'early' if evaluations stopped improving, or 'signal'.
      loss: loss of the last step.
    """

    step: int
    why: str
    loss: float


class Stopped(ValueError):
    """Training went wrong, and the recipe says to stop."""


def begin(recipe: Recipe, *, show: Show, again: bool = False) -> Outcome:
    """Train from the first step, in a directory that must be new or empty.

    Args:
      recipe: the run's settings.
      show: called with the metrics of each step.
      again: if the run has begun in that directory, with the same recipe, continue it.

    Raises:
      ValueError: the recipe, the model or the data is invalid, or the run has another recipe.
      Stopped: training went wrong.
    """
    if not recipe.out:
        raise ValueError("No directory is named; give --out, or out in the recipe.")
    directory = Path(recipe.out)
    if again and processes.of_first(runs.has_begun(directory)):
        processes.first(lambda: runs.check_recipe(directory, recipe))
        return resume(directory, show=show)
    processes.first(lambda: _check_outside_model(directory, recipe.model.path))
    with runs.locked(directory):
        processes.first(lambda: _check_empty(directory))
        run = _Run(recipe, directory)
        processes.first(lambda: _write_record(run))
        return run.train(show)


def resume(
    directory: Path, *, show: Show, step: int | None = None, changed_data: bool = False
) -> Outcome:
    """Continue from the newest state of a run, or from its start if there is none yet.

    Args:
      directory: directory of the run.
      show: called with the metrics of each step.
      step: continue from the state of this step, and drop everything after it.
      changed_data: continue even if the data has changed since the run began.

    Raises:
      ValueError: another process is training there, the state is damaged, or the data has changed.
      Stopped: training went wrong.
    """
    recipe = runs.read_recipe(directory)
    with runs.locked(directory):
        local = None if step is not None else runs.newer_on_hosts(recipe, directory)
        state = runs.choose_state(directory, step) if local is None else None
        run = _Run(recipe, directory, same_data=not changed_data)
        if changed_data:
            processes.first(lambda: fingerprint.write(directory, run.files))
        return run.train(show, state, local)


def _write_record(run: "_Run") -> None:
    fingerprint.write(run.directory, run.files)
    runs.write_recipe(run.directory, run.recipe)


def _check_outside_model(directory: Path, model: str) -> None:
    base = hub.local(model) if model else None
    is_new = not directory.exists() or not any(directory.iterdir())
    if base is not None and is_new:
        unfinished.check_target(directory, base)


def _check_empty(directory: Path) -> None:
    if not runs.is_empty(directory):
        raise ValueError(
            f"{directory}: is not empty; continue a run with 'v4jax-train resume {directory}', or"
            " choose another directory."
        )


class _Run:
    """A run in progress. Metrics of a step are read once the next one is under way."""

    def __init__(self, recipe: Recipe, directory: Path, *, same_data: bool = False) -> None:
        self.recipe, self.directory, self.clock = recipe, directory, Clock()
        self.local = LocalStates(recipe.checkpoints.local, directory)
        with self.clock.spent_on("data"):
            tokenizer = preparation.text_tokenizer(recipe)
            documents = preparation.read_data(recipe, tokenizer, recipe.data.files)
            self.data = preparation.batches(recipe, documents)
            held_out = preparation.read_data(recipe, tokenizer, recipe.evaluation.files)
            self.files = [*documents, *held_out]
            if same_data:
                processes.together(lambda: fingerprint.check(directory, self.files))
        self.steps = preparation.count_steps(recipe, self.data)
        with self.clock.spent_on("load"):
            prepared = preparation.prepare(recipe, self.steps)
        self.setup: Setup
        self.setup, self.state = prepared
        # Computed at once: evaluating the schedule at each step would cost more than all other
        # work of the host.
        self.rates = np.asarray(jax.vmap(self.setup.rate)(np.arange(self.steps)))
        self.last_end = 0.0
        self.evaluator = Evaluator(recipe, self.setup, held_out)
        self.losses: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self.best: float | None = None
        self.waited = self.wrong = 0
        lengths_D = np.concatenate([file.lengths_D for file in documents])
        length = float(np.sum(lengths_D.astype(np.float64) ** 2) / np.sum(lengths_D))
        settings = self.setup.settings
        self.flops = flops.per_token(
            settings.cfg,
            settings.what,
            min(length, float(recipe.data.seq_len)),
            mtp=settings.mtp_weight > 0,
            indexer=settings.indexer_weight > 0,
        )

    def train(self, show: Show, state: int | None = None, local: int | None = None) -> Outcome:
        """Run the steps that remain after a saved state, given by its step, or one on the hosts."""
        self.checkpoints = Checkpoints(self.directory, keep=self.recipe.checkpoints.keep)
        try:
            first = self._restore(state, local)
            write = jax.process_index() == 0
            board = self.recipe.log.tensorboard
            # A signal may arrive as soon as the journal exists: install its handler first.
            with (
                processes.Signal() as self.signal,
                contextlib.closing(
                    Journal(self.directory, after=first, write=write, tensorboard=board)
                ) as self.journal,
            ):
                self.clock.seconds["lost"] = self.journal.lost
                outcome = self._steps(first, show)
                with self.clock.spent_on("checkpoint"):
                    self.checkpoints.wait()
                goodput.write(self.journal, outcome.step, self.clock)
                return outcome
        except Stopped:
            # Bad steps have changed nothing.
            self._save(int(self.state.step))
            raise
        finally:
            self.local.close()
            self.checkpoints.close()

    def _restore(self, state: int | None, local: int | None) -> int:
        """Restore the state on the hosts if there is one and it is intact, else that of the run."""
        with self.clock.spent_on("checkpoint"):
            restored = None if local is None else self.local.restore(self.state, local)
            if restored is None:
                state = runs.choose_state(self.directory) if local is not None else state
                if state is not None:
                    restored = self.checkpoints.restore(self.state, state)
            if restored is None:
                self.local.remove_after(0)
                return 0
            self.state, notes = restored
            self.local.remove_after(notes["step"])
            best_is_gone = self.checkpoints.remove_after(notes["step"])
        self.losses.extend(notes["losses"])
        self.wrong = notes["wrong"]
        if not best_is_gone:
            self.best, self.waited = notes["best"], notes["waited"]
        return notes["step"]

    def _steps(self, first: int, show: Show) -> Outcome:
        settings = self.recipe.watchdog
        with Watchdog(settings.factor, settings.least, processes.end_stalled) as self.watchdog:
            why, done, pending = self._run_steps(first, show)
            if pending is not None:
                self._account(pending, show)
        self._save(done)
        return Outcome(done, why, self.losses[-1] if self.losses else float("nan"))

    def _run_steps(self, first: int, show: Show) -> tuple[str, int, _Pending | None]:
        """Run the steps until one that ends the run; the metrics of the last may be pending."""
        run: Any = step.make(self.setup.settings, self.setup.rule, like=self.state)
        frozen = self.setup.frozen
        iterator = dataset.iterate(self.data, step=first)
        why, done = "finished", first
        pending: _Pending | None = None
        for number in range(first, self.steps):
            began = time.perf_counter()
            with self.clock.spent_on("data"):
                local = next(iterator)
                batch = preparation.place_batch(local, self.recipe.steps.parts, self.setup.mesh)
            if number == first:
                with self.watchdog.paused():
                    run = self._compiled(run, batch)
            with self.clock.spent_on("step"), sharding.on(self.setup.mesh):
                self.state, metrics = run(self.state, frozen, batch, self._limit())
                if pending is not None:
                    self._account(pending, show)
            pending = number + 1, metrics, local, began
            done = number + 1
            if self._due(done):
                with self.clock.spent_on("step"):
                    self._account(pending, show)
                pending = None
                with self.watchdog.paused():
                    why = self._pause(done) or why
                if why != "finished":
                    break
        return why, done, pending

    def _compiled(self, run: Any, batch: Any) -> Any:
        """The compiled step, once every process has it: devices do not wait long for each other."""
        with self.clock.spent_on("compile"), sharding.on(self.setup.mesh):
            with waiting.compilation("Compiling"):
                program = run.lower(self.state, self.setup.frozen, batch, self._limit()).compile()
            ocp.multihost.sync_global_processes("compiled", timeout=_PATIENCE)
        self.last_end = time.perf_counter()
        return program

    def _limit(self) -> Any:
        """The loss above which a step is bad."""
        spike = self.recipe.guard.spike
        is_limited = len(self.losses) == _REMEMBERED and spike
        return np.float32(spike * statistics.median(self.losses) if is_limited else np.inf)

    def _due(self, done: int) -> bool:
        """Whether to evaluate, save or end after this step."""
        self.ended = self.signal.arrived(done)
        saved, evaluated = self.recipe.checkpoints, self.recipe.evaluation
        every = saved.every, evaluated.every, *((saved.local_every,) if saved.local else ())
        return self.ended or done == self.steps or any(done % n == 0 for n in every)

    def _pause(self, done: int) -> str | None:
        """Evaluate and save as due; return why the run ends here, if it does."""
        why = "signal" if self.ended else None
        evaluate = done % self.recipe.evaluation.every == 0 or done == self.steps
        if self.evaluator.has_work and evaluate and not self.ended:
            with (
                self.clock.spent_on("evaluation"),
                sharding.on(self.setup.mesh),
                waiting.compilation("Evaluating"),
            ):
                why = self._evaluate(done)
        saved = self.recipe.checkpoints
        if done % saved.every == 0:
            self._save(done)
        elif saved.local and done % saved.local_every == 0:
            with self.clock.spent_on("checkpoint"):
                self.local.save(done, self.state, self._notes(done))
        if why is None and done < self.steps:
            goodput.write(self.journal, done, self.clock)
        return why

    def _evaluate(self, done: int) -> str | None:
        parts = Parts(self.state.trained, self.state.balanced, self.setup.frozen)
        metrics = self.evaluator.measure(parts)
        self.journal.write("evaluation", done, **metrics)
        if "loss" not in metrics:
            return None
        if self.best is None or metrics["loss"] < self.best:
            self.best, self.waited = metrics["loss"], 0
            self.checkpoints.save_best(
                done, (parts.trained, parts.balanced), {"step": done} | metrics
            )
            return None
        self.waited += 1
        patience = self.recipe.evaluation.patience
        return "early" if patience and self.waited >= patience else None

    def _notes(self, done: int) -> dict[str, Any]:
        return {
            "step": done,
            "losses": list(self.losses),
            "best": self.best,
            "waited": self.waited,
            "wrong": self.wrong,
        }

    def _save(self, done: int) -> None:
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.save(done, self.state, self._notes(done))

    def _account(self, pending: _Pending, show: Show) -> None:
        """Record a finished step; act if it was bad."""
        number, arrays, local, began = pending
        metrics: dict[str, Any] = {n: float(x) for n, x in jax.device_get(arrays).items()}
        # On the device it began when the previous step ended.
        ended = time.perf_counter()
        seconds, self.last_end = ended - max(began, self.last_end), ended
        self.watchdog.step(seconds)
        rate = metrics["tokens_seen"] / seconds / jax.device_count()
        peak = flops.peak(jax.devices()[0])
        metrics |= {
            "rate": float(self.rates[number - 1]),
            "seconds": seconds,
            "tokens_per_second_per_device": rate,
            "mfu": rate * self.flops / peak if peak else None,
            "memory_bytes": _memory(),
            "goodput": self.clock.goodput,
        }
        self.journal.write("step", number, **metrics)
        show({"step": number, "steps": self.steps, **metrics})
        if not metrics["skipped"]:
            self.losses.append(metrics["loss"])
            self.wrong = 0
            return
        self.wrong += 1
        self._handle_bad_step(number, local, metrics)

    def _handle_bad_step(self, number: int, local: Any, metrics: dict[str, Any]) -> None:
        """Save the batch; stop the run if the recipe says so."""
        file = self.directory / BAD / f"step{number}.process{jax.process_index()}.npz"
        file.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(content, **local)
        write_file(file, content.getvalue())
        guard = self.recipe.guard
        if guard.action == "stop" or self.wrong >= guard.most:
            raise Stopped(
                f"Step {number} had a loss of {metrics['loss']} and a gradient norm of"
                f" {metrics['gradient_norm']}, {self.wrong} bad steps in a row; they changed no"
                f" weights. The last batch is in {file}."
            )


def _memory() -> int | None:
    """The peak memory use of the first device in bytes, if it reports that."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
