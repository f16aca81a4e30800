"""A watchdog: notices that a run makes no progress."""

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

_REMEMBERED = 50  # recent steps, whose median is the usual time
_CHECKS = 20  # how often a limit's time is looked at


class Watchdog:
    """Calls a function, in a thread of its own, if no step ends within the usual time.

    Time that the whole process is suspended does not count.
    """

    def __init__(self, factor: float, least: float, stalled: Callable[[str], None]) -> None:
        """Start to watch on entering the context.

        Args:
          factor: how many times the median of recent steps a step may take; 0: any time.
          least: seconds that a step may always take, also before the first has ended.
          stalled: called with what happened.
        """
        self._factor, self._least, self._stalled = factor, least, stalled
        self._seconds: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._idle = 0.0
        self._paused = False
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._factor:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def step(self, seconds: float) -> None:
        """Note that a step has ended, and how long it took."""
        self._seconds.append(seconds)
        self._idle = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the context."""
        self._paused = True
        try:
            yield
        finally:
            self._idle, self._paused = 0.0, False

    @property
    def limit(self) -> float:
        """Seconds within which a step must end."""
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self._least, self._factor * usual)

    def _watch(self) -> None:
        while True:
            limit = self.limit
            period, began = limit / _CHECKS, time.monotonic()
            if self._over.wait(period):
                return
            if not self._paused:
                self._idle += min(time.monotonic() - began, 2 * period)
            if self._idle > limit:
                self._stalled(f"no step has ended for {self._idle:.0f} s")
                return
