"""What a person sees who waits: one line on a terminal, or below a notebook's cell.

Everywhere else, as in files and pipes, nothing is written.
"""

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from v4jax.checkpoints.disk import Progress

_EVERY = 0.5  # seconds between two refreshes
_COMPILED = "/jax/core/compile/backend_compile_duration"
_COMPILES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


class Task(NamedTuple):
    """What is being done.

    Attributes:
      what: its name.
      began: when, by `time.monotonic`.
      done, total: how much of how much; a total of 0 is unknown.
    """

    what: str
    began: float
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        """The task with its elapsed time, or its share done and the remaining time."""
        elapsed = time.monotonic() - self.began
        if not self.total:
            return f"{self.what} ... {_clock(elapsed)}"
        share = self.done / self.total
        left = f", {_clock(elapsed / share - elapsed)} left" if share else ""
        return f"{self.what} {share:.0%}{left}"


class _Line:
    """A line that a thread rewrites while a task lasts."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self.task: Task | None = None

    def start(self, what: str | None) -> None:
        """Begin a task, unless it is the present one; None: nothing is being done."""
        if what == (self.task and self.task.what):
            return
        self.task = Task(what, time.monotonic()) if what else None
        if not self._thread.is_alive():
            self._thread.start()

    def report(self, what: str, done: int, total: int) -> None:
        """Progress: begin a task, or say how much of it is done."""
        self.start(what)
        assert self.task is not None
        self.task = self.task._replace(done=done, total=total)

    def _refresh(self) -> None:
        while not self._ended.wait(_EVERY):
            self._write(str(self.task or ""))

    def end(self) -> None:
        """Remove the line."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._write("")


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Shows what the callback is told: a task, how much of it is done, and of how much."""
    with _line() as line:
        yield line.report if line else lambda *_: None


@contextlib.contextmanager
def compilation(otherwise: str | None = None) -> Iterator[None]:
    """Shows that programs are being compiled, and for how long.

    Args:
      otherwise: what is shown before and after a compilation.
    """
    with _line() as line:
        if line is None:
            yield
            return

        def listen(event: str, _: float, **__: object) -> None:
            if event in (_COMPILED, *_COMPILES):
                line.start(otherwise if event == _COMPILED else "Compiling")

        line.start(otherwise)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def _line() -> Iterator[_Line | None]:
    write = _notebook() or _terminal()
    if write is None:
        yield None
        return
    line = _Line(write)
    try:
        yield line
    finally:
        line.end()


def _terminal() -> Callable[[str], None] | None:
    """Writes behind the cursor, which stays where it is: the text of an answer may end there."""
    if not sys.stderr.isatty():
        return None

    def write(text: str) -> None:
        sys.stderr.write(f"\x1b7{text}\x1b[K\x1b8")
        sys.stderr.flush()

    return write


def _notebook() -> Callable[[str], None] | None:
    """Writes below the cell that runs."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    show, handle = sys.modules["IPython.display"], None

    def write(text: str) -> None:
        nonlocal handle
        if handle is None:
            handle = show.display(show.Pretty(text), display_id=True)
        else:
            handle.update(show.Pretty(text))

    return write


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
