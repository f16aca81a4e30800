"""Curves of runs, from their metrics to a picture."""

from collections.abc import Sequence
from pathlib import Path

from . import journal

_PANELS = ("loss", "gradient_norm", "rate", "tokens_per_second_per_device")
_TITLES = ("loss (nats)", "gradient norm", "learning rate", "tokens/s/device")


def draw(runs: Sequence[Path], target: Path) -> None:
    """Make a PNG of the runs' loss, gradient norm, learning rate and speed.

    Args:
      runs: directories of runs.
      target: the file to make.

    Raises:
      ValueError: a directory has no metrics, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing; pip install 'v4jax[train]' brings it.") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for run in runs:
        steps = journal.read(run, "step")
        measured = journal.read(run, "evaluation")
        for panel, name, title in zip(panels.flat, _PANELS, _TITLES, strict=True):
            points = [(line["step"], line[name]) for line in steps if line[name] is not None]
            panel.plot(*zip(*points, strict=True), label=run.name, linewidth=1) if points else None
            panel.set_title(title)
            panel.set_xlabel("step")
        held_out = [(line["step"], line["loss"]) for line in measured if line.get("loss")]
        if held_out:
            label = f"{run.name}, held out"
            panels[0, 0].plot(*zip(*held_out, strict=True), "o-", label=label)
    panels[0, 0].legend()
    figure.savefig(target, dpi=120)
