"""What the requests of all dialects have in common: fields, and what must agree between them."""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from v4jax.arguments import Invalid, Kind, number, predicate
from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams
from v4jax.text import stopping
from v4jax.text.stopping import StopStrings

from . import fields
from .conversation import ChatRequest
from .fields import FLAG, OBJECT, TEXT, Field, Fields, default, leaf, required, sequence, text_or

MAX_TOOLS, MAX_STOP_LENGTH, MAX_ALTERNATIVES = 128, 512, 20
COUNT, ALTERNATIVES = fields.integer(1), fields.integer(0, MAX_ALTERNATIVES)
# How a client names an effort; 'none' turns thinking off.
EFFORT = fields.choice("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
_NAME = r"[a-zA-Z0-9_-]{1,128}"
NAME = leaf(
    predicate(
        "1 to 128 letters, digits, - and _",
        lambda value: isinstance(value, str) and bool(re.fullmatch(_NAME, value)),
    ),
    type="string",
    pattern=f"^{_NAME}$",
)
USER = leaf(
    predicate(
        "a string of at most 512 bytes", lambda v: isinstance(v, str) and len(v.encode()) <= 512
    ),
    **{"type": "string", "maxLength": 512},
)


def _read_stop(value: Any) -> tuple[str, ...]:
    stop = tuple(stopping.STOP.read(value))
    try:
        StopStrings(stop)
    except ValueError as error:
        raise Invalid(f" is wrong. {error}") from None
    if any(len(text) > MAX_STOP_LENGTH for text in stop):
        raise Invalid(f" has a string of more than {MAX_STOP_LENGTH} characters.")
    return stop


_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STRINGS = {"type": "array", "items": _STRING, "maxItems": stopping.MAX_STOPS}
STOP = default(leaf(Kind(stopping.STOP.expected, _read_stop), anyOf=[_STRING, _STRINGS]), ())

_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_PENALTY = {"type": "number", "minimum": -2, "maximum": 2}
_SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0},
    "min_p": _SHARE,
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
}
_TEMPERATURE = number("a number from 0 to 2", lambda x: 0 <= x <= 2)
_KINDS = sampling.KINDS | {"temperature": _TEMPERATURE}
# Fields of every request for text.
COMMON: dict[str, Field] = {
    "model": required(TEXT),
    "stream": default(FLAG, False),
    "user_id": USER,
    "user": USER,
    "return_token_ids": default(FLAG, False),
    **{name: leaf(_KINDS[name], **schema) for name, schema in _SAMPLING.items()},
}


def common(body: Fields, user: str = "") -> dict[str, Any]:
    """Fields of a `TextRequest`, from those of `COMMON`; `user` is named elsewhere in the body."""
    given = {name: getattr(body, name) for name in _SAMPLING}
    return {
        "model": body.model,
        "stream": body.stream,
        "user": user or body.user_id or body.user or "",
        "token_ids": body.return_token_ids,
        "sampling": SamplingParams(**{k: v for k, v in given.items() if v is not None}),
    }


# What OpenAI's streams of chunks have in addition.
STREAM_OPTIONS = fields.table(include_usage=default(FLAG, False))


def include_usage(body: Fields) -> bool:
    """Whether the chunks of a stream carry usage."""
    if body.raw.get("stream_options") is not None and not body.stream:
        body.refuse("stream_options", "needs stream to be true.")
    return body.stream_options.include_usage


def texts(*types: str) -> Field:
    """A string, or a list of parts of these types; read as a list of texts."""
    parts = sequence(
        fields.tagged(
            "type",
            {kind: {"text": required(TEXT)} for kind in types},
            absent=types[0],
            hint="this model reads text only",
        )
    )
    both = text_or(parts)

    def read(place: str, value: Any) -> list[str]:
        given = both.read(place, value)
        return [given] if isinstance(given, str) else [part.text for part in given]

    return Field("a string or a list of text parts", read, both.schema, ())


def joined(parts: Iterable[str]) -> str:
    """The text of a message's parts."""
    return "\n\n".join(parts)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call in an assistant's message."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def answer_message(
    content: str = "", reasoning: str = "", calls: Iterable[dict[str, Any]] = ()
) -> dict[str, Any]:
    """An assistant's message."""
    said = {"content": content, "reasoning_content": reasoning}
    return {"role": "assistant", **said, "tool_calls": [*calls]}


def function_fields(parameters: str) -> dict[str, Field]:
    """Fields of a function that may be called; `parameters` names that of its parameters."""
    return {"name": required(NAME), "description": TEXT, parameters: OBJECT, "strict": FLAG}


def function(tool: Fields, parameters: str) -> dict[str, Any]:
    """A function, from its fields."""
    read = {
        "name": tool.name,
        "description": tool.description,
        "parameters": getattr(tool, parameters),
        "strict": tool.strict,
    }
    return {name: value for name, value in read.items() if value is not None}


TOOL_CHOICE = fields.choice("none", "auto", "required")


def answer_format(*, nested: bool) -> Field:
    """The format of an answer, read as None for text, True for any JSON object, or a JSON schema.

    `nested` tells whether the schema is inside a further object.
    """
    schema = {"schema": required(OBJECT)}
    inner = {"json_schema": required(fields.table(**schema))} if nested else schema
    kinds = {"text": {}, "json_object": {}, "json_schema": inner}
    form = fields.tagged("type", kinds, absent="text")

    def read(place: str, value: Any) -> Any:
        given = form.read(place, value)
        match given.type:
            case "json_object":
                return True
            case "json_schema":
                return (given.json_schema if nested else given).schema
        return None

    return Field(form.expected, read, form.schema)


def check_tools(body: Fields, request: ChatRequest) -> None:
    """Refuse too many tools, tools of the same name, and the choice of a tool that is missing."""
    names = [tool["name"] for tool in request.tools]
    if len(names) > MAX_TOOLS:
        body.refuse("tools", f"has {len(names)} tools; at most {MAX_TOOLS} are allowed.")
    if twice := {name for name in names if names.count(name) > 1}:
        body.refuse("tools", f"has more than one '{min(twice)}'; names must differ.")
    chosen = request.tool_choice
    if isinstance(chosen, dict) and chosen["name"] not in names:
        body.refuse("tool_choice", f"names the tool '{chosen['name']}', which is not in tools.")
    if chosen == "required" and not names:
        body.refuse("tool_choice", "asks for a call, but there are no tools.")


def with_system_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, of which only the first may be the system's.

    The prompt's format has no place for a system text later on: it becomes the user's.
    """
    is_system = lambda message: message["role"] == "system"
    head = list(itertools.takewhile(is_system, messages))
    text = joined(message["content"] for message in head if message["content"])
    system = [{"role": "system", "content": text}] if text else []
    rest = messages[len(head) :]
    return system + [m | {"role": "user"} if is_system(m) else m for m in rest]


def is_prefix(body: Fields, name: str, messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is an answer's beginning; `name` is the messages' field."""
    if not messages:
        body.refuse(name, "has no content; give at least one message.")
    if messages[-1].get("tool_calls"):
        body.refuse(name, "ends with a call; give its result, too.")
    return messages[-1]["role"] == "assistant"
