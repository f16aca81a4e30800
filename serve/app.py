"""The server's application: all routes, and errors in JSON."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from . import (
    anthropic,
    completions,
    information,
    openai_chat,
    openapi,
    operations,
    pages,
    responses,
)
from .errors import ApiError
from .service import Service

ROUTES = [
    *openai_chat.ROUTES,
    *completions.ROUTES,
    *anthropic.ROUTES,
    *responses.ROUTES,
    *information.ROUTES,
    *openapi.ROUTES,
    *operations.ROUTES,
    *pages.ROUTES,
]


def create(service: Service) -> operations.Front:
    """The application for a service."""
    handlers = {
        ApiError: _api_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_gone,
        Exception: _unexpected,
    }
    app = Starlette(routes=ROUTES, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.service = service
    return operations.Front(app, service)


def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(http.url.path)


def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}."
    response = ApiError(error.status_code, message).response(http.url.path)
    response.headers.update(error.headers or {})
    return response


def _client_gone(http: Request, _: Exception) -> Response:
    return ApiError(400, "The connection ended before the body.").response(http.url.path)


def _unexpected(http: Request, _: Exception) -> Response:
    message = "The server failed; its log says why."
    return ApiError(500, message).response(http.url.path)
