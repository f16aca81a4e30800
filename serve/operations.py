"""Around every request: ids, API keys, the log line; health, metrics, and the drain at the end."""

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from types import FrameType

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, json_response
from .service import Service, record

# Without an API key, and without a log line.
OPEN_PATHS = ("/", "/health", "/ready", "/metrics")

_log = logging.getLogger("v4jax.serve")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Front:
    """The outermost layer: every response passes through it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        fields = {
            "time": time.time(),
            "id": request_id,
            "method": scope["method"],
            "path": path,
            "status": 499,
        }
        token = record.set(fields)

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        app: ASGIApp = self._app
        if path not in OPEN_PATHS and (refusal := self._refusal(headers)):
            app = refusal.response(path)
        began = time.perf_counter()
        try:
            await app(scope, receive, observed)
        finally:
            record.reset(token)
            fields["http_seconds"] = time.perf_counter() - began
            self._service.metrics.responses.labels(str(fields["status"])).inc()
            if path not in OPEN_PATHS:
                _log.info("%s", _line(fields))

    def _refusal(self, headers: Headers) -> ApiError | None:
        """Why a request with these headers may not pass."""
        if not self._service.keys:
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # All keys are compared, so that the time tells nothing about them.
        known = [hmac.compare_digest(key.encode(), k.encode()) for k in self._service.keys]
        if any(known):
            return None
        return ApiError(401, f"Authentication Fails, Your api key: ****{key[-4:]} is invalid")


def _line(fields: dict[str, object]) -> str:
    """A log line; the user is only recognisable."""
    if user := fields.pop("user", ""):
        fields["user"] = hashlib.blake2b(str(user).encode(), digest_size=6).hexdigest()
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
    return json.dumps(rounded)


class Server(uvicorn.Server):
    """A server that drains when it is told to end.

    New requests are refused with 503 while the running ones finish. After the deadline they end
    early, each with a proper last event. A second signal ends the server at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds, self._deadline = service, drain_seconds, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        if self._service.draining:
            super().handle_exit(sig, frame)
        self._deadline = time.monotonic() + self._drain_seconds
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """End the server once it is drained; runs ten times a second."""
        if self._service.draining:
            late = time.monotonic() >= self._deadline
            if late:
                self._service.expire_all()
            self.should_exit = self.should_exit or late or not self._service.running
        return await super().on_tick(counter)


async def _health(_: Request) -> Response:
    return json_response({"status": "ok"})


async def _ready(http: Request) -> Response:
    http.app.state.service.admit()
    return json_response({"status": "ready"})


async def _metrics(http: Request) -> Response:
    text = http.app.state.service.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES = [Route("/health", _health), Route("/ready", _ready), Route("/metrics", _metrics)]
