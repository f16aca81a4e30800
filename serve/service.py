"""What all requests share: the engine, the tokenizer, names, limits, metrics and the drain."""

import contextvars
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

from v4jax.engine.grammar import Grammars
from v4jax.engine.request import Event, Request, Usage
from v4jax.text.tokenizer import Tokenizer

from .errors import ApiError, ContextExceeded
from .metrics import Metrics
from .replays import Replays

# Names that clients of the hosted models send; they mean the base model.
HOSTED = ("deepseek-", "claude-")
RETRY_SECONDS = 2
# Fields of the present request's log line.
record: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("record")


def note(**fields: Any) -> None:
    """Add fields to the present request's log line."""
    record.get({}).update(fields)


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """End the request with the finish 'abort'; does nothing once it has ended."""


class Engine(Protocol):
    """What the server needs of an engine."""

    @property
    def ready(self) -> bool:
        """Whether it runs: all is compiled, and no step hangs."""
        ...

    def submit(self, request: Request, notify: Callable[[Event], object]) -> Ticket:
        """Queue a request; its events are reported on the engine's thread.

        Raises:
          QueueFull: too many requests wait.
          ValueError: the request can never run.
        """
        ...

    def stats(self) -> Any:
        """Counts for the metrics, as a dataclass of numbers."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests.

    Attributes:
      context: most tokens of a prompt and its answer together.
      body_bytes: size of a request's body.
      seconds: time from submission to the end of an answer.
      keep_alive: seconds of silence after which a waiting client gets a sign of life.
    """

    context: int
    body_bytes: int = 32 * 2**20
    seconds: float = 3600
    keep_alive: float = 5


@dataclasses.dataclass(kw_only=True)
class Service:
    """The state of a server.

    Attributes:
      engine: runs the requests.
      tokenizer: the checkpoint's tokenizer.
      grammars: compiles what answers may be.
      names: served names of the base model, at least one; the first is in metrics.
      limits: limits of requests.
      adapters: names of the engine's adapters, which are model names as well.
      revision: the checkpoint's chat encoder, a key of `v4jax.text.chat.EFFORTS`.
      eos_ids: tokens that end an answer.
      vocab_size: number of token ids that the model knows.
      fingerprint: identifies the model and the software in answers.
      strict: refuse and ignore what DeepSeek's hosted API does.
      keys: API keys, one of which each request must have; none for open access.
      replays: tokens of earlier answers with tool calls.
      metrics: counts for Prometheus.
      draining: whether new requests are refused because the server is about to end.
      created: when it started, in seconds since 1970.
      running: for each running request, what ends it early.
    """

    engine: Engine
    tokenizer: Tokenizer
    grammars: Grammars
    names: tuple[str, ...]
    limits: Limits
    adapters: tuple[str, ...] = ()
    revision: str = "april"
    eos_ids: tuple[int, ...] = (1,)
    vocab_size: int
    fingerprint: str = "fp_v4jax"
    strict: bool = False
    keys: tuple[str, ...] = ()
    replays: Replays = dataclasses.field(default_factory=Replays)
    metrics: Metrics = dataclasses.field(init=False)
    draining: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    running: set[Callable[[], None]] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.names[0], self.engine.stats)

    def adapter(self, model: str) -> str | None:
        """The adapter of a model name; None for the base model.

        Raises:
          ApiError: nothing of this name is served.
        """
        if model in self.adapters:
            return model
        if model in self.names or model.startswith(HOSTED):
            return None
        known = ", ".join((*self.names, *self.adapters))
        message = f"Model Not Exist: the model '{model}' is not served here; use one of {known}."
        raise ApiError(404, message, code="model_not_found")

    def admit(self) -> None:
        """Refuse a request that cannot be accepted now.

        Raises:
          ApiError: the server is starting or ending.
        """
        if self.draining or not self.engine.ready:
            state = "shutting down" if self.draining else "not ready"
            raise ApiError(503, f"The server is {state}; try again.", retry_after=RETRY_SECONDS)

    def room(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The most tokens of an answer to a prompt of this length: what the context leaves.

        Raises:
          ApiError: that is none, or with `strict` less than was asked for.
        """
        left = self.limits.context - prompt_tokens
        asked = left if max_tokens is None else max_tokens
        needed = max_tokens if self.strict and max_tokens else int(max_tokens != 0)
        if needed > left:
            raise ContextExceeded(self.limits.context, prompt_tokens, needed)
        return min(asked, left)

    def ended(self, usage: Usage, finish: str) -> None:
        """Count a request of the engine that has ended."""
        self.metrics.ended(usage, finish)
        fields = record.get({})
        for name, value in dataclasses.asdict(usage).items():
            fields[name] = fields.get(name, 0) + value
        fields["finish"] = finish

    def expire_all(self) -> None:
        """End all running requests, as if their time were over."""
        for expire in [*self.running]:
            expire()
