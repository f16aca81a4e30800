"""The OpenAPI document: what each endpoint accepts and answers.

Bodies of requests are described by the tables that read them, answers by examples that the dialects
write.
"""

from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.engine.request import Usage
from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart

from . import anthropic, chat_request, completions, information, openai_chat, responses
from .conversation import ChatRequest, Update
from .errors import ApiError, json_response
from .fields import Field
from .service import HOSTED, Service

_DELTAS = (ReasoningDelta(""), ContentDelta(""), ToolCallStart(0, "", ""), ArgumentsDelta(0, "{}"))
_STATUSES = {
    200: "The answer.",
    400: "The body is not JSON, or cannot be answered.",
    401: "There is no valid API key.",
    404: "Nothing of this name is served.",
    413: "The body is too long.",
    422: "A field is missing, wrong or not supported.",
    429: "The queue is full.",
    500: "The server failed.",
    503: "The server is not ready, or shutting down.",
}
# Endpoints that are answered in other formats than JSON.
_FORMATS = {"/": "text/html", "/metrics": "text/plain"}


async def _openapi(http: Request) -> Response:
    return json_response(document(http.app.state.service, http.app.routes))


ROUTES = [Route("/openapi.json", _openapi)]


def document(service: Service, routes: Iterable[Any]) -> dict[str, Any]:
    """The document of a server with these routes."""
    bodies, answers = _bodies(), _answers(service)
    names = [*service.names, *service.adapters]
    model = {"anyOf": [{"enum": names}, *({"pattern": f"^{name}"} for name in HOSTED)]}
    schemas = {name: _with_model(field.schema, model) for name, field in bodies.items()}
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path", "")
        name = next((name for name in bodies if path.endswith(name)), None)
        operation = _operation(path, name, answers.get(name or path, {}))
        paths[path] = {"post" if name else "get": operation}
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "v4jax-serve", "version": service.fingerprint.rpartition("_")[2]},
        "paths": paths,
        "components": {
            "schemas": {_component(name): schema for name, schema in schemas.items()},
            **({"securitySchemes": schemes} if service.keys else {}),
        },
        "security": [{"bearer": []}] if service.keys else [],
    }


def _component(name: str) -> str:
    return name.strip("/").replace("/", ".")


def _bodies() -> dict[str, Field]:
    """How the bodies are read of requests whose path ends so."""
    return {
        "/chat/completions": chat_request.BODY,
        "/completions": completions.BODY,
        "/messages": anthropic.BODY,
        "/messages/count_tokens": anthropic.COUNT_BODY,
        "/responses": responses.BODY,
        "/detokenize": information.DETOKENIZE_BODY,
        "/tokenize": information.TOKENIZE_BODY,
    }


def _answers(service: Service) -> dict[str, dict[str, Any]]:
    """Schemas of the answers, by path or by its end."""
    end = Update((), (), 0, "stop", Usage(), 0)
    every = [Update(_DELTAS, (), 0, None, Usage(), 0), end]
    chat = ChatRequest(model="", messages=[], thinking=False)
    text = completions.CompletionRequest(model="", prompts=[[]])
    body = responses.BODY.read("", {"model": "", "input": ""})
    response = responses.ResponseWriter(body, chat, "", 0).whole(every)
    # A response repeats these as the request has them.
    repeated = dict.fromkeys((*responses.REPEATED, "tools"))
    model = information.describe(service, "")
    examples = {
        "/chat/completions": openai_chat.ChatWriter(service, chat).whole([end]),
        "/completions": completions.CompletionWriter(service, text).whole([end]),
        "/messages": anthropic.MessageWriter(chat, "").whole(every),
        "/messages/count_tokens": {"input_tokens": 0},
        "/responses": response | repeated,
        "/detokenize": {"prompt": ""},
        "/tokenize": {"tokens": [0], "count": 0, "max_model_len": 0},
        **{f"{root}/models": {"object": "list", "data": [model]} for root in ("", "/v1")},
        **{f"{root}/models/{{model}}": model for root in ("", "/v1")},
        "/tokenizer_info": information.TOKENIZER_INFO,
        "/health": {"status": ""},
        "/ready": {"status": ""},
    }
    return {name: _shape(example) for name, example in examples.items()}


def _operation(path: str, name: str | None, answer: dict[str, Any]) -> dict[str, Any]:
    error = ApiError(500, "")
    is_anthropic = "/messages" in path
    failure = _shape(error.anthropic_body() if is_anthropic else error.body())
    statuses = _STATUSES.keys() - ({422} if is_anthropic else set()) if name else {200, 401}
    statuses |= {404} if "{" in path else {503} if path == "/ready" else set()
    answers = {
        str(status): {
            "description": _STATUSES[status],
            "content": {"application/json": {"schema": failure}},
        }
        for status in sorted(statuses)
    }
    content = {_FORMATS.get(path, "application/json"): {"schema": answer}}
    if name and name not in ("/messages/count_tokens", "/tokenize", "/detokenize"):
        content["text/event-stream"] = {}
        # An answer that fails once its first byte was sent has an error for a body.
        content["application/json"] = {"schema": {"anyOf": [answer, failure]}}
    answers["200"]["content"] = content
    operation: dict[str, Any] = {"responses": answers}
    if name:
        schema = {"$ref": f"#/components/schemas/{_component(name)}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["requestBody"] = body
    if "{model}" in path:
        parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [parameter]
    return operation


def _with_model(schema: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body, with a schema of its model's name."""
    properties = schema["properties"]
    if "model" not in properties:
        return schema
    return schema | {"properties": properties | {"model": {"type": "string", **model}}}


def _shape(example: Any) -> dict[str, Any]:
    """A JSON schema of values like the example, in which a null stands for anything."""
    match example:
        case None:
            return {}
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case float():
            return {"type": "number"}
        case str():
            return {"type": "string"}
        case list():
            shapes = [_shape(item) for item in example]
            return {"type": "array", "items": {"anyOf": shapes} if shapes else {}}
    properties = {name: _shape(value) for name, value in example.items()}
    return {"type": "object", "properties": properties, "required": [*properties]}
