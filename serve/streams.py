"""HTTP responses whose body is written while the answer is computed, in any dialect."""

import abc
import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

from .conversation import TextRequest, Update
from .errors import ApiError, json_text
from .service import Service

# A comment, which clients skip, and the end of OpenAI's streams.
KEEP_ALIVE, DONE = ": keep-alive\n\n", "data: [DONE]\n\n"

STALL_SECONDS = 60.0  # after which a client that does not read counts as gone

_log = logging.getLogger("v4jax.serve")


class Writer(abc.ABC):
    """Writes the answer to one request in a dialect.

    Attributes:
      end: what follows the last event of a stream that has not failed.
    """

    end = ""

    @abc.abstractmethod
    def events(self, update: Update) -> Iterator[dict[str, Any]]:
        """The events of a stream for the answer's next update."""

    @abc.abstractmethod
    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        """The whole answer, from all updates."""

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a stream that fails."""
        return error.body()


class _Stalled(Exception):
    """The client does not read."""


class Stream(StreamingResponse):
    """A body of chunks, closed at once when the client has gone.

    The status is sent with the first chunk, so that an error before it has a status of its own.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[str],
        media_type: str,
        failure: Callable[[ApiError], str],
    ) -> None:
        """`failure` returns the text that reports an error after the first chunk."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, headers=headers, media_type=media_type)
        self._chunks, self._failure, self._started = chunks, failure, False

    async def stream_response(self, send: Send) -> None:
        """Send the chunks."""
        with contextlib.suppress(_Stalled):
            await self._send_all(send)

    async def _send_all(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._send(send, chunk)
        except Exception as error:
            if not self._started or isinstance(error, OSError | _Stalled):
                raise
            if not isinstance(error, ApiError):
                _log.exception("A request failed.")
                error = ApiError(500, "The server failed; its log says why.")
            await self._send(send, self._failure(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: str) -> None:
        if not self._started:
            self._started = True
            status = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **status})
        body = {"type": "http.response.body", "body": chunk.encode(), "more_body": True}
        try:
            # It waits while the client reads less than is written.
            async with asyncio.timeout(STALL_SECONDS):
                await send(body)
        except TimeoutError:
            raise _Stalled from None


def respond(
    service: Service, request: TextRequest, updates: AsyncGenerator[Update], writer: Writer
) -> Stream:
    """The response to a request, whose answer are the updates: events or JSON.

    Blank lines before JSON keep the connection alive.
    """
    if request.stream:
        failure = lambda error: _frame(writer.failure(error))
        return Stream(_events(updates, writer), "text/event-stream", failure)
    failure = lambda error: json_text(error.body())
    chunks = _whole(updates, writer, service.limits.keep_alive)
    return Stream(chunks, "application/json", failure)


async def _events(updates: AsyncGenerator[Update], writer: Writer) -> AsyncGenerator[str]:
    async with contextlib.aclosing(updates):
        async for update in updates:
            yield "".join(map(_frame, writer.events(update))) or KEEP_ALIVE
    if writer.end:
        yield writer.end


async def _whole(
    updates: AsyncGenerator[Update], writer: Writer, keep_alive: float
) -> AsyncGenerator[str]:
    received: list[Update] = []
    last = time.monotonic()
    async with contextlib.aclosing(updates):
        async for update in updates:
            received.append(update)
            if time.monotonic() - last >= keep_alive:
                yield "\n"
                last = time.monotonic()
    yield json_text(writer.whole(received))


def _frame(event: dict[str, Any]) -> str:
    """A server-sent event; it is named if it has a type."""
    name = event.get("type")
    return (f"event: {name}\n" if name else "") + f"data: {json_text(event)}\n\n"
