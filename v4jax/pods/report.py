"""A plan as tables for people, as JSON, and as a picture."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from v4jax.model import sharding
from v4jax.pods import estimate, mesh_search
from v4jax.pods import plan as plans
from v4jax.pods.mesh_search import Candidate
from v4jax.pods.plan import Plan, gib

# Lines of a table of arrays or of kernels.
_MOST = 10
_FEW = 5


def as_json(plan: Plan, others: Sequence[Candidate] = ()) -> dict[str, Any]:
    """All figures of a plan, in bytes, seconds and operations per device and step.

    Args:
      plan: the plan.
      others: the meshes that it was chosen from.
    """
    program, work, time = plan.compiled, plan.candidate.work, plan.time
    return {
        "model": plan.model,
        "job": plan.job.name,
        "sizes": plan.job.sizes(),
        "topology": plan.where.name,
        "devices": plan.where.devices,
        "mesh": plan.mesh,
        "rules": sharding.RULES,
        "fits": plan.fits,
        "refused": program.refused or None,
        "memory": plan.memory
        | {
            "total": plan.total,
            "peak": program.peak,
            "limit": plan.limit,
        },
        "cache": plans.cache_figures(plan),
        "replicated": [array._asdict() for array in plan.replicated],
        "flops": {"needed": work.flops, "executed": program.traffic.flops},
        "hbm": {"read": program.traffic.read, "written": program.traffic.written},
        "float32_copies_of_fp8_weights": program.traffic.wide_weights,
        "collectives": _by_kind(plan),
        "largest_collectives": list(program.largest),
        "kernels": [
            {"operation": operation, "form": form, "reason": reason, "calls": calls}
            for operation, form, reason, calls in program.kernels
        ],
        "hops": plan.hops,
        "estimate": time
        and {
            "compute_s": time.compute,
            "memory_s": time.memory,
            "network_s": time.network,
            "total_s": time.total,
            "tokens_per_s": work.tokens / time.total,
            "mfu": time.mfu,
            "bound": time.bound,
            "model": estimate.MODEL,
        },
        "meshes": [
            {
                "mesh": other.sizes,
                "memory": round(other.total),
                "step_s": other.time and other.time.total,
            }
            for other in others[:_MOST]
        ],
        "from_disk": program.from_disk,
        "warnings": plans.warnings(plan),
    }


def show_json(plan: Plan, others: Sequence[Candidate] = ()) -> None:
    """Print a plan as JSON; arguments as for `as_json`."""
    Console().print_json(json.dumps(as_json(plan, others)))


def show(plan: Plan, others: Sequence[Candidate] = ()) -> None:
    """Print a plan; arguments as for `as_json`."""
    console = Console(highlight=False, soft_wrap=True)
    sizes = ", ".join(f"{name} {size:,}" for name, size in plan.job.sizes().items())
    console.print(f"{plan.model}: {plan.job.name}, {sizes}", markup=False)
    console.print(f"{_place(plan)}, mesh {mesh_search.named(plan.mesh)}", markup=False)
    program = plan.compiled
    lost = [
        f"{operation} ({calls}): {reason}"
        for operation, form, reason, calls in program.kernels
        if form == "xla"
    ]
    for table, lines in (
        (_memory(plan), ()),
        (_replicated(plan), ()),
        (_work(plan), ()),
        (_moves(plan), program.largest),
        (_kernels(plan), lost[:_MOST]),
        (_time(plan), ()),
        (_meshes(others), ()),
    ):
        if table.row_count:
            console.print()
            console.print(table)
        for line in lines:
            console.print(f"  {line}", markup=False)
    if plan.time is not None:
        console.print(f"\nThe step's estimate: {estimate.MODEL}.", markup=False)
    for warning in plans.warnings(plan):
        console.print(f"\nwarning: {warning}", markup=False)


def _place(plan: Plan) -> str:
    chips = "" if plan.where.chip is None else f" of {plan.where.chip.name}"
    count = "1 device" if plan.where.devices == 1 else f"{plan.where.devices} devices"
    return f"{plan.where.name}: {count}{chips}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(columns[0], min_width=26)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of a device", "", "")
    limit = plan.limit
    share = lambda nbytes: f"{nbytes / limit:.1%}" if limit else ""
    for part, nbytes in plan.memory.items():
        table.add_row(part, gib(nbytes), share(nbytes))
    table.add_row("total", gib(plan.total), share(plan.total))
    if plan.compiled.peak:
        table.add_row("at once at most", gib(plan.compiled.peak), share(plan.compiled.peak))
    if limit is not None:
        table.add_row("HBM", gib(limit), "fits" if plan.fits else "does not fit")
    if figures := plans.cache_figures(plan):
        table.add_row("cache per token", f"{figures['per_token']:,} B", "")
        padding = figures["per_token"] - figures["per_token_without_padding"]
        table.add_row("  of which padding", f"{padding:,} B", "")
        table.add_row("cache per sequence, plus", gib(figures["per_sequence"]), "")
    return table


def _replicated(plan: Plan) -> Table:
    table = _table("Held alike by several devices, 16 MiB or more", "copies", "each")
    for array in plan.replicated[:_MOST]:
        table.add_row(array.name, str(array.copies), gib(array.bytes))
    if more := plan.replicated[_MOST:]:
        table.add_row(f"and {len(more)} others", "", gib(sum(array.bytes for array in more)))
    return table


def _work(plan: Plan) -> Table:
    table = _table("Work of a device in a step", "")
    traffic, needed = plan.compiled.traffic, plan.candidate.work.flops
    table.add_row("operations needed", f"{needed / 1e9:,.2f} GFLOP")
    if not plan.compiled.refused:
        table.add_row("operations executed", f"{traffic.flops / 1e9:,.2f} GFLOP")
        table.add_row("bytes read in HBM", f"{traffic.read / 1e9:,.3f} GB")
        table.add_row("bytes written in HBM", f"{traffic.written / 1e9:,.3f} GB")
        table.add_row("float32 copies of FP8", f"{traffic.wide_weights / 1e9:,.3f} GB")
    for axis, mean in plan.hops.items():
        table.add_row(f"links to neighbours: {axis}", f"{mean:.1f}")
    return table


def _by_kind(plan: Plan) -> dict[str, dict[str, float]]:
    kinds: dict[str, dict[str, float]] = {}
    for move in plan.compiled.moves:
        row = kinds.setdefault(move.kind, {"count": 0, "bytes": 0})
        row["count"] += move.times
        row["bytes"] += move.times * move.bytes
    return kinds


def _moves(plan: Plan) -> Table:
    table = _table("Collectives of a device in a step", "number", "bytes")
    for kind, row in _by_kind(plan).items():
        table.add_row(kind, f"{row['count']:,}", f"{row['bytes'] / 1e6:,.3f} MB")
    return table


def _kernels(plan: Plan) -> Table:
    table = _table("Kernels: operations of all layers, a scan counted once", "calls")
    calls = lambda is_lost: sum(
        row[3] for row in plan.compiled.kernels if (row[1] == "xla") == is_lost
    )
    if plan.compiled.kernels:
        table.add_row("Pallas kernels", str(calls(False)))
        table.add_row("XLA's forms", str(calls(True)))
    return table


def _time(plan: Plan) -> Table:
    table = _table("Estimated step", "")
    if (time := plan.time) is None:
        return table
    table.add_row("operations", _seconds(time.compute))
    table.add_row("HBM", _seconds(time.memory))
    table.add_row("collectives", _seconds(time.network))
    table.add_row("step", _seconds(time.total))
    table.add_row("bound by", time.bound)
    tokens = plan.candidate.work.tokens / time.total
    table.add_row("tokens per second", f"{tokens:,.0f}")
    table.add_row("MFU", f"{time.mfu:.1%}")
    return table


def _meshes(others: Sequence[Candidate]) -> Table:
    table = _table("Meshes by arithmetic, the best first", "memory", "step")
    for other in others[:_FEW]:
        table.add_row(str(other), gib(other.total), _seconds(other.time.total if other.time else 0))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.3f} ms"
