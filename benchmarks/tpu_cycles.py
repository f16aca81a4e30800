"""Length of the TPU compiler's schedule of each kernel, without a TPU.

    python -m benchmarks.tpu_cycles [--only indexer_topk] [--chips v5p v6e tpu7x] [--output DIR]

A TPU core issues one bundle of instructions per cycle, so the bundles of a loop's body times its
iterations are the cycles it takes if it never waits for a copy. The schedule shows the bundles, and
the iterations where they are constant; a data-dependent trip count is printed as '?', and code run
on some iterations only is a part of its own. A bundle has slots for four vector operations: the
percentage after a part's bundles is the share of slots in use, and at 100% only fewer operations
could make it faster. Prints a table and appends JSONL. The bound is the time for the minimum bytes
and flops of the case.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Per JAX device: cycles, HBM bytes and bf16 flops per second; a v5p device has two cores.
CHIPS = {
    "v5p": (1.75e9, 2.77e12, 459e12),
    "v6e": (1.75e9, 1.64e12, 918e12),
    "tpu7x": (2.2e9, 3.69e12, 1153e12),
}
_SLOTS = 4  # vector operations per bundle, on each of these chips
_SHORT = 8  # longest run at another depth to merge: register spills, empty branches
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s+((?:> ?)*)\{")
# Loads, stores and matrix unit operations have slots of their own.
_VECTOR = re.compile(r"= +v(?!ld|st|pop|mat|delay|sync)")
_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")


@dataclasses.dataclass
class Part:
    """A run of bundles at one loop depth.

    Attributes:
      depth: number of enclosing loops.
      bundles: number of instruction bundles.
      trips: trip count of its loop; 0 if unknown.
      vector: number of vector unit operations.
    """

    depth: int
    bundles: int = 0
    trips: int = 0
    vector: int = 0


def main() -> int:
    """Compile each case for each chip in its own process: dump settings are per process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only cases whose op and name start with this")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", nargs=2, metavar=("CHIP", "INDEX"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _compile(args.worker[0], int(args.worker[1]))
        return 0
    from benchmarks.kernel_cases import cases

    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "tpu_cycles.jsonl").open("a", encoding="utf-8") as file:
        for index, case in enumerate(cases()):
            title = f"{case.op} {case.name}"
            if not title.startswith(args.only):
                continue
            for chip in args.chips:
                _, bandwidth, speed = CHIPS[chip]
                bound = max(case.bytes / bandwidth, case.flops / speed)
                row = {"chip": chip, "case": title, "bound_us": round(bound * 1e6, 2)}
                row["kernels"] = _dumped(chip, index)
                _print(row)
                file.write(json.dumps(row) + "\n")
    return 0


def parts(bundles: str) -> list[Part]:
    """Split a schedule at lasting changes of depth and where a loop or branch begins."""
    result = [Part(0)]
    for line in bundles.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        tag, depth = match[1], match[2].count(">")
        if result[-1].depth != depth or tag in ("LB", "LH", "PB"):
            if result[-1].bundles <= _SHORT and len(result) > 1:
                short = result.pop()
                result[-1].bundles += short.bundles
                result[-1].vector += short.vector
                result[-1].trips = result[-1].trips or short.trips
            if result[-1].depth != depth or tag in ("LB", "LH", "PB"):
                result.append(Part(depth))
        result[-1].bundles += 1
        result[-1].vector += len(_VECTOR.findall(line))
        if trips := _TRIPS.search(line):
            result[-1].trips = int(trips[1])
    return result


def _compile(chip: str, index: int) -> None:
    import functools

    import jax

    from benchmarks.kernel_cases import cases
    from pallas_kernels import targets

    case = list(cases())[index]
    run = functools.partial(case.run, impl="tpu")
    targets.compiled(chip, run, *jax.eval_shape(case.inputs))  # pyright: ignore[reportArgumentType]


def _dumped(chip: str, index: int) -> dict[str, Any]:
    """Parts of each kernel's schedule."""
    with tempfile.TemporaryDirectory() as directory:
        dump = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": dump}
        # Otherwise the last line of an error would be about traceback filtering.
        settings["JAX_TRACEBACK_FILTERING"] = "off"
        command = [sys.executable, "-m", "benchmarks.tpu_cycles", "--worker", chip, str(index)]
        result = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=False
        )
        if result.returncode:
            return {"refused": result.stderr.strip().splitlines()[-1]}
        kernels = {}
        for path in sorted(Path(directory).glob("*-final_bundles.txt")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "schedule-analysis" in path.name or "inlined_call_operand" not in text:
                continue
            name = re.sub(r"^\d+-(.*?)(\.\d+)?-\d+-final_bundles\.txt$", r"\1", path.name)
            kernels[name] = [dataclasses.astuple(p) for p in parts(text)]
        return kernels


def _print(row: dict[str, Any]) -> None:
    print(f"{row['chip']:6} {row['case']}: bound {row['bound_us']} us")
    for name, kernel in row["kernels"].items():
        text = (
            kernel
            if isinstance(kernel, str)
            else " ".join(
                f"{'>' * depth}{bundles}({vector / _SLOTS / bundles:.0%})"
                + (f"x{trips}" if trips else "x?" if depth else "")
                for depth, bundles, trips, vector in kernel
            )
        )
        print(f"       {name}: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
