"""Prints the bytes that a plan predicts for a decode step on a CPU, and those that it takes.

python -m tests.planned_memory
"""

import dataclasses
import gc
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from v4jax import aot, presets
from v4jax.model import sharding
from v4jax.pods import chips
from v4jax.pods import plan as plans
from v4jax.pods.serving import Serving


def status(name: str) -> int:
    """A size of this process in bytes, as Linux reports it."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


def main() -> None:
    """Plan a step, compile it, then run it with weights and a cache of ones."""
    cfg, devices = presets.get("bench"), jax.devices()
    cfg = dataclasses.replace(cfg, layers=cfg.layers[:4])
    sizes: dict[str, Any] = {"context": 65536, "batch": 8}
    job = Serving(cfg=cfg, name="decode", cache_dtype=None, **sizes)
    where, mesh = chips.of_devices(devices), {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    quiet = lambda *_: None
    plan = plans.make("bench", job, where, devices, mesh, progress=quiet)
    placed = sharding.make_mesh(devices=devices)
    step = job.lower(placed).compile()
    structs = aot.arguments(cfg, "advance", placed, batch=8, capacity=65536)
    places = jax.tree.map(lambda x: x.sharding, structs)
    # Ones, so that every row takes part in one step.
    ones = lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), structs)
    fill = jax.jit(ones, out_shardings=places).lower().compile()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    jax.block_until_ready(step(*fill()))
    print(plan.total, status("VmHWM") - before)


if __name__ == "__main__":
    main()
