"""Check the kernels on this machine's accelerator, then time them.

    python -m benchmarks.kernels [--only indexer_topk] [--divide 8] [--output benchmarks/results]

Every implementation is compared with the reference on inputs `--divide` times smaller; those that
agree are timed at full size: the kernel, XLA and, on a GPU with torch installed, torch
(`torch_cases`). Prints a table and appends JSONL. A CPU has no kernels: XLA is checked, and timed
at the small sizes.
"""

import argparse
import datetime
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.kernel_cases import Case, cases

# Vendor figures for bytes and bf16 flops per second (TPUs: per JAX device).
PEAKS = {
    "TPU v5": (2.77e12, 459e12),
    "TPU v5p": (2.77e12, 459e12),
    "TPU v6 lite": (1.64e12, 918e12),
    "TPU7x": (3.69e12, 1153e12),
    "NVIDIA H100 80GB HBM3": (3.35e12, 989e12),
    "NVIDIA H200": (4.8e12, 989e12),
}
# Outputs are bfloat16 sums of bfloat16 products: implementations round intermediates differently.
TOLERANCE = 3e-2


def main() -> int:
    """Check and time; the exit status is 1 if an implementation disagrees with the reference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only ops whose name starts with this")
    parser.add_argument("--divide", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device = jax.devices()[0]
    kernel = {"tpu": "tpu", "gpu": "gpu"}.get(device.platform)
    forms = [kernel, "xla"] if kernel else ["xla"]
    if kernel == "gpu" and _has_torch():
        forms.append("torch")
    print(f"{device.device_kind}, jax {jax.__version__}")
    rows: list[dict[str, Any]] = []
    pairs = zip(cases(args.divide), cases(1 if kernel else args.divide), strict=True)
    for small, full in pairs:
        if not small.op.startswith(args.only):
            continue
        for form in forms:
            rows.append(_measure(small, full, form, device))
            _print(rows[-1])
    _write(rows, device, args.output)
    return int(any(row["agrees"] is False for row in rows))


def _measure(small: Case, full: Case, form: str, device: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"op": full.op, "case": full.name, "form": form, "agrees": None}
    try:
        row["error"] = _error(small, form)
        row["agrees"] = row["error"] <= TOLERANCE
        if row["agrees"]:
            row["seconds"] = _seconds(full, form)
    except NotImplementedError as refusal:
        row["refusal"] = str(refusal)
    except RuntimeError as failure:
        # JAX and torch word it differently.
        if not any(words in str(failure) for words in ("RESOURCE_EXHAUSTED", "out of memory")):
            raise
        row["refusal"] = "out of memory"
    if "seconds" in row and device.device_kind in PEAKS:
        bandwidth, speed = PEAKS[device.device_kind]
        row["bound_seconds"] = max(full.bytes / bandwidth, full.flops / speed)
        row["of_bound"] = row["bound_seconds"] / row["seconds"]
    return row


def _error(case: Case, form: str) -> float:
    """The largest `difference` from the reference among the outputs."""
    inputs = jax.jit(case.inputs)()
    ours, theirs = (_program(case, name, inputs)() for name in (form, "reference"))
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(difference(_array(ours, form), np.asarray(theirs)) for ours, theirs in pairs)


def _array(result: Any, form: str) -> np.ndarray:
    if form != "torch":
        return np.asarray(result)
    from benchmarks import torch_cases

    return torch_cases.array(result)


def _has_torch() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _program(case: Case, form: str, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """A function that queues the case's work once and returns its future result.

    Raises:
      NotImplementedError: the implementation does not support the case, or does not exist.
    """
    if form != "torch":
        program = jax.jit(lambda *args: case.run(*args, impl=form)).lower(*inputs).compile()
        return lambda: program(*inputs)
    from benchmarks import torch_cases

    run = torch_cases.form(case)
    if run is None:
        raise NotImplementedError("not compared with torch")
    tensors = torch_cases.tensors(inputs)
    return lambda: run(*tensors)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the largest value of `theirs`; of indices, the share that differs."""
    if np.issubdtype(theirs.dtype, np.integer):
        # Scores that differ in the last bit may swap at the end of the top k.
        return float(np.mean([len(set(a) ^ set(b)) / a.size for a, b in _lines(ours, theirs)]))
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-30))


def _lines(ours: np.ndarray, theirs: np.ndarray) -> Any:
    flat = lambda x: x.reshape(-1, x.shape[-1])
    return zip(flat(ours), flat(theirs), strict=True)


def _seconds(case: Case, form: str, calls: int = 20) -> float:
    """Seconds per call when calls are queued back to back: the median of five such queues."""
    program = _program(case, form, jax.jit(case.inputs)())
    wait = _wait(form)
    result = program()
    wait(result)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = program()
        wait(result)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def _wait(form: str) -> Callable[[Any], Any]:
    if form != "torch":
        return jax.block_until_ready
    import torch

    return lambda _: torch.cuda.synchronize()


def _print(row: dict[str, Any]) -> None:
    head = f"{row['op']:28} {row['case']:44} {row['form']:5}"
    if "refusal" in row:
        print(f"{head} {row['refusal']}")
    elif not row["agrees"]:
        print(f"{head} DIFFERS from the reference by {row['error']:.1e}")
    else:
        share = f"  {row['of_bound']:.0%} of the bound" if "of_bound" in row else ""
        print(f"{head} {row['seconds'] * 1e6:10.1f} us{share}  (error {row['error']:.1e})")


def _write(rows: list[dict[str, Any]], device: Any, output: Path) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    head = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "jax": jax.__version__,
        "device": device.device_kind,
    }
    output.mkdir(parents=True, exist_ok=True)
    with (output / "kernels.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(head | row) + "\n" for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
