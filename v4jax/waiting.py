"""Progress for users who wait: one line on a terminal or below a notebook cell.

Nothing is written to files and pipes.
"""

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

# Called with the name of a task, the amount done and the total.
Progress = Callable[[str, int, int], None]

_EVERY = 0.5  # seconds between refreshes
_COMPILED = "/jax/core/compile/backend_compile_duration"
_COMPILES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


class Task(NamedTuple):
    """A task in progress.

    Attributes:
      what: name of the task.
      began: start by `time.monotonic`.
      done, total: amount done and total amount; a total of 0 means unknown.
    """

    what: str
    began: float
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        """The task with its elapsed time, or with the fraction done and the remaining time."""
        elapsed = time.monotonic() - self.began
        if not self.total:
            return f"{self.what} ... {_clock(elapsed)}"
        fraction = self.done / self.total
        left = f", {_clock(elapsed / fraction - elapsed)} left" if fraction else ""
        return f"{self.what} {fraction:.0%}{left}"


class _Line:
    """A line that a thread refreshes while a task runs."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self.task: Task | None = None

    def start(self, what: str | None) -> None:
        """Start a task unless it is already running; None stops the present one."""
        if what == (self.task and self.task.what):
            return
        self.task = Task(what, time.monotonic()) if what else None
        if not self._thread.is_alive():
            self._thread.start()

    def report(self, what: str, done: int, total: int) -> None:
        """Start a task, or update how much of it is done."""
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
def progress(callback: Progress | None = None) -> Iterator[Progress]:
    """The caller's callback or, by default, one that shows what is passed to it."""
    if callback is not None:
        yield callback
        return
    with _line() as line:
        yield line.report if line else lambda *_: None


@contextlib.contextmanager
def compilation(otherwise: str | None = None) -> Iterator[None]:
    """Shows while programs are being compiled, and for how long.

    Args:
      otherwise: the task to show before and after a compilation.
    """
    with _line() as line:
        if line is None:
            yield
            return

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
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
    """A writer after the cursor, which does not move: the text of an answer may end there."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None

    def write(text: str) -> None:
        sys.stderr.write(f"\x1b7{text}\x1b[K\x1b8")
        sys.stderr.flush()

    return write


def _notebook() -> Callable[[str], None] | None:
    """A writer below the running cell."""
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
