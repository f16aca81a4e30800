"""Parse the model's output: reasoning, content and tool calls, in pieces of any size.

    reasoning </think> content
    <|DSML|tool_calls> <|DSML|invoke name="N">
    <|DSML|parameter name="K" string="true">V</|DSML|parameter> </|DSML|invoke> </|DSML|tool_calls>

(bars stand for full-width bars; DeepSeek-V4's reference parser defines the format). The reference
accepts well-formed output only. This parser never raises on text, and its result does not depend
on how the text is split. It handles everything else as follows:

- Blanks are allowed before the `>` of a tag and around its attributes.
- A call may appear anywhere, with or without the enclosing `tool_calls`, even in reasoning that was
  never closed; the text after it continues the reasoning or content that the call interrupted.
- A tag cut off by the end of the output is dropped. A call cut off there ends with
  `complete=False`: a partial string value is kept, any other partial value is dropped.
- A value that is not declared a string but is not JSON, or cannot be written as JSON again (NaN,
  1e999), becomes a string, and the call ends with `complete=False`. So arguments are always a JSON
  object.
- Unmatched closing tags of a parameter, a call or the reasoning are dropped where a call or a
  parameter could begin.
- Anything other than a tag inside a call ends the call with `complete=False`; from there on the
  text is reasoning or content, verbatim, until the next call. So are tags outside of any call.
- A repeated parameter keeps its first value, and the call ends with `complete=False`.
- `<think>` as the very first text opens the reasoning. `</think>` while no reasoning is open is
  dropped, and so is everything after the end-of-sentence token.
"""

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Literal

from v4jax.arguments import TEXT, checked, choice
from v4jax.text import dsml
from v4jax.text.chat import DSML, END_THINK, EOS, THINK, THINKING_MODES


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More reasoning text."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallStart:
    """A call starts; `index` counts the calls of this message from 0."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class ArgumentsDelta:
    """More text of a call's arguments; all of it together is a JSON object."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallEnd:
    """A call ends; `complete` says whether it was complete and well-formed."""

    index: int
    complete: bool


@dataclasses.dataclass(frozen=True)
class Done:
    """The last event; `truncated` says whether the output ended inside a tag or a call."""

    truncated: bool


Event = ReasoningDelta | ContentDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd | Done


@checked(text=TEXT)
def parse_chat(text: str, thinking_mode: str = "chat") -> dict[str, Any]:
    """Parse a model's entire output (what follows the prompt) into an assistant message.

    Returns:
      A message for `encode_chat`, as from `collect`.

    Raises:
      ValueError: there is no such thinking mode; never because of the text.
    """
    parser = ChatParser(thinking_mode)
    return collect([*parser.feed(text), *parser.finish()])


def collect(events: Iterable[Event]) -> dict[str, Any]:
    """Combine a message's events into the message.

    Returns:
      {"role": "assistant", "content", "reasoning_content", "tool_calls"}. A call is
      {"type": "function", "function": {"name", "arguments"}}; an incomplete one also has
      "incomplete": True. Ids are in the events only, as the model writes none.
    """
    content, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    for event in events:
        match event:
            case ContentDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case ToolCallStart(_, _, name):
                calls.append({"type": "function", "function": {"name": name, "arguments": ""}})
            case ArgumentsDelta(index, text):
                calls[index]["function"]["arguments"] += text
            case ToolCallEnd(index, complete=False):
                calls[index]["incomplete"] = True
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }


def _random_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatParser:
    """A state machine over the model's text; the module docstring says what it accepts.

    States: "start", "text" (reasoning or content), "block" (between calls), "call" (between
    parameters), "value" (in a parameter), "done". `_buffer` holds text that is not parsed yet, and
    `_skipped` the marks and blanks before it, which become text if no call follows.
    """

    @checked(thinking_mode=choice(*THINKING_MODES))
    def __init__(self, thinking_mode: str = "chat", *, new_id: Callable[[], str] = _random_id):
        """`new_id` creates the ids of calls, as the model writes none."""
        self._new_id = new_id
        self._reasoning = thinking_mode == "thinking"
        self._state: Literal["start", "text", "block", "call", "value", "done"] = "start"
        self._buffer = ""
        self._skipped = ""
        self._events: list[Event] = []
        self._call = -1
        self._clean = True
        self._keys: set[str] = set()
        self._lead = "{"
        self._value: Literal["string", "json", "repeated"] = "string"
        self._member = ""
        self._json = ""

    @checked(text=TEXT)
    def feed(self, text: str) -> list[Event]:
        """The events that this piece completes; text after the end of the sentence is dropped."""
        if self._state != "done":
            self._buffer += text
        while self._step():
            pass
        return self._take_events()

    def finish(self) -> list[Event]:
        """The remaining events, `Done` last; empty if the end of the sentence has been read."""
        if self._state in ("start", "text"):
            at, *_ = dsml.find(self._buffer, dsml.OPEN_CALLS, dsml.OPEN_INVOKE)
            cut = DSML in self._buffer[at:]
            self._emit_text(self._before_tag(at) if cut else self._buffer)
            self._end(truncated=cut)
        elif self._state != "done":
            if self._state == "value" and DSML not in self._buffer:
                self._emit_value(self._buffer)
            self._end(
                truncated=self._state != "block" or bool((self._skipped + self._buffer).strip())
            )
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Consume some text; False if more is needed first."""
        match self._state:
            case "start":
                return self._in_start()
            case "text":
                return self._in_text()
            case "block":
                return self._in_block()
            case "call":
                return self._in_call()
            case "value":
                return self._in_value()
        return False

    def _in_start(self) -> bool:
        if self._buffer != THINK and THINK.startswith(self._buffer):
            return False
        if self._buffer.startswith(THINK):
            self._drop(len(THINK))
            self._reasoning = True
        self._state = "text"
        return True

    def _in_text(self) -> bool:
        marks = (END_THINK, EOS, dsml.OPEN_CALLS, dsml.OPEN_INVOKE)
        at, mark, _ = dsml.find(self._buffer, *marks)
        before = self._buffer[:at] if mark in (END_THINK, EOS) else self._before_tag(at)
        self._emit_text(before)
        self._drop(len(before))
        if mark == END_THINK:
            self._drop(len(mark))
            self._reasoning = False
        elif mark == EOS:
            self._end(truncated=False)
        elif mark:
            self._state = "block"
        return bool(mark)

    def _in_block(self) -> bool:
        stray = (dsml.CLOSE_INVOKE, dsml.CLOSE_PARAMETER)
        mark, end = self._head(EOS, dsml.OPEN_CALLS, dsml.OPEN_INVOKE, dsml.CLOSE_CALLS, *stray)
        if mark is None:
            return False
        if mark == EOS:
            self._end(truncated=bool(self._skipped.strip()))
        elif mark == dsml.CLOSE_CALLS:
            self._drop(end)
            self._skipped, self._state = "", "text"
        elif mark == dsml.OPEN_CALLS:
            self._skip(end)
        elif mark == dsml.OPEN_INVOKE:
            return self._in_invoke_tag(end)
        elif mark in stray:
            self._drop(end)
        else:
            self._leave_block()
        return True

    def _in_invoke_tag(self, start: int) -> bool:
        barred = (DSML, EOS, "\n")
        tag = dsml.attribute(self._buffer, start, (dsml.NAMED,), barred=barred)
        if tag is None:
            return False
        name, closed, end = tag
        if closed:
            self._drop(end)
            self._start_call(name)
        else:
            self._skip(start)
            self._leave_block()
        return True

    def _in_call(self) -> bool:
        stray = (dsml.CLOSE_PARAMETER, END_THINK)
        mark, end = self._head(EOS, dsml.OPEN_PARAMETER, dsml.CLOSE_INVOKE, *stray)
        if mark is None:
            return False
        if mark == EOS:
            self._end(truncated=True)
        elif mark == dsml.CLOSE_INVOKE:
            self._drop(end)
            self._skipped = ""
            self._end_call(self._clean)
        elif mark == dsml.OPEN_PARAMETER:
            return self._in_parameter_tag(end)
        elif mark in stray:
            self._drop(end)
            self._reasoning = self._reasoning and mark != END_THINK
        else:
            self._end_call(complete=False)
        return True

    def _in_parameter_tag(self, start: int) -> bool:
        kinds = (dsml.STRING, dsml.JSON)
        tag = dsml.attribute(self._buffer, start, kinds, barred=(DSML, EOS))
        if tag is None:
            return False
        key, kind, end = tag
        if kind:
            self._drop(end)
            self._start_value(key, kind)
        else:
            self._end_call(complete=False)
        return True

    def _in_value(self) -> bool:
        at, mark, end = dsml.find(self._buffer, dsml.CLOSE_PARAMETER, EOS)
        self._emit_value(self._buffer[:at])
        self._drop(end)
        if mark == dsml.CLOSE_PARAMETER:
            self._end_value()
        elif mark == EOS:
            self._end(truncated=True)
        return bool(mark)

    def _start_call(self, name: str) -> None:
        self._skipped, self._state = "", "call"
        self._call += 1
        self._clean, self._keys, self._lead = True, set(), "{"
        self._events.append(ToolCallStart(self._call, self._new_id(), name))

    def _end_call(self, complete: bool) -> None:
        self._emit_arguments("{}" if self._lead == "{" else "}")
        self._events.append(ToolCallEnd(self._call, complete))
        self._state = "block"

    def _start_value(self, key: str, kind: str) -> None:
        self._skipped, self._state = "", "value"
        member = f"{self._lead}{json.dumps(key, ensure_ascii=False)}: "
        if key in self._keys:
            self._value, self._clean = "repeated", False
        elif kind == dsml.STRING:
            self._value, self._lead = "string", ", "
            self._emit_arguments(member + '"')
        else:
            self._value, self._member, self._json = "json", member, ""
        self._keys.add(key)

    def _emit_value(self, text: str) -> None:
        """Emit strings as they arrive; other values wait, as part of one would not be JSON."""
        if self._value == "string":
            self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        elif self._value == "json":
            self._json += text

    def _end_value(self) -> None:
        if self._value == "string":
            self._emit_arguments('"')
        elif self._value == "json":
            is_json = dsml.is_json(self._json)
            value = self._json if is_json else json.dumps(self._json, ensure_ascii=False)
            self._emit_arguments(self._member + value)
            self._clean, self._lead = self._clean and is_json, ", "
        self._state = "call"

    def _end(self, *, truncated: bool) -> None:
        if self._state == "value" and self._value == "string":
            self._emit_arguments('"')
        if self._state in ("call", "value"):
            self._end_call(complete=False)
        self._events.append(Done(truncated))
        self._buffer, self._state = "", "done"

    def _leave_block(self) -> None:
        self._emit_text(self._skipped)
        self._skipped, self._state = "", "text"

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(ReasoningDelta(text) if self._reasoning else ContentDelta(text))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._events.append(ArgumentsDelta(self._call, text))

    def _drop(self, count: int) -> None:
        self._buffer = self._buffer[count:]

    def _skip(self, count: int) -> None:
        self._skipped += self._buffer[:count]
        self._drop(count)

    def _before_tag(self, at: int) -> str:
        """The text before position `at`, without the blank line that belongs to a DSML tag."""
        text = self._buffer[:at]
        return text.removesuffix("\n").removesuffix("\n")

    def _head(self, *marks: str) -> tuple[str | None, int]:
        """The mark after any blanks and its end, as from `dsml.head`."""
        self._skip(len(self._buffer) - len(self._buffer.lstrip(dsml.BLANK)))
        return dsml.head(self._buffer, *marks)
