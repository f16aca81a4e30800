"""How long the TPU compiler's schedule of each kernel is, without a TPU.

    python -m benchmarks.tpu_cycles [--only indexer_topk] [--chips v5p v6e tpu7x] [--output DIR]

A TPU core starts one bundle of instructions per cycle, so that the bundles of a loop's body times
its iterations are the cycles it takes when no copy is waited for. The schedule tells the first,
and the second where it is a constant; a loop whose end depends on the data shows '?', and what is
run on some iterations only stands as a part of its own. A bundle has room for four vector
operations: how much of it a part fills stands behind its bundles, and at 100% only fewer
operations could make it faster. Prints a table, appends JSONL. The bound beside it is the time for
the bytes and the flops that the case needs at least.
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

# Per JAX device: cycles, bytes of HBM and bf16 flops per second; v5p's device has two cores.
CHIPS = {
    "v5p": (1.75e9, 2.77e12, 459e12),
    "v6e": (1.75e9, 1.64e12, 918e12),
    "tpu7x": (2.2e9, 3.69e12, 1153e12),
}
_SLOTS = 4  # vector operations per bundle, on each of these chips
_SHORT = 8  # bundles of another depth in between: spilled registers, empty branches
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s+((?:> ?)*)\{")
# Loads, stores and what goes to the matrix unit have slots of their own.
_VECTOR = re.compile(r"= +v(?!ld|st|pop|mat|delay|sync)")
_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")


@dataclasses.dataclass
class Part:
    """A run of bundles at one depth of loops.

    Attributes:
      depth: loops around it.
      bundles: of instructions.
      trips: how often its loop runs; 0 where that is not known.
      vector: operations of the vector unit.
    """

    depth: int
    bundles: int = 0
    trips: int = 0
    vector: int = 0


def main() -> int:
    """Compile each case for each chip in a process of its own: the dump is a process's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose op and name begin so")
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
    """The schedule cut where the depth changes for long and where a loop or a branch begins."""
    found = [Part(0)]
    for line in bundles.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        tag, depth = match[1], match[2].count(">")
        if found[-1].depth != depth or tag in ("LB", "LH", "PB"):
            if found[-1].bundles <= _SHORT and len(found) > 1:
                short = found.pop()
                found[-1].bundles += short.bundles
                found[-1].vector += short.vector
                found[-1].trips = found[-1].trips or short.trips
            if found[-1].depth != depth or tag in ("LB", "LH", "PB"):
                found.append(Part(depth))
        found[-1].bundles += 1
        found[-1].vector += len(_VECTOR.findall(line))
        if trips := _TRIPS.search(line):
            found[-1].trips = int(trips[1])
    return found


def _compile(chip: str, index: int) -> None:
    import functools

    import jax

    from benchmarks.kernel_cases import cases
    from pallas_kernels import targets

    case = list(cases())[index]
    run = functools.partial(case.run, impl="tpu")
    targets.compiled(chip, run, *jax.eval_shape(case.inputs))  # pyright: ignore[reportArgumentType]


def _dumped(chip: str, index: int) -> dict[str, Any]:
    """Each kernel's parts."""
    with tempfile.TemporaryDirectory() as directory:
        dump = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": dump}
        # Or the last line of a refusal would be about tracebacks.
        settings["JAX_TRACEBACK_FILTERING"] = "off"
        command = [sys.executable, "-m", "benchmarks.tpu_cycles", "--worker", chip, str(index)]
        done = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"refused": done.stderr.strip().splitlines()[-1]}
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
    for name, found in row["kernels"].items():
        text = (
            found
            if isinstance(found, str)
            else " ".join(
                f"{'>' * depth}{bundles}({vector / _SLOTS / bundles:.0%})"
                + (f"x{trips}" if trips else "x?" if depth else "")
                for depth, bundles, trips, vector in found
            )
        )
        print(f"       {name}: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
