"""A picture of a plan: memory of a device by what it is for, and the step's time by cause."""

from pathlib import Path
from typing import Any

from v4jax.facts import GIB
from v4jax.pods import mesh_search
from v4jax.pods.plan import Plan


def empty(target: Path) -> Any:
    """An empty figure for a file, before there is a plan.

    Raises:
      ValueError: matplotlib is missing, or the suffix is not that of a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("--plot needs matplotlib; pip install 'v4jax[train]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if target.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"--plot {target}: use a suffix such as .png, .svg or .pdf.")
    if not target.parent.is_dir():
        raise ValueError(f"--plot {target}: there is no directory {target.parent}.")
    return figure


def draw(plan: Plan, figure: Any, target: Path) -> None:
    """Draw a plan on a figure, and write it to a file in the format of its suffix."""
    memory, time = figure.subplots(1, 2)
    bottom = 0.0
    for part, nbytes in plan.memory.items():
        memory.bar([0], [nbytes / GIB], bottom=bottom, label=part, width=0.5)
        bottom += nbytes / GIB
    if plan.limit is not None:
        memory.axhline(plan.limit / GIB, color="black", linestyle="--", label="HBM")
    memory.set(xlim=(-0.5, 1.6), xticks=[], ylabel="GiB", title="Memory of a device")
    memory.legend(fontsize="small", loc="center right")
    if plan.time is not None:
        causes = {
            "operations": plan.time.compute,
            "HBM": plan.time.memory,
            "collectives": plan.time.network,
            "step": plan.time.total,
        }
        bars = time.bar(list(causes), [1e3 * seconds for seconds in causes.values()])
        time.bar_label(bars, fmt="%.3g")
        time.set(ylabel="ms", title="Estimated step")
    else:
        time.set_axis_off()
    where = f"{plan.where.name}, mesh {mesh_search.named(plan.mesh)}"
    figure.suptitle(f"{plan.model}: {plan.job.name} on {where}", fontsize="medium")
    figure.savefig(target, dpi=150)
