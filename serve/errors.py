"""Errors as clients see them: DeepSeek's bodies, and Anthropic's under its paths."""

import json
from typing import Any

from starlette.responses import Response

# status -> error types of DeepSeek and of Anthropic; other statuses below 500 are like 400.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("service_unavailable_error", "overloaded_error"),
}


class ApiError(Exception):
    """A request that fails, with the HTTP status that says how."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, retry_after: int | None = None
    ) -> None:
        """`retry_after` is in seconds."""
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error in DeepSeek's format, which is OpenAI's."""
        name = _TYPES.get(self.status, _TYPES[400])[0]
        default = name if self.status >= 429 else "invalid_request_error"
        code = self.code or default
        return {"error": {"message": self.message, "type": name, "param": None, "code": code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The error in Anthropic's format."""
        name = _TYPES.get(self.status, _TYPES[400])[1]
        return {"type": "error", "error": {"type": name, "message": self.message}}

    def response(self, path: str) -> Response:
        """The HTTP response to a request of this path."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if "/messages" not in path:
            return json_response(self.body(), self.status, headers)
        # Anthropic has no 422.
        status = 400 if self.status == 422 else self.status
        return json_response(self.anthropic_body(), status, headers)


class ContextExceeded(ApiError):
    """A prompt and its answer that do not fit the context, in words that clients look for."""

    def __init__(self, context: int, prompt: int, answer: int) -> None:
        """The sizes are in tokens."""
        super().__init__(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{prompt + answer} tokens ({prompt} in the messages, {answer} in the completion). "
            "Please reduce the length of the messages or completion.",
        )
        self._too_long = f"prompt is too long: {prompt + answer} tokens > {context} maximum"

    def anthropic_body(self) -> dict[str, Any]:
        """The error in Anthropic's format, upon which Claude Code summarises the conversation."""
        return ApiError(self.status, self._too_long).anthropic_body()


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(json_text(body), status, headers, media_type="application/json")


def json_text(value: Any) -> str:
    """A JSON value in its shortest form."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
