"""Anthropic's interface: /v1/messages and its count of tokens.

Accepted without effect, mostly as by DeepSeek's own Anthropic interface: cache_control, is_error,
service_tier, context_management, disable_parallel_tool_use, redacted thinking, unknown fields.
Beyond it, thinking.budget_tokens, top_k and output_config.format have their effect, and a last
message of the assistant is continued.
"""

import asyncio
import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import dialects
from .answer import answer
from .blocks import Block, BlockWriter
from .conversation import ChatRequest, Update
from .dialects import COUNT, EFFORT, NAME, USER
from .errors import ApiError, json_response
from .fields import (
    OBJECT,
    TEXT,
    Field,
    Fields,
    choice,
    integer,
    read_body,
    required,
    sequence,
    table,
    tagged,
    text_or,
)
from .prompts import encode
from .service import Service
from .streams import respond

# Claude Code begins its system text with a block of metadata that changes with each request; in the
# prompt it would leave no two requests with a common prefix.
_METADATA = "x-anthropic-billing-header:"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# kind of a block -> type and field of its deltas.
_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _content(hint: str, **blocks: dict[str, Field]) -> dict[str, Field]:
    """Content of a message: a text, or blocks of these types."""
    both = {"text": {"text": required(TEXT)}} | blocks
    return {"content": required(text_or(sequence(tagged("type", both, hint=hint))))}


_RESULT = {"tool_use_id": required(TEXT), "content": dialects.texts("text")}
_USE = {"id": required(TEXT), "name": required(NAME), "input": required(OBJECT)}
_ROLES = {
    **dict.fromkeys(
        ("user", "system"), _content("this model reads text only", tool_result=_RESULT)
    ),
    "assistant": _content(
        "use text, thinking or tool_use",
        thinking={"thinking": required(TEXT)},
        redacted_thinking={},
        tool_use=_USE,
    ),
}
_FUNCTION = dialects.function_fields("input_schema")
_CUSTOM = "this server runs no tools, declare one of yours"
_FIELDS = dialects.COMMON | {
    "messages": required(sequence(tagged("role", _ROLES), least=1)),
    "max_tokens": integer(0),
    "system": dialects.texts("text"),
    "stop_sequences": dialects.STOP,
    "thinking": table(type=choice("enabled", "adaptive", "disabled"), budget_tokens=COUNT),
    "output_config": table(
        effort=EFFORT, format=tagged("type", {"json_schema": {"schema": required(OBJECT)}})
    ),
    "tools": sequence(
        tagged("type", {"custom": _FUNCTION}, absent="custom", hint=_CUSTOM),
        most=dialects.MAX_TOOLS,
    ),
    "tool_choice": tagged(
        "type", {"auto": {}, "any": {}, "none": {}, "tool": {"name": required(TEXT)}}, absent="auto"
    ),
    "metadata": table(user_id=USER),
}
COUNT_BODY, BODY = table(**_FIELDS), table(**_FIELDS | {"max_tokens": required(integer(0))})


async def _messages(http: Request) -> Response:
    service: Service = http.app.state.service
    request = read_request(await read_body(http, BODY))
    writer = MessageWriter(request, f"msg_{uuid.uuid4().hex}")
    return respond(service, request, answer(service, request), writer)


async def _count_tokens(http: Request) -> Response:
    service: Service = http.app.state.service
    request = read_request(await read_body(http, COUNT_BODY))
    prompt = await asyncio.to_thread(encode, service, request)
    return json_response({"input_tokens": len(prompt.tokens)})


ROUTES = [
    Route(f"{root}/v1/messages{path}", endpoint, methods=["POST"])
    for root in ("", "/anthropic")
    for path, endpoint in (("", _messages), ("/count_tokens", _count_tokens))
]


def read_request(body: Fields) -> ChatRequest:
    """The request in a body.

    Raises:
      ApiError: fields contradict each other; the error names one.
    """
    messages, output = _read_messages(body), body.output_config
    request = ChatRequest(
        **dialects.common(body, _user(body.metadata.user_id or "")),
        messages=messages,
        tools=[dialects.function(tool, "input_schema") for tool in body.tools],
        tool_choice=_tool_choice(body.tool_choice),
        thinking=body.thinking.type != "disabled" and output.effort != "none",
        effort=None if output.effort == "none" else output.effort,
        thinking_budget=body.thinking.budget_tokens,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        json=output.format and output.format.schema,
        prefix=dialects.is_prefix(body, "messages", messages),
    )
    dialects.check_tools(body, request)
    return request


def _read_messages(body: Fields) -> list[dict[str, Any]]:
    system = [text for text in body.system if not text.startswith(_METADATA)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": dialects.joined(system)}]
    for message in body.messages:
        content: str | Sequence[Fields] = message.content
        if message.role == "assistant":
            messages.append(_answer(content))
        elif isinstance(content, str):
            messages.append({"role": message.role, "content": content})
        else:
            messages += [_said(block, message.role) for block in content]
    return dialects.with_system_first(messages)


def _said(block: Fields, role: str) -> dict[str, Any]:
    """A message with one of a user's texts, or with the result of a call."""
    if block.type == "text":
        return {"role": role, "content": block.text}
    text = dialects.joined(block.content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _answer(content: str | Sequence[Fields]) -> dict[str, Any]:
    """An assistant's message, in which texts, thinking and calls are each brought together."""
    if isinstance(content, str):
        return dialects.answer_message(content)
    parts = lambda kind: [block for block in content if block.type == kind]
    return dialects.answer_message(
        "".join(block.text for block in parts("text")),
        "".join(block.thinking for block in parts("thinking")),
        [
            dialects.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
            for block in parts("tool_use")
        ],
    )


def _tool_choice(given: Fields | None) -> str | dict[str, str]:
    if given is not None and given.type == "tool":
        return {"name": given.name}
    names = {"any": "required", "none": "none"}
    return names.get(given.type, "auto") if given else "auto"


def _user(user: str) -> str:
    """Who asks. Claude Code's ids name the session too, but a user's sessions share prefixes."""
    try:
        names = json.loads(user)
    except (ValueError, RecursionError):
        return user
    if not isinstance(names, dict):
        return user
    return json.dumps({k: v for k, v in names.items() if k != "session_id"})


class MessageWriter(BlockWriter):
    """Writes an answer as a message: the events of a stream, or the whole."""

    def __init__(self, request: ChatRequest, message_id: str) -> None:
        super().__init__(request)
        self._model, self._id = request.model, message_id

    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The events of the answer's next update."""
        first = self.last is None
        if update.is_empty:
            yield from () if first else ({"type": "ping"},)
            return
        self.last = update
        if first:
            yield {"type": "message_start", "message": self.body()}
        for change, index, text in self.add(update):
            block, place = self.blocks[index], {"index": index}
            if change == "start":
                yield {"type": "content_block_start", **place, "content_block": _block(block, "")}
            elif change == "delta":
                yield _delta(place, *_DELTAS[block.kind], text)
            else:
                if block.kind == "reasoning":
                    yield _delta(place, "signature_delta", "signature", self._id)
                yield {"type": "content_block_stop", **place}
        if update.finish is not None:
            message = self.body()
            delta = {name: message[name] for name in ("stop_reason", "stop_sequence")}
            end = {"delta": delta, "usage": message["usage"], **self.token_ids}
            yield {"type": "message_delta", **end}
            yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a stream that fails."""
        return error.anthropic_body()

    def body(self) -> dict[str, Any]:
        """The message with all updates so far."""
        assert self.last is not None
        stop = self.last.stop
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [_block(block, self._id) for block in self.blocks],
            "stop_reason": "stop_sequence" if stop else _STOP_REASONS.get(self.finish),
            "stop_sequence": stop,
            "stop_details": None,
            "container": None,
            "usage": _usage(self.last),
            **self.token_ids,
        }


def _delta(place: dict[str, int], kind: str, field: str, text: str) -> dict[str, Any]:
    delta = {"type": kind, field: text}
    return {"type": "content_block_delta", **place, "delta": delta}


def _block(block: Block, signature: str) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": signature}
        case "text":
            return {"type": "text", "text": block.text, "citations": None}
        case "call":
            arguments = json.loads(block.text or "{}")
            call = {"id": block.call_id, "name": block.name, "input": arguments}
            return {"type": "tool_use", **call, "caller": {"type": "direct"}}


def _usage(update: Update) -> dict[str, Any]:
    """Anthropic counts tokens from the cache apart from those of the input."""
    usage = update.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation": None,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": update.reasoning_tokens},
        "inference_geo": None,
        "server_tool_use": None,
        "service_tier": "standard",
    }
