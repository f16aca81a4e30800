"""OpenAI's Responses interface: /v1/responses, without state.

Accepted without effect: truncation, service_tier, parallel_tool_calls, prompt_cache_key, verbosity,
summaries of the reasoning and unknown fields. The tools `web_search` and `image_generation`, which
OpenAI's servers run and Codex always declares, are left out: the model does not hear of them.
Functions in a namespace are functions whose names begin with it.
"""

import base64
import time
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.arguments import FLAG, TEXT, choice, integer, sequence, shown

from . import blocks
from .blocks import OBJECT, Block
from .chat_request import read_sampling, read_user
from .conversation import EFFORT, ChatRequest, Update
from .errors import ApiError
from .fields import LIST, Fields, read_body
from .service import Service

_STRINGS = sequence("a list of strings", of=str)
_CHOICE = choice("none", "auto", "required")
_TEXTS = ("input_text", "output_text", "text")
_LEFT_OUT = ("web_search", "image_generation")
_STATEFUL = ("previous_response_id", "conversation", "prompt", "store", "background")
# Before reasoning that clients carry from request to request unread, in encrypted_content.
_SEALED = "v4jax-reasoning:"
# kind of a block -> prefix of its item's id, name of its text's events, field of the whole text,
# further fields.
_FORMS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "reasoning": ("rs", "reasoning_text", "text", {}),
    "text": ("msg", "output_text", "text", {"logprobs": []}),
    "call": ("fc", "function_call_arguments", "arguments", {}),
}
_STATUSES = {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}
# Fields that a response repeats from its request, and their values without it.
_NULLS = ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id")
_REPEATED: dict[str, Any] = {
    **dict.fromkeys((*_NULLS, "prompt_cache_key", "safety_identifier", "user")),
    **{"background": False, "parallel_tool_calls": True, "store": False},
    **{"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "metadata": {},
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "truncation": "disabled",
}
_FUNCTION = {"description": None, "parameters": None, "strict": None}


async def _responses(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, service.limits.body_bytes)
    request = read_request(body)
    writer = ResponseWriter(body, f"resp_{uuid.uuid4().hex}", int(time.time()))
    return blocks.respond(service, request, writer)


ROUTES = [Route(f"{root}/responses", _responses, methods=["POST"]) for root in ("", "/v1")]


def read_request(body: Fields) -> ChatRequest:
    """Read the body of a request.

    Raises:
      ApiError: a field is missing, wrong or not supported; the error names it.
    """
    for name in _STATEFUL:
        if body.values.get(name):
            body.refuse(name, "is not supported: nothing is kept; send the whole input each time.")
    if body.read("top_logprobs", integer(0), 0):
        body.refuse("top_logprobs", "is not supported here; use /v1/chat/completions.")
    effort = body.object("reasoning").read("effort", EFFORT)
    messages = _read_messages(body)
    request = ChatRequest(
        model=body.require("model", TEXT),
        messages=messages,
        tools=[function for function, _ in _read_tools(body)],
        tool_choice=_read_tool_choice(body),
        thinking=effort != "none",
        effort=None if effort == "none" else effort,
        max_tokens=body.read("max_output_tokens", integer(1)),
        sampling=read_sampling(body),
        json=_read_format(body.object("text").object("format")),
        stream=body.read("stream", FLAG, False),
        prefix=blocks.is_prefix(body, "input", messages),
        user=read_user(body),
    )
    blocks.check_tools(body, request)
    return request


def _read_messages(body: Fields) -> list[dict[str, Any]]:
    system = blocks.read_text_parts(body, "instructions")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    if isinstance(body.values.get("input"), str):
        messages.append({"role": "user", "content": blocks.read_text_parts(body, "input")})
    else:
        for item in body.objects("input"):
            _read_item(item, messages)
    return blocks.with_system_first(messages)


def _read_item(item: Fields, messages: list[dict[str, Any]]) -> None:
    """Add an item to the messages; what the assistant did in a row is one message."""
    match item.read("type", TEXT, "message"):
        case "message":
            role = item.require("role", choice("user", "assistant", "system", "developer"))
            parts = blocks.read_text_parts(item, "content", _TEXTS)
            if role == "assistant":
                _answer(messages)["content"] += "".join(part["text"] for part in parts)
            else:
                role = "user" if role == "developer" else role
                messages.append({"role": role, "content": parts})
        case "reasoning":
            _answer(messages)["reasoning_content"] += _read_reasoning(item)
        case "function_call":
            name = _full_name(item.read("namespace", TEXT), item.require("name", TEXT))
            function = {"name": name, "arguments": item.require("arguments", TEXT)}
            call_id = item.require("call_id", TEXT)
            call = {"id": call_id, "type": "function", "function": function}
            _answer(messages)["tool_calls"].append(call)
        case "function_call_output":
            call_id = item.require("call_id", TEXT)
            parts = blocks.read_text_parts(item, "output", _TEXTS)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": parts})
        case other:
            known = "message, reasoning, function_call or function_call_output"
            item.refuse("type", f"is {shown(other)}; use {known}.")


def _answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message if it is the assistant's, else a new one."""
    if messages[-1]["role"] != "assistant":
        texts = {"content": "", "reasoning_content": ""}
        messages.append({"role": "assistant", **texts, "tool_calls": []})
    return messages[-1]


def _read_reasoning(item: Fields) -> str:
    """The reasoning's text, wherever the client has kept it."""
    sealed = item.read("encrypted_content", TEXT, "")
    parts = blocks.read_text_parts(item, "content", ("reasoning_text", "text"))
    if not parts and sealed.startswith(_SEALED):
        try:
            return base64.b64decode(sealed.removeprefix(_SEALED), validate=True).decode()
        except ValueError:
            item.refuse("encrypted_content", "was changed; send it back as it came.")
    parts = parts or blocks.read_text_parts(item, "summary", ("summary_text",))
    return "".join(part["text"] for part in parts)


def _read_tools(body: Fields) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The functions, each with the fields that name it to the client."""
    functions: list[tuple[dict[str, Any], dict[str, str]]] = []
    for tool in body.objects("tools"):
        kind = tool.require("type", TEXT)
        if kind in _LEFT_OUT:
            continue
        space = tool.require("name", TEXT) if kind == "namespace" else None
        for inner in tool.objects("tools") if space else [tool]:
            if (kind := inner.require("type", TEXT)) != "function":
                inner.refuse("type", f"is {shown(kind)}; this server has functions only.")
            function = blocks.read_function(inner, "parameters")
            name = {"name": function["name"]} | ({"namespace": space} if space else {})
            functions.append((function | {"name": _full_name(space, function["name"])}, name))
    return functions


def _full_name(space: str | None, name: str) -> str:
    return f"{space}__{name}" if space else name


def _read_tool_choice(body: Fields) -> str | dict[str, str]:
    if not isinstance(body.values.get("tool_choice"), dict):
        return body.read("tool_choice", _CHOICE, "auto")
    given = body.object("tool_choice")
    given.require("type", choice("function"))
    return {"name": _full_name(given.read("namespace", TEXT), given.require("name", TEXT))}


def _read_format(given: Fields) -> Any:
    match given.read("type", choice("text", "json_object", "json_schema"), "text"):
        case "json_object":
            return True
        case "json_schema":
            return given.require("schema", OBJECT)
    return None


class ResponseWriter(blocks.Writer):
    """Writes an answer as a response: the events of a stream, or the whole."""

    def __init__(self, body: Fields, response_id: str, created: int) -> None:
        """Prepare the response to a request's body; `created` is a Unix time."""
        self._given, self._id, self._created = body.values, response_id, created
        self._tools = [
            _FUNCTION | tool if tool["type"] == "function" else tool
            for tool in body.read("tools", LIST, ())
        ]
        self._names = {function["name"]: name for function, name in _read_tools(body)}
        self._seals = "reasoning.encrypted_content" in body.read("include", _STRINGS, ())
        self._blocks: list[Block] = []
        self._last: Update | None = None
        self._completed: int | None = None
        self._count = 0

    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The events of the answer's next update."""
        if self._last is None:
            yield self._event("created", response=self.body())
            yield self._event("in_progress", response=self.body())
        self._last = update
        self._completed = int(time.time()) if update.finish else None
        for change, index, text in blocks.changes(self._blocks, update):
            _, name, _, extra = _FORMS[self._blocks[index].kind]
            match change:
                case "start":
                    yield from self._start(index)
                case "delta":
                    yield self._event(f"{name}.delta", **self._place(index), delta=text, **extra)
                case "stop":
                    yield from self._stop(index)
        if update.finish is not None:
            response = self.body()
            yield self._event(response["status"], response=response)

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The last event of a stream that fails."""
        reason = {"code": "server_error", "message": error.message}
        response = self.body() | {"status": "failed", "error": reason}
        return self._event("failed", response=response)

    def body(self) -> dict[str, Any]:
        """The response with all updates so far."""
        finish = self._last.finish if self._last else None
        given = {name: self._given[name] for name in _REPEATED if self._given.get(name) is not None}
        return {
            **_REPEATED,
            **given,
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "model": self._given["model"],
            "status": _STATUSES.get(finish or "", "in_progress"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "tools": self._tools,
            "output": [self._item(index) for index in range(len(self._blocks))],
            "usage": _usage(self._last) if self._last and finish else None,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": f"response.{kind}", "sequence_number": self._count - 1, **fields}

    def _start(self, index: int) -> Iterator[dict[str, Any]]:
        item = self._item(index) | {"status": "in_progress"}
        yield self._event("output_item.added", output_index=index, item=item)
        if part := _part(self._blocks[index]):
            yield self._event("content_part.added", **self._place(index), part=part)

    def _stop(self, index: int) -> Iterator[dict[str, Any]]:
        block = self._blocks[index]
        _, name, field, extra = _FORMS[block.kind]
        yield self._event(f"{name}.done", **self._place(index), **{field: block.text}, **extra)
        if part := _part(block):
            yield self._event("content_part.done", **self._place(index), part=part)
        yield self._event("output_item.done", output_index=index, item=self._item(index))

    def _place(self, index: int) -> dict[str, Any]:
        """Where the text of a block stands in the response."""
        place = {"item_id": self._item_id(index), "output_index": index}
        return place if self._blocks[index].kind == "call" else {**place, "content_index": 0}

    def _item_id(self, index: int) -> str:
        return f"{_FORMS[self._blocks[index].kind][0]}_{self._id.removeprefix('resp_')}_{index}"

    def _item(self, index: int) -> dict[str, Any]:
        """A block as an item of the response's output."""
        block = self._blocks[index]
        finish = self._last.finish if self._last else None
        is_cut = index == len(self._blocks) - 1 and _STATUSES.get(finish or "") != "completed"
        item = {"id": self._item_id(index), "status": "incomplete" if is_cut else "completed"}
        content = [_part(block)] if block.pieces else []
        match block.kind:
            case "reasoning":
                sealed = _SEALED + base64.b64encode(block.text.encode()).decode()
                extra = {"encrypted_content": sealed} if self._seals else {}
                return {**item, "type": "reasoning", "summary": [], "content": content, **extra}
            case "text":
                return {**item, "type": "message", "role": "assistant", "content": content}
            case "call":
                name = self._names.get(block.name, {"name": block.name})
                call = {"call_id": block.call_id, **name, "arguments": block.text}
                return {**item, "type": "function_call", **call}


def _part(block: Block) -> dict[str, Any] | None:
    """The one part of an item's content; None for a call, which has none."""
    match block.kind:
        case "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        case "text":
            return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
        case "call":
            return None


def _usage(update: Update) -> dict[str, Any]:
    usage = update.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": update.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
