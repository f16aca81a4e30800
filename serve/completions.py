"""Text completions and the filling in of a middle, as in DeepSeek's and OpenAI's interfaces.

Prompts are continued unchanged; only a prefix with a suffix gets the tokens of its format.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax import arguments
from v4jax.arguments import Invalid, Kind, shown
from v4jax.engine.request import Token, Usage
from v4jax.text.chat import BOS
from v4jax.text.chat_parser import ContentDelta
from v4jax.text.tokenizer import Tokenizer

from . import dialects
from .answer import continue_text
from .conversation import TextRequest, Update
from .errors import ApiError
from .fields import (
    FLAG,
    TEXT,
    TOKEN_IDS,
    Fields,
    default,
    integer,
    leaf,
    read_body,
    required,
    table,
)
from .openai_chat import LOWEST, experts, finish_reason, head, usage_fields
from .service import Service
from .streams import DONE, Writer, respond

MAX_PROMPTS = 256
_TOGETHER = 8  # prompts of one request that run at the same time
_DEFAULT_TOKENS = 16
_BAR, _BLANK = "\uff5c", "\u2581"
# Tokens before a prefix, between it and its suffix, and after that.
_MIDDLE = [f"<{_BAR}fim{_BLANK}{part}{_BAR}>" for part in ("begin", "hole", "end")]


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt or several, as a list."""
    several = isinstance(value, list) and not all(type(item) is int for item in value)
    prompts = value if several else [value]
    if len(prompts) > MAX_PROMPTS:
        raise Invalid(f" has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed.")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise Invalid(f"{f'[{i}]' if several else ''} is empty; give at least one token.")
        if not isinstance(prompt, str):
            arguments.TOKEN_IDS.read(prompt)
    return prompts


_PROMPT = [TEXT.schema | {"minLength": 1}, TOKEN_IDS.schema | {"minItems": 1}]
_SEVERAL = {"type": "array", "items": {"anyOf": _PROMPT}, "minItems": 1, "maxItems": MAX_PROMPTS}
BODY = table(
    **dialects.COMMON,
    **dict.fromkeys(("n", "best_of"), integer(1, 1)),
    prompt=required(
        leaf(Kind("text, token ids or a list of these", _prompts), anyOf=[*_PROMPT, _SEVERAL])
    ),
    suffix=TEXT,
    echo=default(FLAG, False),
    max_tokens=default(integer(0), _DEFAULT_TOKENS),
    stop=dialects.STOP,
    logprobs=dialects.ALTERNATIVES,
    return_routed_experts=default(FLAG, False),
    stream_options=dialects.STREAM_OPTIONS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(TextRequest):
    """Prompts to continue.

    Attributes:
      prompts: tokens of each.
      echo: whether each text begins with its prompt.
    """

    prompts: list[list[int]]
    echo: bool = False


async def _complete(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, BODY)
    request = await asyncio.to_thread(read_request, body, service)
    writer = CompletionWriter(service, request)
    return respond(service, request, _continued(service, request), writer)


ROUTES = [Route(f"{root}/completions", _complete, methods=["POST"]) for root in ("/v1", "/beta")]


def read_request(body: Fields, service: Service) -> CompletionRequest:
    """The request in a body.

    Raises:
      ApiError: fields contradict each other, or a prompt cannot be continued.
    """
    if body.suffix is None:
        prompts = [_tokens(body, prompt, service) for prompt in body.prompt]
    else:
        [prompt, *more] = body.prompt
        if body.echo or more or not isinstance(prompt, str):
            body.refuse("suffix", "needs a prompt that is one string, and no echo.")
        prompts = [_around_middle(service.tokenizer, prompt, body.suffix)]
    for prompt in prompts:
        service.room(len(prompt), body.max_tokens)
    return CompletionRequest(
        **dialects.common(body),
        prompts=prompts,
        echo=body.echo,
        max_tokens=body.max_tokens,
        stop=body.stop,
        top_logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        routed_experts=body.return_routed_experts,
        include_usage=dialects.include_usage(body),
    )


def _tokens(body: Fields, prompt: str | list[int], service: Service) -> list[int]:
    if isinstance(prompt, str):
        return service.tokenizer.encode(prompt)
    if (highest := max(prompt)) >= service.vocab_size:
        body.refuse("prompt", f"has token {shown(highest)}; there are {service.vocab_size}.")
    return prompt


def _around_middle(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    if any(tokenizer.token_id(mark) is None for mark in _MIDDLE):
        raise ApiError(400, "suffix: this checkpoint's tokenizer has no tokens for a middle.")
    begin, hole, end = _MIDDLE
    return tokenizer.encode(f"{BOS}{begin}{prefix}{hole}{suffix}{end}")


async def _continued(service: Service, request: CompletionRequest) -> AsyncGenerator[Update]:
    """The updates of all prompts' continuations, each with its index."""
    limit, queue = asyncio.Semaphore(_TOGETHER), asyncio.Queue[Update | None]()

    async def one(index: int, prompt: Sequence[int]) -> None:
        async with limit, contextlib.aclosing(continue_text(service, request, prompt)) as updates:
            async for update in updates:
                queue.put_nowait(dataclasses.replace(update, index=index))

    async def every() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, prompt in enumerate(request.prompts):
                    group.create_task(one(index, prompt))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            queue.put_nowait(None)

    running = asyncio.ensure_future(every())
    try:
        while update := await queue.get():
            yield update
        await running
    finally:
        running.cancel()
        await asyncio.wait({running})


class CompletionWriter(Writer):
    """Writes the texts of one request, each as a choice."""

    end = DONE

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._tokenizer, self._request = service.tokenizer, request
        self._head = head("text_completion", "cmpl", request.model, service.fingerprint)
        self._texts = [_Text() for _ in request.prompts]
        self._usages: list[Usage] = []

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        """All texts."""
        parts: list[list[Update]] = [[] for _ in self._request.prompts]
        for update in updates:
            parts[update.index].append(update)
        choices = [self._choice(part) for part in parts]
        return self._head | {"choices": choices, "usage": self._usage()}

    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The chunk of an update of one text; in the end, that with the usage of all."""
        if update.is_empty:
            return
        usage = {"usage": None} if self._request.include_usage else {}
        yield self._head | {"choices": [self._choice([update])]} | usage
        if self._request.include_usage and len(self._usages) == len(self._texts):
            yield self._head | {"choices": [], "usage": self._usage()}

    def _choice(self, updates: Sequence[Update]) -> dict[str, Any]:
        """A choice with the text of some updates, which continue those before."""
        request, last = self._request, updates[-1]
        text, prompt = self._texts[last.index], request.prompts[last.index]
        tokens = [token for update in updates for token in (*update.prompt, *update.tokens)]
        deltas = [delta for update in updates for delta in update.deltas]
        new = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        begins, text.begins = text.begins, False
        echo = self._tokenizer.decode(prompt) if begins and request.echo else ""
        logprobs = None if request.top_logprobs is None else text.logprobs(self._tokenizer, tokens)
        choice: dict[str, Any] = {
            "index": last.index,
            "text": echo + new,
            "logprobs": logprobs,
            "finish_reason": finish_reason(last),
        }
        if request.token_ids:
            choice["token_ids"] = [token.id for update in updates for token in update.tokens]
            choice |= {"prompt_token_ids": prompt} if begins else {}
        choice |= experts(last)
        if last.finish is not None:
            self._usages.append(last.usage)
        return choice

    def _usage(self) -> dict[str, Any]:
        """The usage of all texts together."""
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        return usage_fields(
            Usage(**{name: sum(getattr(usage, name) for usage in self._usages) for name in names})
        )


@dataclasses.dataclass
class _Text:
    """How far a text has been written.

    Attributes:
      begins: whether nothing has been written.
      offset: where the next token's text begins.
    """

    begins: bool = True
    offset: int = 0

    def logprobs(self, tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
        """Log-probabilities of the next tokens; null for the first of a prompt."""
        texts = [_token_text(tokenizer, token.id) for token in tokens]
        own = [None if math.isnan(t.logprob) else max(LOWEST, t.logprob) for t in tokens]
        tops = [
            {_token_text(tokenizer, i): max(LOWEST, value) for i, value in token.top}
            for token in tokens
        ]
        offsets = []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": own,
            "top_logprobs": [
                None if logprob is None else top | {text: logprob}
                for text, logprob, top in zip(texts, own, tops, strict=True)
            ],
            "text_offset": offsets,
        }


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A text that tells tokens apart, also if they are parts of a character."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
