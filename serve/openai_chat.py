"""Chat completions, as in DeepSeek's and OpenAI's interfaces: answers, whole and streamed."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.engine.request import Token, Usage
from v4jax.text.chat import END_THINK
from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from v4jax.text.tokenizer import Tokenizer

from .answer import answer
from .chat_request import read_request
from .conversation import ChatRequest, Delta, Update
from .fields import read_body
from .service import Service
from .streams import DONE, KEEP_ALIVE, event, event_stream, whole

LOWEST = -9999.0  # the log-probability of what is all but impossible


async def _chat(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, service.limits.body_bytes)
    request = read_request(body, strict=service.strict)
    writer = _Writer(service, request)
    updates = answer(service, request)
    if request.stream:
        return event_stream(writer.chunks(updates), lambda error: event(error.body()))
    return whole(updates, writer.completion)


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


def head(kind: str, prefix: str, model: str, fingerprint: str) -> dict[str, Any]:
    """The fields that begin a completion and each of its chunks."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


class _Writer:
    """Writes the updates of one answer."""

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._request, self._tokenizer = request, service.tokenizer
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = head(kind, "chatcmpl", request.model, service.fingerprint)
        # Tokens that are in no text.
        self._marks = {*service.eos_ids, service.tokenizer.token_id(END_THINK)}

    def completion(self, updates: Sequence[Update]) -> dict[str, Any]:
        """The answer as a whole."""
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._request.thinking:
            message["reasoning_content"] = ""
        for delta in (delta for update in updates for delta in update.deltas):
            match delta:
                case ContentDelta(text):
                    message["content"] += text
                case ReasoningDelta(text):
                    message["reasoning_content"] = message.get("reasoning_content", "") + text
                case ToolCallStart(_, call_id, name):
                    function = {"name": name, "arguments": ""}
                    call = {"id": call_id, "type": "function", "function": function}
                    message.setdefault("tool_calls", []).append(call)
                case ArgumentsDelta(index, text):
                    message["tool_calls"][index]["function"]["arguments"] += text
        last = updates[-1]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(updates),
            "finish_reason": finish_reason(last),
        }
        body = self._head | {
            "choices": [choice],
            "usage": usage_fields(last.usage, last.reasoning_tokens),
        }
        if self._request.token_ids:
            body["prompt_token_ids"] = [token.id for update in updates for token in update.prompt]
            choice["token_ids"] = [token.id for update in updates for token in update.tokens]
        return body

    async def chunks(self, updates: AsyncGenerator[Update]) -> AsyncGenerator[str]:
        """The answer as server-sent events."""
        started = False
        prompt: tuple[Token, ...] = ()
        async with contextlib.aclosing(updates):
            async for update in updates:
                prompt += update.prompt
                if update.is_empty:
                    yield KEEP_ALIVE
                    continue
                if not started:
                    started = True
                    yield event(self._first(prompt))
                deltas = [self._delta(delta) for delta in update.deltas]
                if update.finish is not None:
                    deltas.append({"content": ""})
                for i, delta in enumerate(deltas):
                    chunk = self._chunk(delta, update if i == 0 else None)
                    if update.finish is not None and i + 1 == len(deltas):
                        chunk["choices"][0]["finish_reason"] = finish_reason(update)
                        chunk["usage"] = usage_fields(update.usage, update.reasoning_tokens)
                    yield event(chunk)
        yield DONE

    def _first(self, prompt: Sequence[Token]) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._request.thinking:
            delta |= {"content": None, "reasoning_content": ""}
        ids = {"prompt_token_ids": [token.id for token in prompt]}
        return self._chunk(delta) | (ids if self._request.token_ids else {})

    def _chunk(self, delta: dict[str, Any], update: Update | None = None) -> dict[str, Any]:
        """A chunk; with an update, it carries the log-probabilities and ids of its tokens."""
        choice: dict[str, Any] = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs([update]) if update else None,
            "finish_reason": None,
        }
        if update and self._request.token_ids:
            choice["token_ids"] = [token.id for token in update.tokens]
        usage = {"usage": None} if self._request.include_usage else {}
        return self._head | {"choices": [choice]} | usage

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
        return [
            _entry(self._tokenizer, token.id, token.logprob)
            | {"top_logprobs": [_entry(self._tokenizer, *top) for top in token.top]}
            for token in tokens
            if token.id not in self._marks
        ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    text = raw.decode(errors="replace")
    return {"token": text, "logprob": max(LOWEST, logprob), "bytes": [*raw]}
