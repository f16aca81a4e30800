"""The engine: many requests on one device, each answered as if it were alone.

A thread of its own runs step after step. Requests are submitted on any thread; their events are
reported on the engine's.
"""

import asyncio
import collections
import dataclasses
import faulthandler
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import jax
import jax.monitoring

from v4jax import waiting
from v4jax.arguments import shown
from v4jax.decoding.loaded import Loaded
from v4jax.engine import settings
from v4jax.engine.build import build
from v4jax.engine.core import Counters
from v4jax.engine.request import Event, QueueFull, Request
from v4jax.engine.sequence import IDLE, Sequence
from v4jax.engine.settings import Settings
from v4jax.model.cache import BLOCK

_log = logging.getLogger("v4jax.engine")
# Seconds without a request before answers are sealed.
_PAUSE_SECONDS = 0.03


@dataclasses.dataclass
class Stats(Counters):
    """An engine's counts since its start, and what it holds now.

    Attributes:
      running, waiting: requests with and without a row.
      pages, pages_used: pages, and those with an owner; `page_usage` is their ratio.
      pages_cached: pages that only prefixes own.
      snapshots: ends of prefixes on the device.
      cache_bytes, ram_bytes, disk_bytes: bytes of the cache, and of prefixes in RAM and on disk.
      preemptions: rows that made way for others.
      recompilations: programs compiled after the start.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    page_usage: float = 0.0
    pages_cached: int = 0
    snapshots: int = 0
    cache_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    preemptions: int = 0
    recompilations: int = 0


@dataclasses.dataclass(frozen=True)
class Ticket:
    """A submitted request."""

    sequence: Sequence
    wake: Callable[[], None]

    def cancel(self) -> None:
        """End the request with 'abort' at the next step; does nothing once it has ended."""
        self.sequence.cancelled = True
        self.wake()


class Engine:
    """Many requests on one loaded model.

    Use it as a context manager, or call `close`. `ready` tells whether requests are answered.
    """

    def __init__(
        self,
        model: Loaded,
        *,
        adapters: Mapping[str, Loaded] | None = None,
        speculate: str | None = None,
        progress: waiting.Progress | None = None,
        **sizes: Any,
    ) -> None:
        """Allocate the cache and compile all programs.

        Args:
          model: a model that `v4jax.load` returned, on one device or on a mesh.
          adapters: the same model with adapters (`with_adapter`), by name.
          speculate: 'mtp:2' drafts two tokens with the MTP block; None drafts nothing.
          progress: as for `v4jax.load`.
          sizes: fields of `Settings`.

        Raises:
          ValueError: a setting is out of range, or the model does not allow it.
        """
        drafts = settings.drafts_of(speculate, model)
        self.settings = settings.check(Settings(**sizes, drafts=drafts), model)
        if sizes.get("snapshots", 1) and not self.settings.snapshots:
            _log.warning("No prefix is reused: a compression ratio does not divide %d.", BLOCK)
        self._models = dict[str | None, Loaded]({None: model}) | dict(adapters or {})
        self._core = build(self._models, self.settings)
        self._inbox: collections.deque[Sequence] = collections.deque()
        self._condition, self._closed = threading.Condition(), threading.Event()
        self._closing, self._error, self._began = False, None, 0.0
        self._compiled = 0
        self._warm_up(progress)
        jax.monitoring.register_event_duration_secs_listener(self._note_compilation)
        self._thread = threading.Thread(target=self._loop, name="v4jax-engine", daemon=True)
        self._thread.start()
        self._watchdog = threading.Thread(target=self._watch, name="v4jax-watchdog", daemon=True)
        self._watchdog.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        """Whether steps run: nothing has failed, and none takes too long."""
        return not self._closing and self._error is None and not self._hangs()

    def submit(self, request: Request, notify: Callable[[Event], object]) -> Ticket:
        """Queue a request.

        Args:
          request: the request.
          notify: called on the engine's thread with each event; it must not block.

        Raises:
          ValueError: the request can never run.
          QueueFull: too many requests wait.
          RuntimeError: the engine is closed or has failed.
        """
        if self._closing or self._error is not None:
            raise RuntimeError(f"The engine does not run any more: {self._error or 'closed'}.")
        self._check(request)
        if len(self._inbox) + len(self._core.scheduler.waiting) >= self.settings.queue:
            raise QueueFull(f"{self.settings.queue} requests are waiting; try again later.")
        sequence = self._core.sequence(request, notify)
        with self._condition:
            self._inbox.append(sequence)
            self._condition.notify()
        return Ticket(sequence, self._wake)

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """The events of a request; closing the generator cancels it.

        Raises:
          ValueError, QueueFull, RuntimeError: as for `submit`.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ticket = self.submit(request, lambda e: loop.call_soon_threadsafe(events.put_nowait, e))
        try:
            while True:
                event = await events.get()
                yield event
                if event.finish:
                    return
        finally:
            ticket.cancel()

    def stats(self) -> Stats:
        """Counts since the start, and what the engine holds now."""
        core, memory = self._core, self._core.memory
        return Stats(
            **dataclasses.asdict(core.counters),
            **memory.usage(),
            running=len(core.scheduler.running),
            waiting=len(core.scheduler.waiting) + len(self._inbox),
            cache_bytes=core.device.nbytes,
            preemptions=core.scheduler.preemptions,
            recompilations=self._compiled,
        )

    def close(self) -> None:
        """End all requests, and keep their prefixes if there is a directory for them."""
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify()
        self._closed.set()
        self._thread.join()
        self._watchdog.join()
        jax.monitoring.unregister_event_duration_listener(self._note_compilation)

    def _check(self, request: Request) -> None:
        """Refuse what can never run."""
        cfg, context = self._models[None].config, self.settings.context
        if not request.tokens:
            raise ValueError("The prompt is empty; pass at least one token.")
        wrong = [token for token in request.tokens if not 0 <= token < cfg.vocab_size]
        if wrong:
            raise ValueError(
                f"Token {shown(wrong[0])} is outside the vocabulary of {cfg.vocab_size}."
            )
        if len(request.tokens) + request.max_tokens > context:
            raise ValueError(
                f"The prompt has {len(request.tokens)} tokens and the answer up to "
                f"{request.max_tokens}; together they may have {context}, the engine's context."
            )
        if request.priority >= IDLE:
            raise ValueError(f"priority is {request.priority}; it must be below {IDLE}.")
        if request.adapter not in self._models:
            known = ", ".join(str(name) for name in self._models if name) or "none"
            raise ValueError(f"There is no adapter {shown(request.adapter)}; loaded are: {known}.")
        if request.routed_experts and not self.settings.routed_experts:
            raise ValueError(
                "The chosen experts are reported by an engine with routed_experts=True only "
                "(v4jax-serve --return-routed-experts)."
            )
        alternatives = request.top_logprobs, self.settings.top
        limits = {
            "stop_tokens": (len(request.stop_tokens), self._core.device.shape.stops),
            "top_logprobs": alternatives,
        }
        for name, (count, most) in limits.items():
            if count > most:
                raise ValueError(f"{name}: {count} is more than {most}, the most that is allowed.")

    def _warm_up(self, progress: waiting.Progress | None) -> None:
        """Compile every program, or read it from where programs are kept."""
        with waiting.progress(progress) as report:
            parts = self._core.device.programs()
            for i, (name, compile_it) in enumerate(parts):
                report(f"Compiling {name}", i, len(parts))
                compile_it()
            report("Compiling", len(parts), len(parts))

    def _note_compilation(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        is_mine = threading.current_thread() is self._thread
        if is_mine and event == "/jax/core/compile/backend_compile_duration":
            self._compiled += 1
            _log.warning("A program was compiled after the start: %s", kwargs.get("fun_name"))

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def _loop(self) -> None:
        """Step after step until the engine is closed or a step fails."""
        while self._wait():
            while self._inbox:
                self._core.add(self._inbox.popleft())
            self._began = time.monotonic()
            try:
                self._core.step()
            except Exception as error:
                _log.exception("A step failed; the engine stops.")
                self._error = error
                break
            self._began = 0.0
        self._end_all()
        if self._error is None:
            self._core.memory.close()

    def _wait(self) -> bool:
        """Wait for work; False once the engine is closed."""
        with self._condition:
            arrived = lambda: self._inbox or self._closing
            if not self._core.answering:
                # A client often goes on at once, and would wait for the answer to be sealed.
                self._condition.wait_for(arrived, _PAUSE_SECONDS)
            self._condition.wait_for(lambda: arrived() or self._core.busy)
            return not self._closing

    def _end_all(self) -> None:
        """End all requests."""
        core = self._core
        while self._inbox:
            core.add(self._inbox.popleft())
        for sequence in [*core.scheduler.waiting, *core.scheduler.running]:
            core.end(sequence, "error" if self._error else "abort")

    def _hangs(self) -> bool:
        began = self._began
        return bool(began) and time.monotonic() - began > self.settings.hang_seconds

    def _watch(self) -> None:
        """Dump all threads' stacks once if a step hangs."""
        dumped = False
        while not self._closing:
            if not dumped and self._hangs():
                _log.error("A step has taken more than %s seconds.", self.settings.hang_seconds)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                dumped = True
            self._closed.wait(min(1.0, self.settings.hang_seconds / 4))
