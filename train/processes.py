"""Coordination of the processes of a run."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from v4jax import cluster
from v4jax.checkpoints.hosts import all_processes
from v4jax.cluster import Place
from v4jax.commands import command_line
from v4jax.rendezvous import Ended, Peers

STALLED = 124  # exit status of a process that makes no progress, as of timeout(1)
_AGAIN = "'v4jax-train resume' continues from the last saved state."
# The other processes of this process's run; like `jax.distributed`, there is one per process.
_peers: Peers | None = None


def join(place: Place | None, timeout: float) -> None:
    """Join the other processes, see `cluster.join`; if one of them ends early, this one ends."""
    global _peers
    _peers = cluster.join(place, timeout)
    if _peers is not None:
        _peers.watch(_end_too)


def leave() -> None:
    """Tell the other processes that this one ends as it should."""
    if _peers is not None:
        _peers.leave()


def end_stalled(what: str) -> None:
    """End this process, and so all, for lack of progress; first write all threads' stacks."""
    host = f" on {socket.gethostname()}" if _peers is not None else ""
    command_line.say(f"v4jax-train: {what} in process {jax.process_index()}{host}:")
    _write_stacks()
    command_line.say(f"v4jax-train: ended for lack of progress; {_AGAIN}")
    if _peers is not None:
        _peers.stalled()
    os._exit(STALLED)


def _end_too(ended: Ended) -> None:
    name = f"process {ended.process} on {ended.host}"
    if ended.stalled:
        end_stalled(f"{name} makes no progress; this is where its peers are: no progress")
    command_line.say(f"v4jax-train: {name} has ended, so this process ends too; {_AGAIN}")
    os._exit(1)


def _write_stacks() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)  # pyright: ignore


def together(act: Callable[[], Any]) -> None:
    """Call a function on every process; if it fails on one, all fail.

    Raises:
      Exception: this process's error, or a CheckpointError that another process failed.
    """
    with all_processes().together():
        act()


def first(act: Callable[[], Any]) -> None:
    """Call a function on the first process only; see `together`."""
    all_processes().first(act)


def all_agree(holds: bool) -> bool:
    """Whether something holds on all processes."""
    return bool(np.all(gather(np.int32(holds))))


def gather(array: Any) -> np.ndarray:
    """The arrays of all processes, stacked."""
    if jax.process_count() == 1:
        return np.asarray(array)[None]
    return np.asarray(multihost_utils.process_allgather(array))


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


class Signal:
    """Remembers SIGTERM, so that a run can be saved before it ends."""

    def __enter__(self) -> "Signal":
        self._received = False
        self._old = None
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._remember)
        return self

    def _remember(self, *_: Any) -> None:
        self._received = True

    def arrived(self, done: int) -> bool:
        """Whether any process has received the signal."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(done)
        return self._received

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
