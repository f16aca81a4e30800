"""From a chat request to the tokens of its prompt."""

import dataclasses
from typing import Any

from v4jax.text.chat import END_THINK, chat_segments

from .conversation import EFFORTS, ChatRequest
from .errors import ApiError
from .service import Service


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation in tokens.

    Attributes:
      tokens: the ids.
      thinking: whether what follows begins inside the reasoning.
    """

    tokens: list[int]
    thinking: bool


def encode(service: Service, request: ChatRequest) -> Prompt:
    """The tokens of a request's conversation; calls that the model made are replayed.

    Raises:
      ApiError: the messages cannot be encoded.
    """
    messages = _messages(request)
    thinking = request.thinking
    mode = "thinking" if thinking else "chat"
    effort = EFFORTS[service.revision][request.effort] if thinking else None
    try:
        segments = chat_segments(messages, mode, effort, revision=service.revision)
    except ValueError as error:
        raise ApiError(422, str(error)) from None
    if request.prefix and not messages[-1]["content"]:
        # Without an answer to continue, it is the reasoning that goes on.
        last = max((i for i, segment in enumerate(segments) if segment.reasoning), default=0)
        opened = segments[last].text.removesuffix(END_THINK)
        segments[last] = dataclasses.replace(segments[last], text=opened)
    elif request.prefix:
        thinking = False
    turns = {i: service.replays.find(message) for i, message in enumerate(messages)}
    tokens: list[int] = []
    text = ""
    for segment in segments:
        turn = None if segment.message is None else turns[segment.message]
        sampled = turn and (turn.reasoning if segment.reasoning else turn.answer)
        if sampled:
            tokens += [*service.tokenizer.encode(text), *sampled]
            text = ""
        else:
            text += segment.text
    return Prompt(tokens + service.tokenizer.encode(text), thinking)


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    """The messages for the encoder, with tools and the answer's format in the first."""
    messages = [dict(message) for message in request.messages]
    for i, message in enumerate(messages):
        ends = i + 1 == len(messages) or messages[i + 1]["role"] == "assistant"
        if i and ends and message["role"] == "system":
            # The encoder opens an answer only after a user's message.
            message["role"] = "user"
    if request.prefix:
        messages[-1]["wo_eos"] = True
    elif messages[-1]["role"] == "system":
        messages.append({"role": "user", "content": ""})
    sections: dict[str, Any] = {}
    if tools := request.callable_tools:
        functions = [{k: v for k, v in tool.items() if k != "strict"} for tool in tools]
        sections["tools"] = [{"type": "function", "function": f} for f in functions]
    if isinstance(request.json, dict):
        sections["response_format"] = request.json
    if sections:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0] |= sections
    return messages
