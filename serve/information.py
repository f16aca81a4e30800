"""Served models, and texts to tokens and back."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.arguments import TEXT, TOKEN_IDS

from .answer import encode
from .chat_request import read_request
from .errors import ApiError, json_response
from .fields import read_body
from .service import Service


async def _models(http: Request) -> Response:
    service: Service = http.app.state.service
    models = [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "deepseek",
            "max_model_len": service.limits.context,
        }
        for name in (*service.names, *service.adapters)
    ]
    wanted = http.path_params.get("model")
    if wanted is None:
        return json_response({"object": "list", "data": models})
    for model in models:
        if model["id"] == wanted:
            return json_response(model)
    raise ApiError(404, f"The model '{wanted}' is not served here.", code="model_not_found")


async def _tokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, service.limits.body_bytes)
    if "messages" in body:
        body.values.setdefault("model", service.names[0])
        request = read_request(body, strict=False)
        tokens = (await asyncio.to_thread(encode, service, request)).tokens
    else:
        text = body.require("prompt", TEXT)
        tokens = await asyncio.to_thread(service.tokenizer.encode, text)
    limit = service.limits.context
    return json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens})


async def _detokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, service.limits.body_bytes)
    tokens = body.require("tokens", TOKEN_IDS)
    return json_response({"prompt": service.tokenizer.decode(tokens)})


ROUTES = [
    *(Route(f"{root}/models", _models) for root in ("", "/v1")),
    *(Route(root + "/models/{model:path}", _models) for root in ("", "/v1")),
    Route("/tokenize", _tokenize, methods=["POST"]),
    Route("/detokenize", _detokenize, methods=["POST"]),
]
