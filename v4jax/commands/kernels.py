"""`v4jax inspect --kernels`: the form in which each operation would run on a chip."""

import collections
import os

from rich.console import Console
from rich.table import Table

import pallas_kernels
from pallas_kernels import targets
from v4jax import aot, waiting
from v4jax.model import cache, sharding
from v4jax.model.config import ModelConfig

_CAPACITY, _TOKENS = 65536, 512
_EXTRAS = {"h200": "gpu"}  # the extra with the compiler of a target; 'tpu' for all others


def show(cfg: ModelConfig, target: targets.Target) -> None:
    """Lower a decode step and a prefill chunk for a chip, and print the forms of their operations.

    Args:
      cfg: configuration of the model, of any size, as its weights are abstract.
      target: name of the chip.

    Raises:
      ValueError: the compiler for this chip is not installed.
    """
    # libtpu would look for a TPU's metadata on the network.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        device = targets.devices(target)[:1]
    except (RuntimeError, ValueError) as error:
        extra = _EXTRAS.get(target, "tpu")
        raise ValueError(
            f"no compiler for {target} is installed ({error}); run pip install 'v4jax[{extra}]'."
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
        f"Batch size 1, a prefill chunk of {_TOKENS} tokens, a cache of {capacity:,} tokens, on one"
        f" {target}. Scanned layers count once."
    )
    console.print(table)
