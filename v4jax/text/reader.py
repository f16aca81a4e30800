"""From sampled tokens to text, reasoning and calls, up to a stop string."""

from collections.abc import Sequence
from typing import Literal

from v4jax.text import chat_parser
from v4jax.text.chat import END_THINK
from v4jax.text.chat_parser import ChatParser, ContentDelta, Done
from v4jax.text.stopping import StopStrings
from v4jax.text.tokenizer import StreamDecoder, Tokenizer

# What the text begins with: plain text, an answer, or an answer's reasoning.
Mode = Literal["text", "chat", "thinking"]


class Reader:
    """Turns sampled tokens into events of the chat parser, up to a stop string in the content."""

    def __init__(self, tokenizer: Tokenizer, mode: Mode, stops: Sequence[str]) -> None:
        self.thinking = mode == "thinking"
        self._decoder, self._stops = StreamDecoder(tokenizer), StopStrings(stops)
        self._parser = None if mode == "text" else ChatParser(mode)
        self._tail = ""

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.matched

    def push(self, token: int) -> list[chat_parser.Event]:
        """The events that this token completes."""
        piece = self._decoder.push(token)
        if self.thinking:
            tail = self._tail + piece
            self.thinking, self._tail = END_THINK not in tail, tail[-len(END_THINK) :]
        return self._until_stop(self._parse(piece))

    def finish(self) -> list[chat_parser.Event]:
        """The remaining events."""
        end = self._parser.finish() if self._parser else [Done(truncated=False)]
        return self._until_stop([*self._parse(self._decoder.flush()), *end])

    def _parse(self, text: str) -> list[chat_parser.Event]:
        return self._parser.feed(text) if self._parser else [ContentDelta(text)]

    def _until_stop(self, events: list[chat_parser.Event]) -> list[chat_parser.Event]:
        passed: list[chat_parser.Event] = []
        for event in events:
            if self.stop:
                break
            if isinstance(event, ContentDelta):
                text, _ = self._stops.push(event.text)
                passed += [ContentDelta(text)] if text else []
            else:
                # What interrupts the content also interrupts a stop string.
                held = self._stops.flush()
                passed += [ContentDelta(held), event] if held else [event]
        return passed


class Watcher:
    """Ends a request at a stop string."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def push(self, token: int) -> bool:
        """Whether the text ends with this token."""
        self._reader.push(token)
        return self._reader.stop is not None
