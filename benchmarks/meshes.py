"""Communication and memory of full-size programs on a TPU slice, without a TPU.

    python -m benchmarks.meshes [--only "flash decode"] [--output DIR]

Each program is compiled ahead of time, with weights in the release's formats. "Moved" counts the
bytes of one device's collectives in a step, loops multiplied out (see `v4jax.audit`). Prints the
figures and the largest collectives, and appends JSONL.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import append

# Set before importing JAX: see `v4jax.aot`.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of a preset on a slice."""

    preset: str
    step: Any
    topology: str
    mesh: dict[str, int]
    batch: int
    capacity: int

    @property
    def title(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        program = f"{self.preset} {self.step} on {self.topology}, {mesh}"
        return f"{program}, batch {self.batch}, {self.capacity} tokens"


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
    parser.add_argument("--only", default="", help="only cases whose title starts with this")
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
    """Compile one case; figures are per device."""
    import jax

    from v4jax import aot, audit, presets

    mesh = aot.topology_mesh(case.topology, **case.mesh)
    cfg = presets.get(case.preset)
    lowered = aot.lower(
        cfg,
        case.step,
        mesh,
        batch=case.batch,
        capacity=case.capacity,
        expert_format=cfg.expert_dtype,
    )
    start = time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"refused": str(error).splitlines()[0]}
    seconds = time.process_time() - start
    memory: Any = program.memory_analysis()
    collectives = audit.collectives(program.as_text() or "")
    kinds = sorted(audit.by_kind(collectives).items(), key=lambda item: -item[1])
    return {
        "compile_cpu_s": round(seconds, 1),
        "moved_mb": round(audit.moved(collectives) / 1e6, 3),
        "temporaries_mb": round(memory.temp_size_in_bytes / 1e6, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "peak_gib": round(memory.peak_memory_in_bytes / 2**30, 2),
        "kinds_mb": {kind: round(size / 1e6, 3) for kind, size in kinds},
        "largest": [_line(collective) for collective in collectives[:3]],
    }


def _line(collective: Any) -> str:
    shapes = lambda arrays: " ".join(f"{array.dtype}{list(array.dims)}" for array in arrays)
    text = f"{collective.kind} {shapes(collective.operands)} -> {shapes(collective.results)}"
    return f"{collective.bytes / 1e6:.3f} MB: {collective.times} x {text}"


def _print(row: dict[str, Any]) -> None:
    print(row["case"])
    if "refused" in row:
        print(f"  does not compile: {row['refused']}", flush=True)
        return
    kinds = ", ".join(f"{kind} {size}" for kind, size in row["kinds_mb"].items())
    print(f"  moved per step: {row['moved_mb']} MB ({kinds})")
    print(
        f"  temporaries: {row['temporaries_mb']} MB; arguments: {row['arguments_gib']} GiB;"
        f" peak {row['peak_gib']} GiB; compiled in {row['compile_cpu_s']} s of CPU"
    )
    for line in row["largest"]:
        print(f"    {line}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
