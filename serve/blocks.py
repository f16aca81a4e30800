"""What the dialects share whose messages are lists of blocks: Anthropic's and Responses."""

import abc
import contextlib
import dataclasses
import itertools
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

from starlette.responses import Response

from v4jax.arguments import FLAG, TEXT, instance, predicate, shown
from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart

from .answer import answer
from .chat_request import MAX_TOOLS
from .conversation import ChatRequest, Update
from .errors import ApiError
from .fields import Fields
from .service import RETRY_SECONDS, Service
from .streams import KEEP_ALIVE, event, event_stream, whole

OBJECT = instance("an object", dict)
NAME = predicate(
    "1 to 128 letters, digits, - and _",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", value)),
)
Kind = Literal["reasoning", "text", "call"]
_KINDS: dict[type, Kind] = {
    ReasoningDelta: "reasoning",
    ContentDelta: "text",
    ToolCallStart: "call",
    ArgumentsDelta: "call",
}


@dataclasses.dataclass
class Block:
    """A part of an answer: reasoning, text or a call.

    Attributes:
      kind: which of them.
      pieces: its text, or the call's arguments, as they came.
      call_id, name: of the call.
    """

    kind: Kind
    pieces: list[str] = dataclasses.field(default_factory=list)
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(self.pieces)


Change = tuple[Literal["start", "delta", "stop"], int, str]


def changes(blocks: list[Block], update: Update) -> Iterator[Change]:
    """Add an update to an answer's blocks; yields each change, the block's index and the new text.

    A block stops where the next one starts, or when the answer has ended.
    """
    for delta in update.deltas:
        kind = _KINDS[type(delta)]
        start = isinstance(delta, ToolCallStart)
        if start or not blocks or blocks[-1].kind != kind:
            blocks.append(Block(kind, [], delta.id, delta.name) if start else Block(kind))
            if len(blocks) > 1:
                yield "stop", len(blocks) - 2, ""
            yield "start", len(blocks) - 1, ""
        if not start:
            blocks[-1].pieces.append(delta.text)
            yield "delta", len(blocks) - 1, delta.text
    if update.finish is not None and blocks:
        yield "stop", len(blocks) - 1, ""


class Writer(abc.ABC):
    """Writes an answer in a dialect."""

    @abc.abstractmethod
    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The events of the answer's next update, each with its type."""

    @abc.abstractmethod
    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a stream that fails."""

    @abc.abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer, with all updates so far."""


def respond(service: Service, request: ChatRequest, writer: Writer) -> Response:
    """The response to a request: a stream of events, or the whole answer."""
    updates = _complete(answer(service, request))
    frame = lambda value: event(value, value["type"])
    if request.stream:
        return event_stream(_chunks(updates, writer), lambda error: frame(writer.failure(error)))

    def build(received: Sequence[Update]) -> dict[str, Any]:
        for update in received:
            for _ in writer.events(update):
                pass
        return writer.body()

    return whole(updates, build)


async def _complete(updates: AsyncGenerator[Update]) -> AsyncGenerator[Update]:
    """The updates; an answer that had to be ended early is an error in these dialects."""
    async with contextlib.aclosing(updates):
        async for update in updates:
            if update.finish == "overload":
                message = "The answer was ended early: the server has no more memory or time."
                raise ApiError(503, message, retry_after=RETRY_SECONDS)
            yield update


async def _chunks(updates: AsyncGenerator[Update], writer: Writer) -> AsyncGenerator[str]:
    async with contextlib.aclosing(updates):
        async for update in updates:
            frames = [event(value, value["type"]) for value in writer.events(update)]
            yield "".join(frames) or KEEP_ALIVE


def read_text_part(part: Fields, types: Sequence[str] = ("text",)) -> dict[str, Any]:
    """A text part of a message, from a part of one of these types."""
    if (kind := part.require("type", TEXT)) not in types:
        part.refuse("type", f"is {shown(kind)}; this model reads text only.")
    return {"type": "text", "text": part.require("text", TEXT)}


def read_text_parts(
    fields: Fields, name: str, types: Sequence[str] = ("text",)
) -> list[dict[str, Any]]:
    """Text parts of a message, from a field that is a string or a list of parts."""
    if isinstance(text := fields.values.get(name), str):
        return [{"type": "text", "text": text}]
    return [read_text_part(part, types) for part in fields.objects(name)]


def read_function(tool: Fields, parameters: str) -> dict[str, Any]:
    """A tool's function, whose parameters are in the field of this name."""
    function = {
        "name": tool.require("name", NAME),
        "description": tool.read("description", TEXT),
        "parameters": tool.read(parameters, OBJECT),
        "strict": tool.read("strict", FLAG),
    }
    return {name: value for name, value in function.items() if value is not None}


def check_tools(body: Fields, request: ChatRequest) -> None:
    """Refuse too many tools, tools of the same name, and the choice of a tool that is missing."""
    names = [tool["name"] for tool in request.tools]
    if len(names) > MAX_TOOLS:
        body.refuse("tools", f"has {len(names)} tools; at most {MAX_TOOLS} are allowed.")
    if twice := {name for name in names if names.count(name) > 1}:
        body.refuse("tools", f"has more than one '{min(twice)}'; names must differ.")
    choice = request.tool_choice
    if isinstance(choice, dict) and choice["name"] not in names:
        body.refuse("tool_choice", f"names the tool '{choice['name']}', which is not in tools.")
    if choice == "required" and not names:
        body.refuse("tool_choice", "asks for a call, but there are no tools.")


def with_system_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with lists of parts, of which only the first may be the system's.

    The prompt's format has no place for a system text later on: it becomes the user's.
    """
    is_system = lambda message: message["role"] == "system"
    head = list(itertools.takewhile(is_system, messages))
    parts = [part for message in head for part in message["content"]]
    system = [{"role": "system", "content": parts}] if parts else []
    rest = messages[len(head) :]
    return system + [m | {"role": "user"} if is_system(m) else m for m in rest]


def is_prefix(body: Fields, name: str, messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is an answer's beginning; `name` is the messages' field."""
    if not messages:
        body.refuse(name, "has no content; give at least one message.")
    if messages[-1].get("tool_calls"):
        body.refuse(name, "ends with a call; give its result, too.")
    return messages[-1]["role"] == "assistant"
