"""What the processes of a run do together."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
