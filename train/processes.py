"""What the processes of a run do together."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache


def together(act: Callable[[], Any]) -> None:
    """Do something on every process; where it fails on one, all fail.

    Raises:
      OSError, ValueError: as on this process, or that another one failed.
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
        raise ValueError("another process says why the run ends here.")


def first(act: Callable[[], Any]) -> None:
    """Do something on the first process only; see `together`."""
    together(act if jax.process_index() == 0 else lambda: None)


def of_first(number: int) -> int:
    """The first process's number, on all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def keep_no_programs() -> None:
    """Compile anew where several processes on CPUs would share JAX's compilation cache.

    There only the first process writes to the cache, under a key that the others do not have, so
    that it runs what was kept and they what they compile. XLA's programs for CPUs lose on disk the
    order of collectives in loops and branches among the others: each process waits for another
    collective than its peers, and all die.
    """
    config: Any = jax.config
    used = config.jax_enable_compilation_cache and config.jax_compilation_cache_dir
    if not used or jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return
    if jax.process_index() == 0:
        warnings.warn(
            f"JAX's compilation cache, {config.jax_compilation_cache_dir}, is not used: several"
            " processes on CPUs cannot run programs from it. They are compiled anew.",
            stacklevel=2,
        )
    config.update("jax_enable_compilation_cache", False)
    # JAX may have looked already whether there is one.
    compilation_cache.reset_cache()
