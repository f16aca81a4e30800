"""Requests of chat completions, as in DeepSeek's and OpenAI's interfaces.

Accepted beyond DeepSeek's hosted API: JSON schemas, `seed`, `max_completion_tokens`, sampling
settings and required tools in thinking mode, missing reasoning of earlier turns (with
`--strict-deepseek` these are as there), other spellings of `thinking` and `reasoning_effort`, a
budget of thinking tokens, `top_k`, `min_p`, `repetition_penalty`, and token ids and the prompt's
log-probabilities in the answer. Unknown fields are ignored.
"""

import dataclasses
from typing import Any

from v4jax.decoding.sampling import SamplingParams

from . import dialects
from .conversation import ChatRequest
from .dialects import ALTERNATIVES, COUNT, EFFORT, NAME
from .errors import ApiError
from .fields import (
    FLAG,
    TEXT,
    Fields,
    choice,
    default,
    integer,
    required,
    sequence,
    table,
    tagged,
    text_or,
    unsupported,
)

# The hosted API's former name of its model without thinking.
WITHOUT_THINKING = "deepseek-chat"

_CONTENT = {"content": required(dialects.texts("text")), "prefix": default(FLAG, False)}
_CALL = table(
    id=required(TEXT),
    type=choice("function"),
    function=required(table(name=required(TEXT), arguments=required(TEXT))),
)
_ASSISTANT = {
    "content": dialects.texts("text"),
    "reasoning_content": TEXT,
    "reasoning": TEXT,
    "tool_calls": sequence(_CALL),
    "prefix": default(FLAG, False),
}
_ROLES = {
    **dict.fromkeys(("system", "developer", "user"), _CONTENT),
    "assistant": _ASSISTANT,
    "tool": _CONTENT | {"tool_call_id": required(TEXT)},
}
_FUNCTION = table(**dialects.function_fields("parameters"))
_TOOL = table(type=required(choice("function")), function=required(_FUNCTION))
BODY = table(
    **dialects.COMMON,
    **dict.fromkeys(
        ("functions", "function_call", "logit_bias", "audio"), unsupported("; leave it out.")
    ),
    n=integer(1, 1),
    messages=required(sequence(tagged("role", _ROLES), least=1)),
    max_tokens=COUNT,
    max_completion_tokens=COUNT,
    stop=dialects.STOP,
    stream_options=dialects.STREAM_OPTIONS,
    logprobs=default(FLAG, False),
    top_logprobs=ALTERNATIVES,
    prompt_logprobs=ALTERNATIVES,
    return_routed_experts=default(FLAG, False),
    response_format=dialects.answer_format(nested=True),
    tools=sequence(_TOOL, most=dialects.MAX_TOOLS),
    tool_choice=text_or(table(function=required(table(name=required(NAME)))), dialects.TOOL_CHOICE),
    thinking=table(type=choice("enabled", "adaptive", "disabled"), budget_tokens=COUNT),
    thinking_token_budget=COUNT,
    reasoning_effort=EFFORT,
    reasoning=table(effort=EFFORT, enabled=FLAG),
    chat_template_kwargs=table(thinking=FLAG, enable_thinking=FLAG, reasoning_effort=EFFORT),
)


def read_request(body: Fields, *, strict: bool) -> ChatRequest:
    """The request in a body.

    Args:
      body: as read by `BODY`.
      strict: whether to refuse and ignore what the hosted API does.

    Raises:
      ApiError: fields contradict each other, or are not supported.
    """
    thinking, effort = _thinking(body)
    if body.top_logprobs and not body.logprobs:
        body.refuse("top_logprobs", "needs logprobs to be true.")
    tool_choice = body.tool_choice
    if isinstance(tool_choice, Fields):
        tool_choice = {"name": tool_choice.function.name}
    request = ChatRequest(
        **dialects.common(body),
        messages=[_message(message) for message in body.messages],
        tools=[tool.function.raw for tool in body.tools],
        tool_choice=tool_choice or "auto",
        thinking=thinking,
        effort=effort,
        thinking_budget=body.thinking.budget_tokens or body.thinking_token_budget,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=body.stop,
        json=body.response_format,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        routed_experts=body.return_routed_experts,
        include_usage=dialects.include_usage(body),
        prefix=_is_prefix(body),
    )
    dialects.check_tools(body, request)
    return _as_hosted(request) if strict else request


def _thinking(body: Fields) -> tuple[bool, str | None]:
    """Whether to think, and the effort."""
    template = body.chat_template_kwargs
    efforts = (body.reasoning_effort, body.reasoning.effort, template.reasoning_effort)
    effort = next(filter(None, efforts), None)
    kind = body.thinking.type
    switches = (
        kind and kind != "disabled",
        template.thinking,
        template.enable_thinking,
        body.reasoning.enabled,
        effort and effort != "none",
    )
    given = [bool(switch) for switch in switches if switch is not None]
    on = given[0] if given else body.model != WITHOUT_THINKING
    return on, None if effort == "none" else effort


def _message(message: Fields) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    read = {"role": role, "content": dialects.joined(message.content)}
    if role == "tool":
        read["tool_call_id"] = message.tool_call_id
    if role == "assistant":
        reasoning = message.reasoning
        read["reasoning_content"] = message.reasoning_content if reasoning is None else reasoning
        read["tool_calls"] = [
            dialects.call(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls
        ]
    return read


def _is_prefix(body: Fields) -> bool:
    """Whether the last message, which may be an answer's beginning, is to be continued."""
    *earlier, last = body.messages
    for message in earlier:
        if message.prefix:
            message.refuse("prefix", "is true; only the last message may be a prefix.")
    is_answer = last.role == "assistant"
    if last.prefix and not (is_answer and not last.tool_calls):
        last.refuse("prefix", "is true; only an assistant's message without calls may be a prefix.")
    if is_answer and not last.prefix:
        last.refuse("role", "is 'assistant'; set prefix to true for the model to continue it.")
    return last.prefix


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
