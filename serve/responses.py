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

from . import dialects
from .answer import answer
from .blocks import Block, BlockWriter
from .conversation import ChatRequest, Update
from .dialects import COUNT, EFFORT
from .errors import ApiError
from .fields import (
    TEXT,
    Fields,
    choice,
    default,
    read_body,
    required,
    sequence,
    table,
    tagged,
    text_or,
    unsupported,
)
from .service import Service
from .streams import respond

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
REPEATED: dict[str, Any] = {
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
_FUNCTION_NULLS = dict.fromkeys(("description", "parameters", "strict"))

_TEXTS = dialects.texts("input_text", "output_text", "text")
_ITEMS = {
    "message": {
        "role": required(choice("user", "assistant", "system", "developer")),
        "content": _TEXTS,
    },
    "reasoning": {
        "content": dialects.texts("reasoning_text", "text"),
        "summary": dialects.texts("summary_text"),
        "encrypted_content": default(TEXT, ""),
    },
    "function_call": {
        "call_id": required(TEXT),
        "namespace": TEXT,
        "name": required(TEXT),
        "arguments": required(TEXT),
    },
    "function_call_output": {"call_id": required(TEXT), "output": _TEXTS},
}
_FUNCTION = {"function": dialects.function_fields("parameters")}
_HINT = "this server has functions only"
_SPACE = {"name": required(TEXT), "tools": sequence(tagged("type", _FUNCTION, hint=_HINT))}
_TOOLS = _FUNCTION | {"namespace": _SPACE, "web_search": {}, "image_generation": {}}
_STATELESS = unsupported(": nothing is kept; send the whole input each time.")
_STATEFUL = ("previous_response_id", "conversation", "prompt", "store", "background")
BODY = table(
    **dialects.COMMON,
    **dict.fromkeys(_STATEFUL, _STATELESS),
    input=required(text_or(sequence(tagged("type", _ITEMS, absent="message")))),
    instructions=dialects.texts("text"),
    max_output_tokens=COUNT,
    top_logprobs=unsupported(" here; use /v1/chat/completions."),
    reasoning=table(effort=EFFORT),
    text=table(format=dialects.answer_format(nested=False)),
    tools=sequence(tagged("type", _TOOLS, hint=_HINT)),
    tool_choice=text_or(
        table(type=required(choice("function")), name=required(TEXT), namespace=TEXT),
        dialects.TOOL_CHOICE,
    ),
    include=sequence(TEXT),
)


async def _responses(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, BODY)
    request = read_request(body)
    writer = ResponseWriter(body, request, f"resp_{uuid.uuid4().hex}", int(time.time()))
    return respond(service, request, answer(service, request), writer)


ROUTES = [Route(f"{root}/responses", _responses, methods=["POST"]) for root in ("", "/v1")]


def read_request(body: Fields) -> ChatRequest:
    """The request in a body.

    Raises:
      ApiError: fields contradict each other; the error names one.
    """
    effort, messages, chosen = body.reasoning.effort, _read_messages(body), body.tool_choice
    if isinstance(chosen, Fields):
        chosen = {"name": _full_name(chosen.namespace, chosen.name)}
    request = ChatRequest(
        **dialects.common(body),
        messages=messages,
        tools=[
            dialects.function(tool, "parameters") | {"name": name} for name, tool, _ in _tools(body)
        ],
        tool_choice=chosen or "auto",
        thinking=effort != "none",
        effort=None if effort == "none" else effort,
        max_tokens=body.max_output_tokens,
        json=body.text.format,
        prefix=dialects.is_prefix(body, "input", messages),
    )
    dialects.check_tools(body, request)
    return request


def _read_messages(body: Fields) -> list[dict[str, Any]]:
    system = dialects.joined(body.instructions)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for item in body.input:
            _add_item(item, messages)
    return dialects.with_system_first(messages)


def _add_item(item: Fields, messages: list[dict[str, Any]]) -> None:
    """Add an item to the messages; what the assistant did in a row is one message."""
    match item.type:
        case "message" if item.role == "assistant":
            _answer(messages)["content"] += "".join(item.content)
        case "message":
            role = "user" if item.role == "developer" else item.role
            messages.append({"role": role, "content": dialects.joined(item.content)})
        case "reasoning":
            _answer(messages)["reasoning_content"] += _reasoning(item)
        case "function_call":
            name = _full_name(item.namespace, item.name)
            _answer(messages)["tool_calls"] += [dialects.call(item.call_id, name, item.arguments)]
        case _:
            text = dialects.joined(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})


def _answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message if it is the assistant's, else a new one."""
    if messages[-1]["role"] != "assistant":
        messages.append(dialects.answer_message())
    return messages[-1]


def _reasoning(item: Fields) -> str:
    """The reasoning's text, wherever the client has kept it."""
    sealed = item.encrypted_content
    if not item.content and sealed.startswith(_SEALED):
        try:
            return base64.b64decode(sealed.removeprefix(_SEALED), validate=True).decode()
        except ValueError:
            item.refuse("encrypted_content", "was changed; send it back as it came.")
    return "".join(item.content or item.summary)


def _tools(body: Fields) -> Iterator[tuple[str, Fields, dict[str, str]]]:
    """The functions: name for the model, fields, and the fields that name it to the client."""
    for tool in body.tools:
        space = tool.name if tool.type == "namespace" else None
        for function in tool.tools if space else [tool] if tool.type == "function" else []:
            name = {"name": function.name} | ({"namespace": space} if space else {})
            yield _full_name(space, function.name), function, name


def _full_name(space: str | None, name: str) -> str:
    return f"{space}__{name}" if space else name


class ResponseWriter(BlockWriter):
    """Writes an answer as a response: the events of a stream, or the whole."""

    def __init__(self, body: Fields, request: ChatRequest, response_id: str, created: int) -> None:
        """Prepare the response to a request, from its body; `created` is a Unix time."""
        super().__init__(request)
        self._given, self._id, self._created = body.raw, response_id, created
        self._tools = [
            _FUNCTION_NULLS | tool.raw if tool.type == "function" else tool.raw
            for tool in body.tools
        ]
        self._names = {name: fields for name, _, fields in _tools(body)}
        self._seals = "reasoning.encrypted_content" in body.include
        self._completed: int | None = None
        self._count = 0

    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The events of the answer's next update."""
        if self.last is None:
            yield self._event("created", response=self.body())
            yield self._event("in_progress", response=self.body())
        self._completed = int(time.time()) if update.finish else None
        for change, index, text in self.add(update):
            _, name, _, extra = _FORMS[self.blocks[index].kind]
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
        finish = self.finish
        given = {name: self._given[name] for name in REPEATED if self._given.get(name) is not None}
        return {
            **REPEATED,
            **given,
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "model": self._given["model"],
            "status": _STATUSES.get(finish, "in_progress"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "tools": self._tools,
            "output": [self._item(index) for index in range(len(self.blocks))],
            "usage": _usage(self.last) if self.last and finish else None,
            **self.token_ids,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": f"response.{kind}", "sequence_number": self._count - 1, **fields}

    def _start(self, index: int) -> Iterator[dict[str, Any]]:
        item = self._item(index) | {"status": "in_progress"}
        yield self._event("output_item.added", output_index=index, item=item)
        if part := _part(self.blocks[index]):
            yield self._event("content_part.added", **self._place(index), part=part)

    def _stop(self, index: int) -> Iterator[dict[str, Any]]:
        block = self.blocks[index]
        _, name, field, extra = _FORMS[block.kind]
        yield self._event(f"{name}.done", **self._place(index), **{field: block.text}, **extra)
        if part := _part(block):
            yield self._event("content_part.done", **self._place(index), part=part)
        yield self._event("output_item.done", output_index=index, item=self._item(index))

    def _place(self, index: int) -> dict[str, Any]:
        """Where the text of a block stands in the response."""
        place = {"item_id": self._item_id(index), "output_index": index}
        return place if self.blocks[index].kind == "call" else {**place, "content_index": 0}

    def _item_id(self, index: int) -> str:
        return f"{_FORMS[self.blocks[index].kind][0]}_{self._id.removeprefix('resp_')}_{index}"

    def _item(self, index: int) -> dict[str, Any]:
        """A block as an item of the response's output."""
        block = self.blocks[index]
        is_last = index == len(self.blocks) - 1
        is_cut = is_last and _STATUSES.get(self.finish) != "completed"
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
