"""Plots of runs from their metrics."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v4jax.checkpoints.disk import write_file

from . import goodput, journal

_PANELS = ("loss", "gradient_norm", "rate", "tokens_per_second_per_device")
_TITLES = ("loss (nats)", "gradient norm", "learning rate", "tokens/s/device")


def draw(runs: Sequence[Path], target: Path) -> None:
    """Plot the runs' loss, gradient norm, learning rate and speed to a PNG.

    Args:
      runs: directories of runs.
      target: file to write.

    Raises:
      ValueError: a directory has no metrics of steps, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing; pip install 'v4jax[train]'.") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for run in runs:
        steps = journal.read(run, "step")
        if not steps:
            raise ValueError(f"{run / journal.FILE}: has no steps yet; train further.")
        evaluations = journal.read(run, "evaluation")
        for panel, name, title in zip(panels.flat, _PANELS, _TITLES, strict=True):
            points = _points(steps, name)
            panel.plot(*zip(*points, strict=True), label=run.name, linewidth=1) if points else None
            panel.set_title(title)
            panel.set_xlabel("step")
        held_out = _points(evaluations, "loss")
        if held_out:
            label = f"{run.name}, held out"
            panels[0, 0].plot(*zip(*held_out, strict=True), "o-", label=label)
    times = [goodput.text(seconds) for run in runs if (seconds := goodput.read(run))]
    if len(times) == 1:
        figure.suptitle(times[0], fontsize="small")
    if panels[0, 0].lines:
        panels[0, 0].legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    write_file(target, png.getvalue())


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The steps and values of a metric, where it is a number."""
    values = [(line["step"], line.get(name)) for line in lines]
    return [(step, value) for step, value in values if isinstance(value, int | float)]
