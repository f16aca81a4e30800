"""What full-size programs move between the chips of a TPU slice and need there, without a TPU.

    python -m benchmarks.meshes [--only "flash decode"] [--output DIR]

Each program is compiled ahead of time, weights in the release's formats. Moved are the bytes of a
step's collectives on one device, loops multiplied out (see `v4jax.audit`). Prints a table and what
moves most, appends JSONL.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import append

# Set before JAX is imported: see `v4jax.aot`.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of a preset on a slice."""

    preset: str
    step: Any
    topology: str
    mesh: dict[str, int]
    batch: int
    capacity: int

    @property
    def title(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        what = f"{self.preset} {self.step} on {self.topology}, {mesh}"
        return f"{what}, batch {self.batch}, {self.capacity} tokens"


CASES = (
    Case("flash", "decode", "v6e:8x8", {"expert": 8, "tensor": 8}, 8, 2**20),
    Case("flash", "decode", "v6e:8x8", {"expert": 64}, 64, 8192),
    Case("pro", "decode", "v5p:4x4x4", {"expert": 64}, 64, 8192),
)


def main() -> int:
    """Compile each case in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose title begins so")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    for case in CASES:
        if case.title.startswith(args.only):
            row = {"case": case.title} | measure(case)
            _print(row)
            append([row], args.output / "meshes.jsonl")
    return 0


def measure(case: Case) -> dict[str, Any]:
    """Compile one case; figures are of a device."""
    import jax

    from v4jax import aot, audit, presets

    mesh = aot.topology_mesh(case.topology, **case.mesh)
    cfg = presets.preset(case.preset)
    lowered = aot.lower(
        cfg,
        case.step,
        mesh,
        batch=case.batch,
        capacity=case.capacity,
        expert_format=cfg.expert_dtype,
    )
    began = time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"refused": str(error).splitlines()[0]}
    seconds = time.process_time() - began
    memory: Any = program.memory_analysis()
    found = audit.collectives(program.as_text() or "")
    most = sorted(audit.by_kind(found).items(), key=lambda item: -item[1])
    return {
        "compile_cpu_s": round(seconds, 1),
        "moved_mb": round(audit.moved(found) / 1e6, 3),
        "temporaries_mb": round(memory.temp_size_in_bytes / 1e6, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "peak_gib": round(memory.peak_memory_in_bytes / 2**30, 2),
        "kinds_mb": {kind: round(size / 1e6, 3) for kind, size in most},
        "largest": [_line(one) for one in found[:3]],
    }


def _line(one: Any) -> str:
    arrays = lambda parts: " ".join(f"{part.dtype}{list(part.dims)}" for part in parts)
    exchange = f"{one.kind} {arrays(one.operands)} -> {arrays(one.results)}"
    return f"{one.bytes / 1e6:.3f} MB: {one.times} x {exchange}"


def _print(row: dict[str, Any]) -> None:
    print(row["case"])
    if "refused" in row:
        print(f"  does not compile: {row['refused']}", flush=True)
        return
    kinds = ", ".join(f"{kind} {size}" for kind, size in row["kinds_mb"].items())
    print(f"  moved a step: {row['moved_mb']} MB ({kinds})")
    print(
        f"  temporaries: {row['temporaries_mb']} MB beside {row['arguments_gib']} GiB of arguments;"
        f" peak {row['peak_gib']} GiB; compiled in {row['compile_cpu_s']} s of CPU"
    )
    for line in row["largest"]:
        print(f"    {line}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
