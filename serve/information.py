"""Served models, and texts to tokens and back."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from v4jax.text.chat import BOS, EOS

from . import chat_request
from .chat_request import read_request
from .errors import ApiError, json_response
from .fields import OBJECT, TEXT, TOKEN_IDS, read_body, required, sequence, table
from .prompts import encode
from .service import Service

# With messages, the body is that of a chat.
TOKENIZE_BODY = table(prompt=TEXT, messages=sequence(OBJECT))
# As from vLLM, for lm-eval, which then has texts tokenised here.
TOKENIZER_INFO = {"bos_token": BOS, "eos_token": EOS}
DETOKENIZE_BODY = table(tokens=required(TOKEN_IDS))


def describe(service: Service, name: str) -> dict[str, Any]:
    """A served model, as OpenAI's interface describes it."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "deepseek",
        "max_model_len": service.limits.context,
    }


async def _models(http: Request) -> Response:
    service: Service = http.app.state.service
    models = [describe(service, name) for name in (*service.names, *service.adapters)]
    wanted = http.path_params.get("model")
    if wanted is None:
        return json_response({"object": "list", "data": models})
    for model in models:
        if model["id"] == wanted:
            return json_response(model)
    raise ApiError(404, f"The model '{wanted}' is not served here.", code="model_not_found")


async def _tokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, TOKENIZE_BODY)
    if body.messages:
        fields = {"model": service.names[0]} | body.raw
        request = read_request(chat_request.BODY.read("", fields), strict=False)
        tokens = (await asyncio.to_thread(encode, service, request)).tokens
    elif body.prompt is not None:
        tokens = await asyncio.to_thread(service.tokenizer.encode, body.prompt)
    else:
        body.refuse("prompt", "is missing; it must be a string.")
    limit = service.limits.context
    return json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens})


async def _detokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, DETOKENIZE_BODY)
    return json_response({"prompt": service.tokenizer.decode(body.tokens)})


async def _tokenizer_info(_: Request) -> Response:
    return json_response(TOKENIZER_INFO)


ROUTES = [
    *(Route(f"{root}/models", _models) for root in ("", "/v1")),
    *(Route(root + "/models/{model:path}", _models) for root in ("", "/v1")),
    Route("/tokenizer_info", _tokenizer_info),
    Route("/tokenize", _tokenize, methods=["POST"]),
    Route("/detokenize", _detokenize, methods=["POST"]),
]
