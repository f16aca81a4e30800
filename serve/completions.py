"""Text completions and the filling in of a middle, as in DeepSeek's and OpenAI's interfaces.

Prompts are continued unchanged; only a prefix with a suffix gets the tokens of its format.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.arguments import FLAG, TEXT, TOKEN_IDS, integer, shown
from v4jax.engine.request import Token, Usage
from v4jax.text.chat import BOS
from v4jax.text.chat_parser import ContentDelta
from v4jax.text.tokenizer import Tokenizer

from .answer import continue_text
from .chat_request import read_sampling, read_stop, read_stream, read_user
from .conversation import TextRequest, Update
from .errors import ApiError, json_text
from .fields import Fields, read_body
from .openai_chat import LOWEST, finish_reason, head, usage_fields
from .service import Service
from .streams import DONE, KEEP_ALIVE, event, event_stream, json_stream

MAX_PROMPTS = 256
_TOGETHER = 8  # prompts of one request that run at the same time
_DEFAULT_TOKENS = 16
_BAR, _BLANK = "\uff5c", "\u2581"
# Tokens before a prefix, between it and its suffix, and after that.
_MIDDLE = [f"<{_BAR}fim{_BLANK}{part}{_BAR}>" for part in ("begin", "hole", "end")]


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
    body = await read_body(http, service.limits.body_bytes)
    writer = _Writer(service, await asyncio.to_thread(read_request, body, service))
    if writer.request.stream:
        return event_stream(writer.chunks(), lambda error: event(error.body()))
    return json_stream(writer.whole())


ROUTES = [Route(f"{root}/completions", _complete, methods=["POST"]) for root in ("/v1", "/beta")]


def read_request(body: Fields, service: Service) -> CompletionRequest:
    """Read the body of a request.

    Raises:
      ApiError: a field is missing, wrong or not supported.
    """
    for name in ("n", "best_of"):
        body.read(name, integer(1, 1, "1"))
    echo, suffix = body.read("echo", FLAG, False), body.read("suffix", TEXT)
    prompts = _read_prompts(body, service)
    if suffix is not None:
        if echo or not isinstance(prompt := body.values["prompt"], str):
            body.refuse("suffix", "needs a prompt that is one string, and no echo.")
        prompts = [_around_middle(service.tokenizer, prompt, suffix)]
    stream, include_usage = read_stream(body)
    return CompletionRequest(
        model=body.require("model", TEXT),
        prompts=prompts,
        echo=echo,
        max_tokens=body.read("max_tokens", integer(0), _DEFAULT_TOKENS),
        sampling=read_sampling(body),
        stop=read_stop(body),
        top_logprobs=body.read("logprobs", integer(0, 20, "an integer from 0 to 20")),
        stream=stream,
        include_usage=include_usage,
        user=read_user(body),
        token_ids=body.read("return_token_ids", FLAG, False),
    )


def _read_prompts(body: Fields, service: Service) -> list[list[int]]:
    """The tokens of a prompt, or of each of several."""
    value = body.values.get("prompt")
    several = isinstance(value, list) and not all(type(item) is int for item in value)
    prompts = value if isinstance(value, list) and several else [value]
    if len(prompts) > MAX_PROMPTS:
        body.refuse("prompt", f"has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed.")
    tokens = []
    for i, prompt in enumerate(prompts):
        name = f"prompt[{i}]" if several else "prompt"
        if isinstance(prompt, str):
            ids = service.tokenizer.encode(prompt)
        else:
            ids = Fields({name: prompt}).require(name, TOKEN_IDS)
        if not ids:
            body.refuse(name, "is empty; give at least one token.")
        if (highest := max(ids)) >= service.vocab_size:
            body.refuse(name, f"has token {shown(highest)}; there are {service.vocab_size}.")
        tokens.append(ids)
    return tokens


def _around_middle(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    if any(tokenizer.token_id(mark) is None for mark in _MIDDLE):
        raise ApiError(400, "suffix: this checkpoint's tokenizer has no tokens for a middle.")
    begin, hole, end = _MIDDLE
    return tokenizer.encode(f"{BOS}{begin}{prefix}{hole}{suffix}{end}")


class _Writer:
    """Writes the texts of one request."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._service, self.request = service, request
        self._head = head("text_completion", "cmpl", request.model, service.fingerprint)

    def _updates(self, index: int) -> AsyncGenerator[Update]:
        prompt, request = self.request.prompts[index], self.request
        prompt_logprobs = request.echo and request.top_logprobs is not None
        return continue_text(self._service, request, prompt, prompt_logprobs=prompt_logprobs)

    async def whole(self) -> AsyncGenerator[str]:
        """All texts in one JSON object, after blank lines that keep the connection alive."""
        gathered = asyncio.ensure_future(self._gathered())
        try:
            seconds = self._service.limits.keep_alive
            while not (await asyncio.wait({gathered}, timeout=seconds))[0]:
                yield "\n"
            answers = gathered.result()
        finally:
            gathered.cancel()
        choices = [self._choice(i, updates, _Text()) for i, updates in enumerate(answers)]
        usage = _total([updates[-1].usage for updates in answers])
        yield json_text(self._head | {"choices": choices, "usage": usage})

    async def _gathered(self) -> list[list[Update]]:
        """The updates of each text."""
        limit = asyncio.Semaphore(_TOGETHER)

        async def one(index: int) -> list[Update]:
            async with limit, contextlib.aclosing(self._updates(index)) as updates:
                return [update async for update in updates]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i)) for i in range(len(self.request.prompts))]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def chunks(self) -> AsyncGenerator[str]:
        """The texts as server-sent events, one text after the other."""
        usages: list[Usage] = []
        null_usage = {"usage": None} if self.request.include_usage else {}
        for i in range(len(self.request.prompts)):
            text = _Text()
            async with contextlib.aclosing(self._updates(i)) as updates:
                async for update in updates:
                    if update.is_empty:
                        yield KEEP_ALIVE
                        continue
                    choice = self._choice(i, [update], text)
                    yield event(self._head | {"choices": [choice]} | null_usage)
                    if update.finish:
                        usages.append(update.usage)
        if self.request.include_usage:
            yield event(self._head | {"choices": [], "usage": _total(usages)})
        yield DONE

    def _choice(self, index: int, updates: Sequence[Update], text: "_Text") -> dict[str, Any]:
        """A choice with the text of some updates, which continue what `text` has seen."""
        request, tokenizer = self.request, self._service.tokenizer
        tokens = [token for update in updates for token in (*update.prompt, *update.tokens)]
        deltas = [delta for update in updates for delta in update.deltas]
        new = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        begins, text.begins = text.begins, False
        echo = tokenizer.decode(request.prompts[index]) if begins and request.echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + new,
            "logprobs": None if request.top_logprobs is None else text.logprobs(tokenizer, tokens),
            "finish_reason": finish_reason(updates[-1]),
        }
        if request.token_ids:
            choice["token_ids"] = [token.id for update in updates for token in update.tokens]
            choice |= {"prompt_token_ids": request.prompts[index]} if begins else {}
        return choice


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


def _total(usages: Sequence[Usage]) -> dict[str, Any]:
    """The usage of several texts together."""
    return usage_fields(
        Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
        )
    )
