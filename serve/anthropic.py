"""Anthropic's interface: /v1/messages and its count of tokens.

Accepted without effect, mostly as by DeepSeek's own Anthropic interface: cache_control, is_error,
service_tier, context_management, disable_parallel_tool_use, redacted thinking, unknown fields.
Beyond it, thinking.budget_tokens, top_k and output_config.format have their effect, and a last
message of the assistant is continued.
"""

import asyncio
import json
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.arguments import FLAG, TEXT, choice, integer, predicate, shown

from . import blocks
from .blocks import NAME, OBJECT, Block
from .chat_request import read_sampling, read_stop, read_user
from .conversation import EFFORT, ChatRequest, Update
from .errors import ApiError, json_response
from .fields import Fields, read_body
from .prompts import encode
from .service import Service

_COUNT = integer(0)
_CONTENT = predicate("a string or a list of blocks", lambda value: isinstance(value, str | list))
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


async def _messages(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, service.limits.body_bytes)
    body.require("max_tokens", _COUNT)
    request = read_request(body)
    return blocks.respond(service, request, MessageWriter(request, f"msg_{uuid.uuid4().hex}"))


async def _count_tokens(http: Request) -> Response:
    service: Service = http.app.state.service
    request = read_request(await read_body(http, service.limits.body_bytes))
    prompt = await asyncio.to_thread(encode, service, request)
    return json_response({"input_tokens": len(prompt.tokens)})


ROUTES = [
    Route(f"{root}/v1/messages{path}", endpoint, methods=["POST"])
    for root in ("", "/anthropic")
    for path, endpoint in (("", _messages), ("/count_tokens", _count_tokens))
]


def read_request(body: Fields) -> ChatRequest:
    """Read the body of a request.

    Raises:
      ApiError: a field is missing, wrong or not supported; the error names it.
    """
    thinking, output = body.object("thinking"), body.object("output_config")
    kind = thinking.read("type", choice("enabled", "adaptive", "disabled"))
    effort = output.read("effort", EFFORT)
    messages = _read_messages(body)
    request = ChatRequest(
        model=body.require("model", TEXT),
        messages=messages,
        tools=[_read_tool(tool) for tool in body.objects("tools")],
        tool_choice=_read_tool_choice(body.object("tool_choice")),
        thinking=kind != "disabled" and effort != "none",
        effort=None if effort == "none" else effort,
        thinking_budget=thinking.read("budget_tokens", integer(1)),
        max_tokens=body.read("max_tokens", _COUNT),
        sampling=read_sampling(body),
        stop=read_stop(body, "stop_sequences"),
        json=_read_schema(output),
        stream=body.read("stream", FLAG, False),
        prefix=blocks.is_prefix(body, "messages", messages),
        user=_read_user(body.object("metadata")),
    )
    blocks.check_tools(body, request)
    return request


def _read_messages(body: Fields) -> list[dict[str, Any]]:
    system = blocks.read_text_parts(body, "system")
    system = [part for part in system if not part["text"].startswith(_METADATA)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for message in body.objects("messages"):
        role = message.require("role", choice("user", "assistant", "system"))
        content = message.require("content", _CONTENT)
        if isinstance(content, str):
            given = [Fields({"type": "text", "text": content})]
        else:
            given = list(message.objects("content"))
        if role == "assistant":
            messages.append(_read_answer(given))
        else:
            messages += [_read_block(block, role) for block in given]
    return blocks.with_system_first(messages)


def _read_block(block: Fields, role: str) -> dict[str, Any]:
    """A message with one of a user's texts, or with the result of a call."""
    if block.values.get("type") != "tool_result":
        return {"role": role, "content": [blocks.read_text_part(block)]}
    call_id, content = block.require("tool_use_id", TEXT), blocks.read_text_parts(block, "content")
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _read_answer(given: list[Fields]) -> dict[str, Any]:
    """An assistant's message, in which texts, thinking and calls are each brought together."""
    text, thinking, calls = "", "", []
    for block in given:
        match block.require("type", TEXT):
            case "text":
                text += block.require("text", TEXT)
            case "thinking":
                thinking += block.require("thinking", TEXT)
            case "tool_use":
                arguments = json.dumps(block.require("input", OBJECT), ensure_ascii=False)
                function = {"name": block.require("name", NAME), "arguments": arguments}
                call_id = block.require("id", TEXT)
                calls.append({"id": call_id, "type": "function", "function": function})
            case "redacted_thinking":
                pass
            case other:
                block.refuse("type", f"is {shown(other)}; use text, thinking or tool_use.")
    texts = {"content": text, "reasoning_content": thinking}
    return {"role": "assistant", **texts, "tool_calls": calls}


def _read_tool(tool: Fields) -> dict[str, Any]:
    kind = tool.read("type", TEXT, "custom")
    if kind != "custom":
        tool.refuse("type", f"is {shown(kind)}; this server runs no tools, declare one of yours.")
    return blocks.read_function(tool, "input_schema")


def _read_tool_choice(given: Fields) -> str | dict[str, str]:
    match given.read("type", choice("auto", "any", "tool", "none"), "auto"):
        case "any":
            return "required"
        case "tool":
            return {"name": given.require("name", TEXT)}
        case kind:
            return kind


def _read_schema(output: Fields) -> Any:
    if "format" not in output:
        return None
    output.object("format").require("type", choice("json_schema"))
    return output.object("format").require("schema", OBJECT)


def _read_user(metadata: Fields) -> str:
    """Who asks. Claude Code's ids name the session too, but a user's sessions share prefixes."""
    user = read_user(metadata)
    try:
        names = json.loads(user)
    except (ValueError, RecursionError):
        return user
    if not isinstance(names, dict):
        return user
    return json.dumps({k: v for k, v in names.items() if k != "session_id"})


class MessageWriter(blocks.Writer):
    """Writes an answer as a message: the events of a stream, or the whole."""

    def __init__(self, request: ChatRequest, message_id: str) -> None:
        self._request, self._id = request, message_id
        self._blocks: list[Block] = []
        self._last: Update | None = None

    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The events of the answer's next update."""
        first = self._last is None
        if update.is_empty:
            yield from () if first else ({"type": "ping"},)
            return
        self._last = update
        if first:
            yield {"type": "message_start", "message": self.body()}
        for change, index, text in blocks.changes(self._blocks, update):
            block, place = self._blocks[index], {"index": index}
            if change == "start":
                yield {"type": "content_block_start", **place, "content_block": _content(block, "")}
            elif change == "delta":
                yield _delta(place, *_DELTAS[block.kind], text)
            else:
                if block.kind == "reasoning":
                    yield _delta(place, "signature_delta", "signature", self._id)
                yield {"type": "content_block_stop", **place}
        if update.finish is not None:
            message = self.body()
            delta = {name: message[name] for name in ("stop_reason", "stop_sequence")}
            yield {"type": "message_delta", "delta": delta, "usage": message["usage"]}
            yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a stream that fails."""
        return error.anthropic_body()

    def body(self) -> dict[str, Any]:
        """The message with all updates so far."""
        assert self._last is not None
        finish, stop = self._last.finish, self._last.stop
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [_content(block, self._id) for block in self._blocks],
            "stop_reason": "stop_sequence" if stop else _STOP_REASONS.get(finish or ""),
            "stop_sequence": stop,
            "stop_details": None,
            "container": None,
            "usage": _usage(self._last),
        }


def _delta(place: dict[str, int], kind: str, field: str, text: str) -> dict[str, Any]:
    delta = {"type": kind, field: text}
    return {"type": "content_block_delta", **place, "delta": delta}


def _content(block: Block, signature: str) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": signature}
        case "text":
            return {"type": "text", "text": block.text, "citations": None}
        case "call":
            call = {
                "id": block.call_id,
                "name": block.name,
                "input": json.loads(block.text or "{}"),
            }
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
