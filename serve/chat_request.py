"""Requests of chat completions, as in DeepSeek's and OpenAI's interfaces.

Accepted beyond DeepSeek's hosted API: JSON schemas, `seed`, `max_completion_tokens`, sampling
settings and required tools in thinking mode, missing reasoning of earlier turns (with
`--strict-deepseek` these four are as there), other spellings of `thinking` and `reasoning_effort`,
a budget of thinking tokens, `top_k`, `min_p`, `repetition_penalty`, and token ids in the answer.
Unknown fields are ignored.
"""

import dataclasses
import re
from typing import Any

from v4jax.arguments import FLAG, TEXT, Kind, choice, instance, integer, number, predicate, sequence
from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams
from v4jax.text.stopping import STOP, StopStrings

from .conversation import EFFORT, ChatRequest
from .errors import ApiError
from .fields import Fields

MAX_TOOLS, MAX_STOP_LENGTH = 128, 512
# The hosted API's former name of its model without thinking.
WITHOUT_THINKING = "deepseek-chat"

_NAME = predicate(
    "1 to 64 letters, digits, - and _",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", value)),
)
_COUNT = integer(1)
_ALTERNATIVES = integer(0, 20, "an integer from 0 to 20")
_OBJECT = instance("an object", dict)
_USER = predicate(
    "a string of at most 512 bytes", lambda v: isinstance(v, str) and len(v.encode()) <= 512
)
_MESSAGES = sequence("a list of one or more messages", least=1)
_TEMPERATURE = number("a number from 0 to 2", lambda x: 0 <= x <= 2)
_SAMPLING: dict[str, Kind] = sampling.KINDS | {"temperature": _TEMPERATURE}
_UNSUPPORTED = ("functions", "function_call", "logit_bias", "audio")


def read_request(body: Fields, *, strict: bool) -> ChatRequest:
    """Read the body of a request.

    Args:
      body: the body.
      strict: whether to refuse and ignore what the hosted API does.

    Raises:
      ApiError: a field is missing, wrong or not supported.
    """
    for name in _UNSUPPORTED:
        if body.values.get(name):
            body.refuse(name, "is not supported; leave it out.")
    body.read("n", integer(1, 1, "1"))
    model = body.require("model", TEXT)
    thinking, effort, budget = _read_thinking(body, model)
    body.require("messages", _MESSAGES)
    messages = [_read_message(message) for message in body.objects("messages")]
    tools = _read_tools(body)
    stream, include_usage = read_stream(body)
    request = ChatRequest(
        model=model,
        messages=messages,
        tools=tools,
        tool_choice=_read_tool_choice(body, tools),
        thinking=thinking,
        effort=effort,
        thinking_budget=budget,
        max_tokens=body.read("max_completion_tokens", _COUNT) or body.read("max_tokens", _COUNT),
        sampling=read_sampling(body),
        stop=read_stop(body),
        json=_read_format(body),
        top_logprobs=_read_logprobs(body),
        stream=stream,
        include_usage=include_usage,
        prefix=_read_prefix(body),
        user=read_user(body),
        token_ids=body.read("return_token_ids", FLAG, False),
    )
    return _as_hosted(request) if strict else request


def read_sampling(body: Fields) -> SamplingParams:
    """The sampling settings, by their usual names."""
    given = {name: body.read(name, kind) for name, kind in _SAMPLING.items() if name in body}
    return SamplingParams(**given)


def read_stop(body: Fields, name: str = "stop") -> tuple[str, ...]:
    """The stop strings, in the field of this name."""
    stop = tuple(body.read(name, STOP, []))
    try:
        StopStrings(stop)
    except ValueError as error:
        body.refuse(name, f"is wrong. {error}")
    if any(len(text) > MAX_STOP_LENGTH for text in stop):
        body.refuse(name, f"has a string of more than {MAX_STOP_LENGTH} characters.")
    return stop


def read_stream(body: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether with usage."""
    stream = body.read("stream", FLAG, False)
    if "stream_options" in body and not stream:
        body.refuse("stream_options", "needs stream to be true.")
    return stream, body.object("stream_options").read("include_usage", FLAG, False)


def read_user(body: Fields) -> str:
    """The user, whose prefixes are not shared with others."""
    return body.read("user_id", _USER) or body.read("user", _USER, "")


def _read_thinking(body: Fields, model: str) -> tuple[bool, str | None, int | None]:
    """Whether to think, the effort, and the most tokens of thinking."""
    thinking, reasoning = body.object("thinking"), body.object("reasoning")
    template = body.object("chat_template_kwargs")
    efforts = (
        body.read("reasoning_effort", EFFORT),
        reasoning.read("effort", EFFORT),
        template.read("reasoning_effort", EFFORT),
    )
    effort = next(filter(None, efforts), None)
    kind = thinking.read("type", choice("enabled", "disabled", "adaptive"))
    switches = (
        kind and kind != "disabled",
        template.read("thinking", FLAG),
        template.read("enable_thinking", FLAG),
        reasoning.read("enabled", FLAG),
        effort and effort != "none",
    )
    default = model != WITHOUT_THINKING
    on = next((bool(switch) for switch in switches if switch is not None), default)
    budget = thinking.read("budget_tokens", _COUNT) or body.read("thinking_token_budget", _COUNT)
    return on, None if effort == "none" else effort, budget


def _read_message(message: Fields) -> dict[str, Any]:
    role = message.require("role", choice("system", "developer", "user", "assistant", "tool"))
    if role != "assistant" and "content" not in message:
        message.refuse("content", "is missing; give a string or a list of text parts.")
    content = message.values.get("content")
    if not isinstance(content, str | None):
        content = [_read_part(part) for part in message.objects("content")]
    read = {"role": "system" if role == "developer" else role, "content": content or ""}
    if role == "tool":
        read["tool_call_id"] = message.require("tool_call_id", TEXT)
    if role == "assistant":
        reasoning = message.read("reasoning_content", TEXT)
        read["reasoning_content"] = message.read("reasoning", TEXT, reasoning)
        read["tool_calls"] = [_read_call(call) for call in message.objects("tool_calls")]
    return read


def _read_part(part: Fields) -> dict[str, str]:
    part.read("type", choice("text"), "text")
    return {"type": "text", "text": part.require("text", TEXT)}


def _read_call(call: Fields) -> dict[str, Any]:
    call.read("type", choice("function"))
    function = call.object("function")
    read = {n: function.require(n, TEXT) for n in ("name", "arguments")}
    return {"id": call.require("id", TEXT), "type": "function", "function": read}


def _read_prefix(body: Fields) -> bool:
    """Whether the last message, which may be an answer's beginning, is to be continued."""
    *earlier, last = body.objects("messages")
    for message in earlier:
        if message.read("prefix", FLAG):
            message.refuse("prefix", "is true; only the last message may be a prefix.")
    prefix, role = last.read("prefix", FLAG, False), last.values["role"]
    if prefix and (role != "assistant" or last.values.get("tool_calls")):
        last.refuse("prefix", "is true; only an assistant's message without calls may be a prefix.")
    if role == "assistant" and not prefix:
        last.refuse("role", "is 'assistant'; set prefix to true for the model to continue it.")
    return prefix


def _read_tools(body: Fields) -> list[dict[str, Any]]:
    tools = list(body.objects("tools"))
    if len(tools) > MAX_TOOLS:
        body.refuse("tools", f"has {len(tools)} tools; at most {MAX_TOOLS} are allowed.")
    functions: dict[str, dict[str, Any]] = {}
    for tool in tools:
        tool.require("type", choice("function"))
        function = tool.object("function")
        name = function.require("name", _NAME)
        function.read("description", TEXT)
        function.read("parameters", _OBJECT)
        function.read("strict", FLAG)
        if name in functions:
            function.refuse("name", f"is '{name}', as of an earlier tool; names must differ.")
        functions[name] = function.values
    return [*functions.values()]


def _read_tool_choice(body: Fields, tools: list[dict[str, Any]]) -> str | dict[str, str]:
    value = body.values.get("tool_choice")
    if isinstance(value, dict):
        name = body.object("tool_choice").object("function").require("name", _NAME)
        if name not in [tool["name"] for tool in tools]:
            body.refuse("tool_choice", f"names the function '{name}', which is not in tools.")
        return {"name": name}
    read = body.read("tool_choice", choice("none", "auto", "required"), "auto")
    if read == "required" and not tools:
        body.refuse("tool_choice", "is 'required', but there are no tools.")
    return read


def _read_format(body: Fields) -> Any:
    form = body.object("response_format")
    match form.read("type", choice("text", "json_object", "json_schema"), "text"):
        case "json_object":
            return True
        case "json_schema":
            return form.object("json_schema").require("schema", _OBJECT)
    return None


def _read_logprobs(body: Fields) -> int | None:
    top = body.read("top_logprobs", _ALTERNATIVES)
    if body.read("logprobs", FLAG, False):
        return top or 0
    if top:
        body.refuse("top_logprobs", "needs logprobs to be true.")
    return None


def _as_hosted(request: ChatRequest) -> ChatRequest:
    """The request as DeepSeek's hosted API understands it.

    Raises:
      ApiError: the hosted API refuses it.
    """
    if isinstance(request.json, dict):
        raise ApiError(400, "This response_format type is unavailable now")
    if not request.thinking:
        return request
    if request.tool_choice not in ("none", "auto"):
        raise ApiError(400, "Thinking mode does not support this tool_choice")
    for message in request.messages:
        if message.get("tool_calls") and message["reasoning_content"] is None:
            text = "The reasoning_content in the thinking mode must be passed back to the API."
            raise ApiError(400, text)
    settled = SamplingParams(seed=request.sampling.seed)
    return dataclasses.replace(request, sampling=settled)
