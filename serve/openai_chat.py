"""Chat completions, as in DeepSeek's and OpenAI's interfaces: answers, whole and streamed."""

import base64
import io
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.engine.request import Token, Usage
from v4jax.text.chat import END_THINK
from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from v4jax.text.tokenizer import Tokenizer

from .answer import answer
from .chat_request import BODY, read_request
from .conversation import ChatRequest, Delta, Update, message_of
from .fields import read_body
from .service import Service
from .streams import DONE, Writer, respond

LOWEST = -9999.0  # the log-probability of what is all but impossible


async def _chat(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, BODY)
    request = read_request(body, strict=service.strict)
    return respond(service, request, answer(service, request), ChatWriter(service, request))


ROUTES = [
    Route(f"{root}/chat/completions", _chat, methods=["POST"]) for root in ("", "/v1", "/beta")
]


def usage_fields(usage: Usage, reasoning_tokens: int = 0) -> dict[str, Any]:
    """Usage in DeepSeek's and in OpenAI's spelling."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def finish_reason(update: Update) -> str | None:
    """Why an answer has ended, by this dialect's name."""
    return "insufficient_system_resource" if update.finish == "overload" else update.finish


def experts(last: Update) -> dict[str, Any]:
    """The experts chosen for each token, as the bytes of an .npy file in base64."""
    if last.expert_TLA is None:
        return {}
    file = io.BytesIO()
    np.save(file, last.expert_TLA)
    return {"routed_experts": base64.b64encode(file.getvalue()).decode()}


def head(kind: str, prefix: str, model: str, fingerprint: str) -> dict[str, Any]:
    """The fields that begin a completion and each of its chunks."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


class ChatWriter(Writer):
    """Writes an answer as a completion, or as its chunks."""

    end = DONE

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._request, self._tokenizer = request, service.tokenizer
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = head(kind, "chatcmpl", request.model, service.fingerprint)
        # Tokens that are in no text.
        self._marks = {*service.eos_ids, service.tokenizer.token_id(END_THINK)}
        self._begun = False

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        """The completion."""
        message = message_of(delta for update in updates for delta in update.deltas)
        if not (self._request.thinking or message["reasoning_content"]):
            del message["reasoning_content"]
        if not message["tool_calls"]:
            del message["tool_calls"]
        last = updates[-1]
        choice = self._choice(updates, message=message) | {"finish_reason": finish_reason(last)}
        prompt = [token for update in updates for token in update.prompt]
        usage = {"usage": usage_fields(last.usage, last.reasoning_tokens)}
        return self._head | {"choices": [choice]} | usage | self._prompt(prompt)

    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The chunks of the answer's next update; the tokens are those of the first."""
        if update.is_empty:
            return
        if not self._begun:
            self._begun = True
            thinking = {"content": None, "reasoning_content": ""} if self._request.thinking else {}
            first = {"role": "assistant", "content": ""} | thinking
            yield self._chunk(first) | self._prompt(update.prompt)
        deltas = [self._delta(delta) for delta in update.deltas]
        if update.finish is not None:
            deltas.append({"content": ""})
        chunks = [self._chunk(delta, [] if i else [update]) for i, delta in enumerate(deltas)]
        if update.finish is not None:
            chunks[-1]["choices"][0]["finish_reason"] = finish_reason(update)
            chunks[-1]["usage"] = usage_fields(update.usage, update.reasoning_tokens)
        yield from chunks

    def _chunk(self, delta: dict[str, Any], updates: Sequence[Update] = ()) -> dict[str, Any]:
        """A chunk, with the log-probabilities and ids of the updates' tokens."""
        choice = self._choice(updates, delta=delta)
        usage = {"usage": None} if self._request.include_usage else {}
        return self._head | {"choices": [choice]} | usage

    def _choice(self, updates: Sequence[Update], **text: Any) -> dict[str, Any]:
        logprobs = self._logprobs(updates) if updates else None
        choice = {"index": 0, **text, "logprobs": logprobs, "finish_reason": None}
        if updates and self._request.token_ids:
            choice["token_ids"] = [token.id for update in updates for token in update.tokens]
        return choice | (experts(updates[-1]) if updates else {})

    def _prompt(self, prompt: Sequence[Token]) -> dict[str, Any]:
        """What was asked about the prompt's tokens."""
        fields: dict[str, Any] = {}
        if self._request.token_ids:
            fields["prompt_token_ids"] = [token.id for token in prompt]
        if (count := self._request.prompt_logprobs) is not None:
            ranked = [self._ranked(token, count) for token in prompt[1:]]
            fields["prompt_logprobs"] = [None, *ranked]
        return fields

    def _ranked(self, token: Token, count: int) -> dict[str, Any]:
        """A token of the prompt and its alternatives by their ids, in vLLM's format."""
        ranks = {top: rank for rank, (top, _) in enumerate(token.top, 1)}
        text = lambda id: self._tokenizer.token_bytes(id).decode(errors="replace")
        return {
            str(id): {
                "logprob": max(LOWEST, logprob),
                "rank": ranks.get(id),
                "decoded_token": text(id),
            }
            for id, logprob in ((token.id, token.logprob), *token.top[:count])
        }

    def _delta(self, delta: Delta) -> dict[str, Any]:
        match delta:
            case ReasoningDelta(text):
                return {"content": None, "reasoning_content": text}
            case ContentDelta(text):
                nulls = {"reasoning_content": None} if self._request.thinking else {}
                return {"content": text} | nulls
            case ToolCallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case ArgumentsDelta(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _logprobs(self, updates: Sequence[Update]) -> dict[str, Any] | None:
        if self._request.top_logprobs is None:
            return None
        reasoning = [token for update in updates for token in update.tokens[: update.reasoning]]
        content = [token for update in updates for token in update.tokens[update.reasoning :]]
        entries = {"content": self._entries(content)}
        if self._request.thinking:
            entries["reasoning_content"] = self._entries(reasoning)
        return entries

    def _entries(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        tops = lambda token: token.top[: self._request.top_logprobs]
        return [
            _entry(self._tokenizer, token.id, token.logprob)
            | {"top_logprobs": [_entry(self._tokenizer, *top) for top in tops(token)]}
            for token in tokens
            if token.id not in self._marks
        ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    text = raw.decode(errors="replace")
    return {"token": text, "logprob": max(LOWEST, logprob), "bytes": [*raw]}
