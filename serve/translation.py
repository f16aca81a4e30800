"""From the engine's events to what clients see: text, reasoning and calls."""

import functools
from collections.abc import Sequence

from v4jax.engine.request import Event, Token
from v4jax.text import chat_parser
from v4jax.text.chat_parser import (
    ArgumentsDelta,
    ContentDelta,
    Done,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
)
from v4jax.text.reader import Mode, Reader

from .conversation import ChatRequest, Delta, TextRequest, Update, message_of
from .replays import Turn
from .service import Service


class Translation:
    """Turns the events of one request into updates."""

    def __init__(
        self, service: Service, request: TextRequest, mode: Mode, prompt: tuple[Token, ...] = ()
    ) -> None:
        """`prompt` are tokens to report with the first update."""
        self._service = service
        self.new_reader = functools.partial(Reader, service.tokenizer, mode, request.stop)
        self._reader = self.new_reader()
        self._may_call = isinstance(request, ChatRequest) and bool(request.callable_tools)
        self._may_keep = isinstance(request, ChatRequest) and not request.prefix
        # Of the whole answer, if it may have calls.
        self._events: list[chat_parser.Event] = []
        self._sampled: list[int] = []
        # What no update has had yet, and how many tokens are reasoning: in all, and in updates.
        self._prompt = prompt
        self._tokens: list[Token] = []
        self._reasoning = self._reported = 0

    def update(self, event: Event) -> Update:
        """What is new for the client; an empty update while that is not certain yet."""
        events: list[chat_parser.Event] = []
        self._prompt += event.prompt
        self._tokens += event.tokens
        for token in event.tokens:
            self._reasoning += self._reader.thinking
            if token.id not in self._service.eos_ids:
                events += self._reader.push(token.id)
        malformed = _broken(events)
        if event.finish:
            end = self._reader.finish()
            # A call that was cut off may have been well-formed so far.
            malformed += _broken(end) if event.finish == "stop" else 0
            events += end
        self._service.metrics.malformed(malformed)
        if self._may_call:
            self._events += events
            self._sampled += [token.id for token in event.tokens]
        deltas = self._deltas(events)
        if not deltas and not event.finish:
            # Tokens wait for the text that they begin.
            return Update((), (), 0, None, event.usage, self._reasoning)
        called = any(isinstance(event, ToolCallStart) for event in self._events)
        finish = "tool_calls" if event.finish == "stop" and called else event.finish
        prompt, tokens, reasoning = self._prompt, tuple(self._tokens), self._reasoning
        new = reasoning - self._reported
        update = Update(
            *(deltas, tokens, new, finish, event.usage, reasoning, prompt, self._reader.stop),
            expert_TLA=event.expert_TLA,
        )
        self._prompt, self._tokens, self._reported = (), [], reasoning
        if finish == "tool_calls" and self._may_keep:
            self._keep()
        return update

    def _deltas(self, events: list[chat_parser.Event]) -> tuple[Delta, ...]:
        """The events that clients see, with texts that follow each other joined."""
        deltas: list[Delta] = []
        for event in events:
            is_call = isinstance(event, ToolCallStart | ArgumentsDelta)
            if isinstance(event, ToolCallEnd | Done) or (is_call and not self._may_call):
                continue
            match deltas[-1:], event:
                case [ContentDelta(text)], ContentDelta(more):
                    deltas[-1] = ContentDelta(text + more)
                case [ReasoningDelta(text)], ReasoningDelta(more):
                    deltas[-1] = ReasoningDelta(text + more)
                case [ArgumentsDelta(index, text)], ArgumentsDelta(_, more):
                    deltas[-1] = ArgumentsDelta(index, text + more)
                case _:
                    deltas.append(event)
        return tuple(deltas)

    def _keep(self) -> None:
        """Remember how a turn with calls was sampled, if it ended by itself and is well-formed."""
        ended = self._sampled[-1] in self._service.eos_ids
        if not ended or _broken(self._events) or self._reader.thinking:
            return
        split = self._reasoning
        turn = Turn(message_of(self._events), self._sampled[:split], self._sampled[split:])
        self._service.replays.keep(turn)


def _broken(events: Sequence[chat_parser.Event]) -> int:
    """How many calls ended that were not well-formed, or not whole."""
    return sum(isinstance(event, ToolCallEnd) and not event.complete for event in events)
