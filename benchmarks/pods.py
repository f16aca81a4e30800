"""Full-size programs on slices of TPUs, planned without a TPU.

    python -m benchmarks.pods [--only "flash decode"] [--output DIR]

Each case is a `v4jax plan`, whose figures are appended as JSONL; figures of programs that were
compiled before are read from disk.
"""

import argparse
import contextlib
import io
import json
import resource
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import append
from v4jax.__main__ import main as v4jax

CASES = (
    "flash --topology v6e:2x4 --job decode --context 1048576 --batch 8 --mesh expert=8",
    "flash --topology tpu7x:2x2x1 --job decode --context 8192 --batch 64 --mesh expert=8",
    "flash --topology v6e:8x8 --job decode --context 1048576 --batch 8 --mesh expert=8,tensor=8",
    "flash --topology v6e:8x8 --job decode --context 8192 --batch 64 --mesh expert=64",
    "pro --topology v5p:4x4x4 --job decode --context 8192 --batch 64 --mesh expert=64",
    "pro --topology v5p:4x4x4 --job decode --context 1048576 --batch 64 --mesh expert=64",
    "flash --topology v5p:4x4x8 --job train-lora --seq 4096 --global-batch 128 --mesh fsdp=128",
    "flash --topology v6e:16x16 --job train-lora --seq 4096 --global-batch 256 --mesh fsdp=256",
    "flash --topology v6e:16x16 --job train-lora --seq 8192 --global-batch 256 --mesh fsdp=256",
    "flash --topology v5p:4x4x8 --job train-muon --seq 4096 --global-batch 128 --mesh fsdp=128",
    "flash --topology v5p:4x4x8 --job train-adamw --seq 4096 --global-batch 128 --mesh fsdp=128",
    "pro --topology v5p:4x4x8 --job train-lora --seq 8192 --global-batch 128 --mesh fsdp=128",
)


def main() -> int:
    """Plan each case in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only cases that contain all these words")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    for case in CASES:
        if set(args.only.split()) <= set(case.replace("train-", "").split()):
            row = {"case": case} | measure(case)
            print(_line(row), flush=True)
            append([row], args.output / "pods.jsonl")
    return 0


def measure(case: str) -> dict[str, Any]:
    """The figures of `v4jax plan`, and what it took to get them."""
    start, cpu = time.time(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as text:
        v4jax(["plan", *case.split(), "--json"])
    plan = json.loads(text.getvalue())
    return plan | {
        "wall_s": round(time.time() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def _line(row: dict[str, Any]) -> str:
    gib = lambda name: f"{row['memory'].get(name, 0) / 2**30:.2f}"
    if row["refused"]:
        return f"{row['case']}\n  does not fit: {row['refused']}"
    moved = sum(kind["bytes"] for kind in row["collectives"].values()) / 1e9
    return (
        f"{row['case']}\n  peak {gib('peak')} GiB of {gib('limit')}, temporaries"
        f" {gib('temporaries')}; moves {moved:.3f} GB; {row['cpu_s']} s of CPU"
    )


if __name__ == "__main__":
    raise SystemExit(main())
