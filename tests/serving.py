"""A server for tests: an engine that answers by a script, behind real HTTP."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import openai
import uvicorn

from v4jax.checkpoints import hub
from v4jax.engine.grammar import Grammars
from v4jax.engine.request import Event, QueueFull, Request, Token, Usage
from v4jax.text.tokenizer import Tokenizer
from v4jax_serve import app
from v4jax_serve.operations import Server
from v4jax_serve.service import Limits, Service

CONTEXT = 4096
# What follows a prompt: a text, or token ids.
Script = Callable[[str], str | Sequence[int]]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.TINY)


@functools.cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), tokenizer().vocab_size, (1,))


@dataclasses.dataclass
class Stats:
    running: int
    waiting: int


class _Ticket:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Continues each prompt by a script, at a token per `delay` seconds and a step of tokens.

    It ends at stop tokens, by the request's watcher, its limit or its cancellation, as an engine
    does. If the script breaks the request's constraint, it ends with an error, or if `obeys` is set
    continues with the lowest token that is allowed. Prefixes of 128 tokens that it has seen are
    counted as cached.
    """

    def __init__(self, script: Script) -> None:
        self.ready = True
        self._running = 0
        self.requests: list[Request] = []
        self.finished: list[str] = []
        self.reset()
        self.script = script

    def reset(self) -> None:
        """Forget all that a test has set or seen."""
        self.script: Script = lambda _: ""
        self.delay, self.first_delay, self.step, self.max_running = 0.0, 0.0, 1, 64
        self.fault, self.obeys = "", False
        self.requests.clear()
        self.finished.clear()
        self._prefixes: set[tuple[Any, ...]] = set()

    @property
    def idle(self) -> bool:
        """Whether no request runs."""
        return not self._running

    def stats(self) -> Stats:
        return Stats(self._running, 0)

    def submit(self, request: Request, notify: Callable[[Event], object]) -> _Ticket:
        if self._running >= self.max_running:
            raise QueueFull("Too many requests are waiting.")
        if len(request.tokens) > CONTEXT:
            raise ValueError("The prompt is too long.")
        self.requests.append(request)
        self._running += 1
        ticket = _Ticket()
        threading.Thread(target=self._run, args=(request, notify, ticket), daemon=True).start()
        return ticket

    def _run(self, request: Request, notify: Callable[[Event], object], ticket: _Ticket) -> None:
        usage = Usage(len(request.tokens), self._cached(request))
        began = time.monotonic()
        ticket.cancelled.wait(self.first_delay)
        prompt = self._prompt(request) if request.prompt_logprobs else ()
        finish, pending = None, []
        for token, finish in self._tokens(request):
            pending.append(token)
            usage.completion_tokens += 1
            if finish or len(pending) == self.step:
                ticket.cancelled.wait(self.delay)
                if ticket.cancelled.is_set():
                    finish = "abort"
                if finish:
                    break
                usage.seconds = time.monotonic() - began
                usage.first_token_seconds = usage.first_token_seconds or usage.seconds
                notify(Event(tuple(pending), None, dataclasses.replace(usage), prompt))
                pending, prompt = [], ()
        finish = self.fault or finish or "length"
        self._running -= 1
        self.finished.append(finish)
        usage.seconds = time.monotonic() - began
        expert_TLA = None
        if request.routed_experts:
            read = usage.prompt_tokens + usage.completion_tokens - 1
            expert_TLA = np.arange(read * 2 * 3, dtype=np.int16).reshape(read, 2, 3)
        notify(Event(tuple(pending), finish, usage, prompt, expert_TLA))  # pyright: ignore[reportArgumentType]

    def _cached(self, request: Request) -> int:
        blocks = [tuple(request.tokens[:end]) for end in range(128, len(request.tokens), 128)]
        keys = [(request.salt, request.adapter, block) for block in blocks]
        cached = max((len(key[2]) for key in keys if key in self._prefixes), default=0)
        self._prefixes.update(keys)
        return cached

    def _prompt(self, request: Request) -> tuple[Token, ...]:
        first, *rest = request.tokens
        return (Token(first, float("nan")), *(_token(i, request.top_logprobs) for i in rest))

    def _tokens(self, request: Request) -> Iterator[tuple[Token, str | None]]:
        watcher = request.watcher() if request.watcher else None
        constraint = request.constraint() if request.constraint else None
        answer = self.script(tokenizer().decode(request.tokens))
        ids = tokenizer().encode(answer) if isinstance(answer, str) else answer
        ids = [*ids, *request.stop_tokens[:1]]
        for count in range(1, request.max_tokens + 1):
            token = ids[min(count, len(ids)) - 1]
            if constraint:
                mask = constraint.mask()
                if mask is not None and not mask[token // 32] >> (token % 32) & 1:
                    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
                    if not self.obeys or not len(allowed):
                        yield _token(token, 0), "error"
                        return
                    token = int(allowed[0])
                constraint.push(token)
            stopped = token in request.stop_tokens or bool(watcher and watcher.push(token))
            finish = "stop" if stopped else "length" if count == request.max_tokens else None
            yield _token(token, request.top_logprobs), finish
            if finish:
                return


def _token(token: int, top: int) -> Token:
    return Token(token, -0.5, tuple((token + n, -0.5 - n) for n in range(top)))


def service(engine: Any, **changes: Any) -> Service:
    settings: dict[str, Any] = {
        "engine": engine,
        "tokenizer": tokenizer(),
        "grammars": grammars(),
        "vocab_size": tokenizer().vocab_size,
        "names": ("tiny",),
        "limits": Limits(context=CONTEXT, keep_alive=0.2),
    }
    return Service(**(settings | changes))


@dataclasses.dataclass
class Running:
    """A server that runs: its address, its engine (the real one in few tests), and itself."""

    url: str
    engine: Any
    service: Service
    server: Server


@contextlib.contextmanager
def serve(script: Script, *, drain_seconds: float = 5.0, **changes: Any) -> Iterator[Running]:
    """Run a server on a free port, in a thread; `changes` are fields of its service."""
    shared = service(**{"engine": ScriptedEngine(script)} | changes)
    config = uvicorn.Config(
        app.create(shared),
        port=0,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = Server(config, shared, drain_seconds)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", shared.engine, shared, server)
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def openai_client(server: Running) -> Iterator[Any]:
    """OpenAI's client of a server whose engine has forgotten all earlier requests."""
    server.engine.reset()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
