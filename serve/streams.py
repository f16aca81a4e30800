"""HTTP responses whose body is written while the answer is computed."""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

from .conversation import Update
from .errors import ApiError, json_text

# A comment, which clients skip, and the end of OpenAI's streams.
KEEP_ALIVE, DONE = ": keep-alive\n\n", "data: [DONE]\n\n"
_SILENCE = 5.0  # seconds without a blank line while a JSON answer grows

_log = logging.getLogger("v4jax.serve")


class Stream(StreamingResponse):
    """A body of chunks, closed at once when the client has gone.

    The status is sent with the first chunk, so that an error before it has a status of its own.
    """

    def __init__(self, chunks: AsyncGenerator[str], media_type: str = "application/json") -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, headers=headers, media_type=media_type)
        self._chunks = chunks

    async def stream_response(self, send: Send) -> None:
        """Send the chunks."""
        started = False
        async with contextlib.aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                if not started:
                    started = True
                    status = {"status": self.status_code, "headers": self.raw_headers}
                    await send({"type": "http.response.start", **status})
                body = {"body": chunk.encode(), "more_body": True}
                await send({"type": "http.response.body", **body})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_stream(chunks: AsyncGenerator[str], failure: Callable[[ApiError], str]) -> Stream:
    """A response of server-sent events.

    Args:
      chunks: events and comments, complete with their blank line.
      failure: the text that reports an error after the first chunk.
    """
    return Stream(_with_failure(chunks, failure), "text/event-stream")


def whole(updates: AsyncGenerator[Update], build: Callable[[Sequence[Update]], Any]) -> Stream:
    """A JSON response that is built from all updates of an answer.

    Blank lines before it keep the connection alive.
    """
    return json_stream(_whole(updates, build))


def json_stream(chunks: AsyncGenerator[str]) -> Stream:
    """A JSON response, after blank lines that keep the connection alive."""
    return Stream(_with_failure(chunks, lambda error: json_text(error.body())))


async def _whole(
    updates: AsyncGenerator[Update], build: Callable[[Sequence[Update]], Any]
) -> AsyncGenerator[str]:
    received: list[Update] = []
    last = time.monotonic()
    async with contextlib.aclosing(updates):
        async for update in updates:
            if (update.is_empty and received) or time.monotonic() - last > _SILENCE:
                yield "\n"
                last = time.monotonic()
            received.append(update)
    yield json_text(build(received))


async def _with_failure(
    chunks: AsyncGenerator[str], failure: Callable[[ApiError], str]
) -> AsyncGenerator[str]:
    started = False
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
                started = True
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, ApiError):
                _log.exception("A request failed.")
                error = ApiError(500, "The server failed; its log says why.")
            yield failure(error)


def event(value: Any, name: str | None = None) -> str:
    """A server-sent event whose data is a JSON value."""
    return (f"event: {name}\n" if name else "") + f"data: {json_text(value)}\n\n"
