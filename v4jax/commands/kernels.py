"""`v4jax inspect --kernels`: which form of each operation a chip would run."""

import collections
import os
from typing import get_args

from rich.console import Console
from rich.table import Table

import pallas_kernels
from pallas_kernels import targets
from v4jax import aot, waiting
from v4jax.model import cache, sharding
from v4jax.model.config import ModelConfig

TARGETS = get_args(targets.Target)
_CAPACITY, _TOKENS = 65536, 512
_INSTALL = {"h200": "gpu"}  # the extra that has a target's compiler; 'tpu' for all others


def show(cfg: ModelConfig, target: targets.Target) -> None:
    """Lower a decode step and a prefill chunk for one chip, and print the forms they take.

    Args:
      cfg: the model; its weights are abstract, so that any model fits.
      target: the chip.

    Raises:
      ValueError: the compiler for this chip is not installed.
    """
    # libtpu would look for a TPU's metadata on the network.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        device = targets.devices(target)[:1]
    except (RuntimeError, ValueError) as error:
        extra = _INSTALL.get(target, "tpu")
        raise ValueError(
            f"no compiler for {target} here ({error}); install one with"
            f" pip install 'v4jax[{extra}]'."
        ) from error
    mesh = sharding.make_mesh(tensor=1, devices=device)
    capacity = cache.bucket(_CAPACITY, cfg.max_position_embeddings)
    table = Table("step", "operation", "form", "calls", "why not a kernel", box=None)
    for step in ("decode", "prefill"):
        pallas_kernels.clear_choices()
        with waiting.progress() as progress:
            progress(f"Lowering {step} for {target}", 0, 0)
            aot.lower(
                *(cfg, step, mesh),
                batch=1,
                capacity=capacity,
                tokens=_TOKENS,
                expert_format=cfg.expert_dtype,
            )
        calls: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for choice, count in pallas_kernels.choices().items():
            calls[choice.operation, choice.form, choice.reason] += count
        for (operation, form, reason), count in calls.items():
            table.add_row(step, operation, form, str(count), reason)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"One row, {_TOKENS} tokens of a prompt, room for {capacity:,} tokens, on one {target}."
        " Layers that are scanned count once."
    )
    console.print(table)
