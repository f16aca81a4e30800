"""The OpenAPI document says what the server accepts and answers, and nothing makes it fail."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import serving
from tests.answers import script
from v4jax_serve import app

HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "parameters": CITY}


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.serve(script) as running:
        running.engine.obeys = True
        yield running


@pytest.fixture(scope="module")
def http(server: serving.Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    return http.get("/openapi.json").json()


def accepts(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is as a schema of the document says."""
    whole = schema | {"components": document["components"]}
    return jsonschema.Draft202012Validator(whole).is_valid(value)


def test_the_document_has_all_endpoints_and_only_valid_schemas(document: dict[str, Any]) -> None:
    assert document["paths"].keys() == {route.path.replace(":path", "") for route in app.ROUTES}
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, "temperature": None}),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "tools": [{"type": "function", "function": FUNCTION}]},
        ),
        ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "stop": "x"}),
        (
            "/v1/messages",
            {
                "messages": HELLO,
                "max_tokens": 9,
                "tools": [{"name": "weather", "input_schema": CITY}],
            },
        ),
        ("/v1/messages/count_tokens", {"messages": HELLO}),
        ("/v1/responses", {"input": HELLO, "tools": [{"type": "function", **FUNCTION}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/models", None),
        ("/v1/models/tiny", None),
    ],
)
def test_what_clients_send_is_accepted_and_answered_as_documented(
    http: httpx.Client, document: dict[str, Any], path: str, fields: dict[str, Any] | None
) -> None:
    if fields is None:
        operation = document["paths"][path.replace("tiny", "{model}")]["get"]
        answer = http.get(path)
    else:
        operation, body = document["paths"][path]["post"], {"model": "tiny", **fields}
        accepted = operation["requestBody"]["content"]["application/json"]["schema"]
        assert accepts(document, accepted, body)
        answer = http.post(path, json=body)
    assert answer.status_code == 200
    answered = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert accepts(document, answered, answer.json())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = (
    *("model", "messages", "prompt", "tools", "tool_choice", "stop", "stream", "stream_options"),
    *("max_tokens", "temperature", "top_p", "logprobs", "top_logprobs", "response_format", "n"),
    *("thinking", "reasoning", "reasoning_effort", "chat_template_kwargs", "suffix", "echo"),
    *("tokens", "input", "system", "user", "user_id", "seed", "metadata", "text"),
)
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/beta/completions", "/tokenize", "/detokenize"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses"),
)


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": JSON},
    optional={"tool_calls": JSON, "prefix": JSON, "reasoning_content": JSON},
)
PLAUSIBLE = st.fixed_dictionaries(
    {"model": st.just("tiny"), "messages": st.lists(MESSAGE, max_size=3), "prompt": JSON},
    optional=dict.fromkeys(FIELDS[3:], JSON),
)
BODY = PLAUSIBLE | st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON


def requests(count: int) -> list[tuple[str, Any]]:
    """Drawn before they are sent: Hypothesis lets no other thread draw random numbers meanwhile."""
    drawn: list[tuple[str, Any]] = []

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(path=st.sampled_from(PATHS), sent=BODY)
    def draw(path: str, sent: Any) -> None:
        drawn.append((path, sent))

    draw()
    return drawn


def test_every_body_is_answered_as_documented(http: httpx.Client, document: dict[str, Any]) -> None:
    for path, sent in requests(150):
        operation = document["paths"][path]["post"]
        accepted = operation["requestBody"]["content"]["application/json"]["schema"]
        answer = http.post(path, content=json.dumps(sent))
        case = (path, sent, answer.text)
        assert answer.status_code < 500, case
        assert answer.status_code >= 400 or accepts(document, accepted, sent), case
        described = operation["responses"][str(answer.status_code)]["content"]
        if answer.headers["content-type"] == "application/json":
            schema = described["application/json"]["schema"]
            assert accepts(document, schema, answer.json()), case
