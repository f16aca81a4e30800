"""Muon against AdamW, each at several rates, pre-training the tiny model.

python -m benchmarks.optimizers runs/optimizers --png docs/optimizers.png
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from v4jax_train import display, journal, loop, plot, tiny

RATES = {"muon": (4e-3, 8e-3, 1.6e-2), "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
_MEAN = 10  # steps over which losses are averaged: batches vary more than optimizers


def losses(run: Path) -> np.ndarray:
    """A run's training losses, as a running mean."""
    values = [line["loss"] for line in journal.read(run, "step")]
    return np.convolve(values, np.full(_MEAN, 1 / _MEAN), "valid")


def steps_to(run: Path, loss: float) -> int | None:
    """The first step at which the run's loss is at most `loss`."""
    below = np.flatnonzero(losses(run) <= loss)
    return int(below[0]) + _MEAN if below.size else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory of the runs; finished ones are reused")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--png", type=Path, default=Path("optimizers.png"))
    args = parser.parse_args()
    best: dict[str, Path] = {}
    for rule, rates in RATES.items():
        runs = [_run(args, rule, rate) for rate in rates]
        best[rule] = min(runs, key=lambda run: losses(run)[-1])
        for run in runs:
            print(f"{run.name}: {losses(run)[-1]:.4f}", flush=True)
    end = losses(best["adamw"])[-1]
    steps = steps_to(best["muon"], end)
    print(f"{best['muon'].name} reaches AdamW's final loss after {steps} steps.")
    plot.draw(list(best.values()), args.png)


def _run(args: argparse.Namespace, rule: str, rate: float) -> Path:
    out = args.out / f"{rule} {rate:g}"
    if (out / "states" / str(args.steps)).is_dir():
        return out
    data = args.out / "data"
    if not data.is_dir():
        tiny.prepare(data)
    recipe = tiny.read(data, out)
    recipe = dataclasses.replace(
        recipe,
        optimizer=dataclasses.replace(recipe.optimizer, rule=rule, rate=rate),
        steps=dataclasses.replace(recipe.steps, steps=args.steps, batch=args.batch),
        evaluation=dataclasses.replace(recipe.evaluation, files=(), prompts=()),
        checkpoints=dataclasses.replace(recipe.checkpoints, every=args.steps, keep=1),
    )
    with display.live() as show:
        loop.begin(recipe, show=show)
    return out


if __name__ == "__main__":
    main()
