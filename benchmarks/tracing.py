"""Tracing cost of our kernel dispatch against `jax.lax.platform_dependent`.

    python -m benchmarks.tracing [--presets tiny flash] [--output benchmarks/results]

CPU seconds to trace and lower a step for this machine's CPU, alternating sides, minimum of three.
`platform_dependent` traces the kernels of all platforms, our primitive only those of the target.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from benchmarks.compare import append
from pallas_kernels import implementations
from v4jax import aot, presets
from v4jax.model import sharding

TURNS = 3


def by_platform_dependent(
    name: str, default: Callable[..., Any], kernels: Mapping[str, Any], args: tuple[Any, ...]
) -> Any:
    """Like `implementations._by_target`, but tracing every implementation."""
    del name
    return jax.lax.platform_dependent(*args, default=default, **kernels)


SIDES = {"primitive": implementations._by_target, "platform_dependent": by_platform_dependent}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "flash"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = [
        {"preset": preset, "step": step, "experts": experts, **_measure(preset, step, experts)}
        for preset in args.presets
        for step in ("decode", "prefill")
        for experts in (None, "fp4")
    ]
    for row in rows:
        ratio = row["platform_dependent"] / row["primitive"]
        print(
            f"{row['preset']:6} {row['step']:8} {row['experts'] or 'dense':6}"
            f" {row['primitive']:6.2f} s {row['platform_dependent']:6.2f} s {ratio:5.2f}"
        )
    append(rows, args.output / "tracing.jsonl")


def _measure(preset: str, step: Any, experts: Any) -> dict[str, float]:
    """Minimum CPU seconds of each side."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(TURNS):
        for side, choose in SIDES.items():
            with mock.patch.object(implementations, "_by_target", choose):
                seconds[side].append(_lower_seconds(preset, step, experts))
    return {side: round(min(times), 2) for side, times in seconds.items()}


def _lower_seconds(preset: str, step: Any, experts: Any) -> float:
    jax.clear_caches()
    mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
    start = time.process_time()
    aot.lower(presets.get(preset), step, mesh, batch=1, capacity=1024, expert_format=experts)
    return time.process_time() - start


if __name__ == "__main__":
    main()
