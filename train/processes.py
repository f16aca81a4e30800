"""Coordination of the processes of a run."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache


def together(act: Callable[[], Any]) -> None:
    """Call a function on every process; if it fails on one, all fail.

    Raises:
      OSError, ValueError: this process's error, or that another process failed.
    """
    error: Exception | None = None
    try:
        act()
    except (OSError, ValueError) as caught:
        error = caught
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.int32(failed))))
    if error is not None:
        raise error
    if failed:
        raise ValueError("the run ends because of an error that another process reports.")


def first(act: Callable[[], Any]) -> None:
    """Call a function on the first process only; see `together`."""
    together(act if jax.process_index() == 0 else lambda: None)


def of_first(number: int) -> int:
    """Broadcast a number from the first process to all."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def keep_no_programs() -> None:
    """Disable JAX's compilation cache if several processes on CPUs would share it.

    Only the first process writes to the cache, under a key that the others do not have, so that it
    would run a cached program and they newly compiled ones. On disk XLA's CPU programs lose the
    order of collectives in loops and branches relative to the others: each process would wait for a
    different collective than its peers, and all would die.
    """
    config: Any = jax.config
    used = config.jax_enable_compilation_cache and config.jax_compilation_cache_dir
    if not used or jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return
    if jax.process_index() == 0:
        warnings.warn(
            f"JAX's compilation cache, {config.jax_compilation_cache_dir}, is not used: several"
            " processes on CPUs cannot run programs from it. They compile again.",
            stacklevel=2,
        )
    config.update("jax_enable_compilation_cache", False)
    # JAX may already have opened the cache.
    compilation_cache.reset_cache()
