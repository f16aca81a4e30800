"""The TPU compiler's schedules against the roofline: the table in docs/kernels.md.

    python -m benchmarks.roofline [--write]

Reads the results of `benchmarks.tpu_cycles` and compiles nothing. A kernel's cycles are the bundles
of each part of its schedule times how often the part runs. Most trip counts are in the schedule;
the readers below derive the others from the shapes of the case if they can. If they cannot, the
number is a bound: '<=' if branches that most steps skip are counted on every step, '>=' if a part
is left out because its length depends on the data.

The roofline is max(bytes / HBM bandwidth, flops / bf16 peak) of one JAX device (`tpu_cycles.CHIPS`)
for the minimum bytes and flops of a case (`kernel_cases.Case`).
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.kernel_cases import Case, cases
from benchmarks.tpu_cycles import CHIPS, Part
from pallas_kernels.grouped_matmul import plan

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "tpu_cycles.jsonl"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- schedules: begin -->", "<!-- schedules: end -->"

_CORES = {"v5p": 2, "v6e": 1, "tpu7x": 1}  # per JAX device; they share a grid's parallel steps
_PIPELINE = 2  # extra iterations of a grid's loop: the first read and the last write
_SMALL = 30  # bundles of a loop of unknown trip count that may be counted once per step
_LANES = 128


class Count(NamedTuple):
    """Cycles of a kernel on one core, and '<=' or '>=' where they are a bound."""

    cycles: float
    bound: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """A case on a chip.

    Attributes:
      case: benchmark case.
      arrays: shapes and dtypes of the case's arguments.
      cores: cores per device.
    """

    case: Case
    arrays: Any
    cores: int


Parts = Sequence[Part]
Reader = Callable[[Parts, Run], Count]


def runs(parts: Parts, *, grid: bool = True) -> list[float]:
    """How often each part runs.

    Args:
      parts: parts of a schedule in which every loop has a trip count. A part without one belongs to
        the loop that ends with the next part at its depth.
      grid: whether the loop at depth 1 is over a grid.

    Raises:
      ValueError: a loop has no trip count.
    """
    trips: dict[int, float] = {}
    counts = []
    for part in reversed(parts):
        trips = {depth: count for depth, count in trips.items() if depth <= part.depth}
        if part.trips:
            trips[part.depth] = part.trips - (_PIPELINE if grid and part.depth == 1 else 0)
        if len(trips) < part.depth:
            raise ValueError(f"no trip count at depth {part.depth}")
        counts.append(math.prod(trips.values()))
    return counts[::-1]


def _total(parts: Parts, counts: Sequence[float]) -> float:
    return sum(part.bundles * count for part, count in zip(parts, counts, strict=True))


def _steps(parts: Parts) -> int:
    """Grid steps on one core."""
    return max(part.trips for part in parts if part.depth == 1) - _PIPELINE


def _every(parts: Parts, run: Run) -> Count:
    """Every part runs on every step."""
    return Count(_total(parts, runs(parts)))


def _select(parts: Parts, run: Run) -> Count:
    """Only the scores: the length of the bisection depends on their values."""
    deeper = next(i for i, part in enumerate(parts) if part.depth == 3)
    scores = max(part.bundles for part in parts[:deeper] if part.depth == 2)
    queries = min(8, run.arrays[0].shape[1])
    return Count(scores * queries * _steps(parts), ">=")


def _dense(parts: Parts, run: Run) -> Count:
    """All four branches of a step (window, full and partial block, end) are one part; few run."""
    return _every(parts, run)._replace(bound="<=")


def _gathered(parts: Parts, run: Run) -> Count:
    """The case's entries are too far apart for the masked branch, so each query's are gathered."""
    queries, listed = run.arrays[0].shape[1], run.arrays[5].shape[2]
    steps = _steps(parts)
    block, groups = queries // (steps * run.cores), listed // 16
    masked = next(i for i, part in enumerate(parts) if part.depth == 2)
    first = next(i for i, part in enumerate(parts) if (part.depth, part.trips) == (2, groups))
    counts = [1.0]
    for i, part in enumerate(parts[1:], 1):
        if masked <= i < first:
            counts.append(0)
        elif i == first:
            counts.append(groups * steps)
        else:  # Depth 3 starts the next query's copies, except for the last query.
            inside = {0: 1, 1: steps, 2: block * steps, 3: groups * (block - 1) * steps}
            counts.append(inside[part.depth])
    return Count(_total(parts, counts))


def _entries(parts: Parts, run: Run) -> Count:
    """Groups of windows are pooled in each column of channels and finished in the last one."""
    ratio, columns = run.arrays[3].shape[0], run.arrays[4].shape[0] // _LANES
    overlap = run.arrays[3].shape[1] // run.arrays[4].shape[0]
    parts, bound = list(parts), ""
    loops = [i for i, part in enumerate(parts) if part.depth == 2]
    if overlap > 1:
        # The loop starts at the second group; the schedule's count is its end.
        groups = parts[loops[0]].trips - 1
    else:
        # A chunk that begins with a window needs no tokens before it, so that branch does not run,
        # and only one column runs the finish; neither is a part of its own.
        windows, bound = 2**21 // (2 * ratio * _LANES * 4), "<="
        groups = windows // 2
    parts[loops[0]] = dataclasses.replace(parts[loops[0]], trips=groups)
    counts = runs(parts)
    if overlap > 1:
        for i in range(loops[0] + 1, len(parts) - 2):
            counts[i] /= columns
    return Count(_total(parts, counts), bound)


def _many_rows(parts: Parts, run: Run) -> Count:
    """A tile is dequantised only for the first block of rows."""
    blocks = -(-run.arrays[0].shape[0] // 512)
    counts = runs(parts)
    inner = [i for i, part in enumerate(parts) if part.depth == 2]
    for i in inner:
        counts[i] /= blocks
    return Count(_total(parts, counts), "" if inner else "<=")


def _streams(parts: Parts, run: Run) -> Count:
    """Channels and Sinkhorn passes share a loop; the remaining channels follow in their own."""
    (_, tokens, channels), passes = run.arrays[0].shape, 19
    chunks, parts = channels // 4 // 256, list(parts)
    if chunks > passes:
        last = max(i for i, part in enumerate(parts) if part.trips == chunks)
        parts[last] = dataclasses.replace(parts[last], trips=chunks - passes)
    return Count(_total(parts, runs(parts, grid=tokens > 256)))


@dataclasses.dataclass(frozen=True)
class Experts:
    """Steps of the grouped matmuls.

    Attributes:
      steps: number of steps, each a tile of rows for one expert.
      used: number of experts with rows.
      few: whether products are scaled instead of weights.
    """

    steps: int
    used: int
    few: bool


_ROUTED: dict[tuple[int, ...], Experts] = {}


def _routed(run: Run) -> Experts:
    """Steps for the case's random routing, computed without creating its weights."""
    experts, choices = run.arrays[3].shape[1], run.arrays[1].size
    if (experts, choices) not in _ROUTED:
        drawn = np.asarray(jax.jit(lambda: run.case.inputs()[1])())
        rows, few = plan.tile_rows(choices, experts), 16
        tiles = {(expert, position // rows) for position, expert in enumerate(sorted(drawn.flat))}
        used = len({expert for expert, _ in tiles})
        _ROUTED[experts, choices] = Experts(len(tiles), used, rows <= few)
    return _ROUTED[experts, choices]


def _hidden(parts: Parts, run: Run) -> Count:
    _, F, D = run.arrays[3].shape[1:]
    return _grouped(parts, run, inputs=D, outputs=F, terms=2)


def _down(parts: Parts, run: Run) -> Count:
    _, F, D = run.arrays[3].shape[1:]
    return _grouped(parts, run, inputs=F, outputs=D, terms=1)


def _grouped(parts: Parts, run: Run, *, inputs: int, outputs: int, terms: int) -> Count:
    """The grid is blocks of output channels times the plan's steps.

    Weights that are dequantised first are so once per expert and block.
    """
    kind = run.case.name.split(",")[0].split()[1]
    routed = _routed(run)
    width = _block(kind, inputs, outputs, terms, few=routed.few)
    blocks = outputs // width / run.cores
    chunks = width // next(n for n in (512, 384, 256, 128) if width % n == 0)
    loops = [i for i, part in enumerate(parts) if part.depth > 1 and part.trips]
    dequantised = loops[:terms] if len(loops) > terms else []
    counts = []
    for i, part in enumerate(parts):
        steps = routed.used if i in dequantised else routed.steps
        across = chunks if part.depth == 3 else 1  # the loop over chunks has no part of its own
        inside = across * max(part.trips, 1) if i in loops else 1
        counts.append(blocks * steps * inside if part.depth else 1)
    unknown = (part.bundles for part in parts if part.depth > 1 and not part.trips)
    if any(parts[i].trips != inputs // 1024 for i in loops) or max(unknown, default=0) > _SMALL:
        raise ValueError(f"the schedule's loops are not those of {inputs} input channels")
    return Count(_total(parts, counts))


def _block(kind: str, inputs: int, outputs: int, terms: int, *, few: bool) -> int:
    """Output channels per block, as chosen by `grouped_matmul.tpu_matmul`."""
    each = inputs * terms * {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5 + 1 / 32}[kind]
    dense = 0 if few or kind == "bf16" else 2 * inputs * terms
    most = min((9 if few else 16) * 2**19 / each, 36 * 2**20 / (2 * each + dense))
    sizes = [n for n in range(128, outputs + 1, 128) if outputs % n == 0 and outputs // n % 2 == 0]
    return max(n for n in sizes if n <= most)


READERS: dict[str, Reader] = {
    "indexer_topk_select": _select,
    "compress_decode": _every,
    "compress_prefill": _entries,
    "sparse_attention_decode": _every,
    "sparse_attention_prefill": _gathered,
    "dense_attention_decode": _dense,
    "dense_attention_prefill": _dense,
    "experts_hidden": _hidden,
    "experts_out": _down,
    "linear_few_rows": _every,
    "linear_many_rows": _many_rows,
    "hyper_pre": _streams,
    "rotary": _every,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A case on a chip, in microseconds.

    Attributes:
      schedule: time of the Pallas kernels' schedules; None if the program did not compile.
      bound: as in `Count`.
      roofline: minimum time.
      limit: 'HBM' or 'MXU', whichever sets the roofline.
    """

    schedule: float | None
    bound: str
    roofline: float
    limit: str


def rows() -> Iterator[tuple[Case, dict[str, Row]]]:
    """Each case that has a TPU kernel, by chip."""
    recorded = {}
    for line in RECORDS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        recorded[record["case"], record["chip"]] = record["kernels"]
    for case in sorted(cases(), key=lambda case: case.op):
        kernels = {chip: recorded[f"{case.op} {case.name}", chip] for chip in CHIPS}
        if not all("Unsupported" in kernel.get("refused", "") for kernel in kernels.values()):
            arrays = jax.eval_shape(case.inputs)
            yield case, {chip: _row(case, arrays, chip, kernels[chip]) for chip in CHIPS}


def _row(case: Case, arrays: Any, chip: str, kernels: dict[str, Any]) -> Row:
    clock, bandwidth, peak = CHIPS[chip]
    times = {"HBM": case.bytes / bandwidth * 1e6, "MXU": case.flops / peak * 1e6}
    limit = max(times, key=lambda name: times[name])
    if "refused" in kernels:
        return Row(None, "", times[limit], limit)
    run = Run(case, arrays, _CORES[chip])
    counts = [
        READERS[name]([Part(*part) for part in parts], run)
        for name, parts in kernels.items()
        if name in READERS
    ]
    bound = next((count.bound for count in counts if count.bound), "")
    return Row(sum(count.cycles for count in counts) / clock * 1e6, bound, times[limit], limit)


def table() -> str:
    """The table in Markdown."""
    head = " | ".join(f"{chip} schedule | roofline | ratio" for chip in CHIPS)
    lines = [f"| op | case | {head} |", "|---|---|" + "--:|" * 3 * len(CHIPS)]
    for case, chips in rows():
        cells = " | ".join(cell for row in chips.values() for cell in _cells(row))
        lines.append(f"| `{case.op}` | {case.name} | {cells} |")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, str, str]:
    roofline = f"{_digits(row.roofline)} {row.limit}"
    if row.schedule is None:
        return "", roofline, ""
    bound = row.bound and row.bound.replace("<=", "&le; ").replace(">=", "&ge; ")
    ratio = row.schedule / row.roofline
    return f"{bound}{_digits(row.schedule)}", roofline, f"{bound}{_digits(ratio)}"


def _digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def written(page: str) -> str:
    """The page with the table between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
