"""The answer to a chat request, whatever the dialect: from messages to tokens and back."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from v4jax.engine.grammar import JSON_OBJECT
from v4jax.engine.request import Constraint, Event, QueueFull, Request, Token, Usage
from v4jax.text.reader import Watcher

from .conversation import EFFORTS, ChatRequest, TextRequest, Update
from .errors import ApiError
from .prompts import Prompt, encode
from .service import RETRY_SECONDS, Service, note
from .translation import Translation


async def answer(service: Service, request: ChatRequest) -> AsyncGenerator[Update]:
    """The answer in parts, with an empty update once the request is queued.

    More empty updates follow while there is nothing new. Closing the generator cancels the request.

    Raises:
      ApiError: the request is refused, before the first update, or fails, after it.
    """
    prompt, constraint = await asyncio.to_thread(_prepare, service, request)
    efforts = EFFORTS[service.revision]
    note(effort=efforts[request.effort] if request.thinking else "none")
    mode = "thinking" if prompt.thinking else "chat"
    reported = request.token_ids and request.prompt_logprobs is None
    ids = tuple(Token(token, math.nan) for token in prompt.tokens) if reported else ()
    translation = Translation(service, request, mode, ids)
    updates = _updates(service, request, translation, prompt.tokens, constraint)
    async with contextlib.aclosing(updates):
        async for update in updates:
            yield update


def continue_text(
    service: Service, request: TextRequest, prompt: Sequence[int]
) -> AsyncGenerator[Update]:
    """The continuation of a plain text, as from `answer`; all of it is content."""
    return _updates(service, request, Translation(service, request, "text"), prompt)


async def _updates(
    service: Service,
    request: TextRequest,
    translation: Translation,
    tokens: Sequence[int],
    constraint: Callable[[], Constraint] | None = None,
) -> AsyncGenerator[Update]:
    alternatives = (request.top_logprobs or 0, request.prompt_logprobs or 0)
    engine_request = Request(
        tokens=tokens,
        max_tokens=service.room(len(tokens), request.max_tokens),
        sampling=request.sampling,
        stop_tokens=service.eos_ids,
        watcher=(lambda: Watcher(translation.new_reader())) if request.stop else None,
        constraint=constraint,
        top_logprobs=max(alternatives),
        prompt_logprobs=request.prompt_logprobs is not None,
        routed_experts=request.routed_experts,
        adapter=service.adapter(request.model),
        salt=request.user,
    )
    note(model=request.model, user=request.user)
    last = 0.0
    async with contextlib.aclosing(_run(service, engine_request)) as events:
        async for event in events:
            update = translation.update(event)
            now = time.monotonic()
            if not (update.is_empty and event.tokens) or now - last > service.limits.keep_alive:
                last = now
                yield update


def _prepare(
    service: Service, request: ChatRequest
) -> tuple[Prompt, Callable[[], Constraint] | None]:
    """What takes long: the tokens of the prompt, and a compiled constraint."""
    prompt = encode(service, request)
    schema = JSON_OBJECT if request.json is True else request.json
    budget = request.thinking_budget if prompt.thinking else None
    if schema is None and budget is None and not request.callable_tools:
        return prompt, None
    if request.prefix and (schema is not None or request.tool_choice not in ("none", "auto")):
        raise ApiError(422, "A prefix cannot be continued in a format or with required tools.")
    try:
        grammar = service.grammars.compile(
            schema=schema, tools=request.tools, tool_choice=request.tool_choice
        )
    except ValueError as error:
        raise ApiError(400, str(error)) from None

    def new_constraint() -> Constraint:
        constraint = grammar.constraint(thinking=prompt.thinking, budget=budget)
        assert constraint is not None, "something was asked for"
        return constraint

    return prompt, new_constraint


async def _run(service: Service, request: Request) -> AsyncGenerator[Event]:
    """The engine's events, with an empty one at once and whenever nothing comes for a while.

    The finish 'abort' is reported as 'overload': clients that have gone do not read it.

    Raises:
      ApiError: the request is refused, before the first event, or fails, after it.
    """
    service.admit()
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def report(event: Event) -> None:
        # A server that has ended does not wait for what it has cancelled.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        ticket = service.engine.submit(request, report)
    except QueueFull as error:
        raise ApiError(429, str(error), retry_after=RETRY_SECONDS) from None
    except RuntimeError as error:
        raise ApiError(503, str(error), retry_after=RETRY_SECONDS) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    expire = lambda: events.put_nowait(None)
    timer = loop.call_later(service.limits.seconds, expire)
    service.running.add(expire)
    event = Event((), None, Usage())
    try:
        yield event
        while event.finish is None:
            event = await _next(events, event, service.limits.keep_alive)
            if event.finish == "error":
                raise ApiError(
                    500, "The engine could not go on with the request; its log says why."
                )
            yield event
    finally:
        ticket.cancel()
        timer.cancel()
        service.running.discard(expire)
        service.ended(event.usage, event.finish or "abort")


async def _next(events: asyncio.Queue[Event | None], last: Event, seconds: float) -> Event:
    """All that has happened since the last event, as one."""
    try:
        async with asyncio.timeout(seconds):
            waiting = [await events.get()]
    except TimeoutError:
        return Event((), None, last.usage)
    while not events.empty():
        waiting.append(events.get_nowait())
    news = [event for event in waiting if event is not None]
    newest = news[-1] if news else last
    finish = newest.finish or (None if len(news) == len(waiting) else "overload")
    tokens = tuple(token for event in news for token in event.tokens)
    prompt = tuple(token for event in news for token in event.prompt)
    finish = "overload" if finish == "abort" else finish
    return Event(tokens, finish, newest.usage, prompt, newest.expert_TLA)
