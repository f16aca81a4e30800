"""Around the requests: errors, keys, limits, logs, metrics, clients that leave, and the drain."""

import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests import serving
from v4jax.text.chat import encode_chat
from v4jax_serve import streams

USER = {"role": "user", "content": "Question"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.serve(lambda _: "") as running:
        yield running


@pytest.fixture(scope="module")
def connection(server: serving.Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture
def http(server: serving.Running, connection: httpx.Client) -> httpx.Client:
    server.engine.reset()
    server.engine.script = lambda _: "</think>Hello"
    return connection


@pytest.fixture
def client(server: serving.Running, http: httpx.Client) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        yield api


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition, for at most five seconds."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [USER]} | fields


def test_errors_have_their_class(server: serving.Running, client: Any) -> None:
    ask = lambda **fields: client.chat.completions.create(**body(**fields))
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; use one of tiny"):
        ask(model="other")
    with pytest.raises(openai.UnprocessableEntityError, match=r"temperature is 3; it must be"):
        ask(temperature=3)
    long = [{"role": "user", "content": "word " * serving.CONTEXT}]
    with pytest.raises(openai.BadRequestError) as error:
        ask(messages=long)
    prompt = len(serving.tokenizer().encode(encode_chat(long, "thinking")))
    expected = (
        f"This model's maximum context length is {serving.CONTEXT} tokens. However, you requested "
        f"{prompt + 1} tokens ({prompt} in the messages, 1 in the completion). Please reduce the "
        "length of the messages or completion."
    )
    assert error.value.body == {
        "message": expected,
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_request_error",
    }
    server.engine.max_running = 0
    with pytest.raises(openai.RateLimitError) as error:
        ask()
    assert int(error.value.response.headers["retry-after"]) > 0
    server.engine.max_running, server.engine.ready = 1, False
    with pytest.raises(openai.InternalServerError) as error:
        ask()
    assert error.value.status_code == 503
    server.engine.ready, server.engine.fault = True, "error"
    with pytest.raises(openai.InternalServerError, match="could not go on"):
        ask()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, body(max_tokens=10**6)),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 10**6}),
        ("/v1/messages", body(max_tokens=10**6)),
        ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 10**6}),
    ],
)
def test_an_answer_may_be_as_long_as_the_context_allows(
    server: serving.Running, http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    assert http.post(path, json=fields).status_code == 200
    request = server.engine.requests[-1]
    assert len(request.tokens) + request.max_tokens == serving.CONTEXT
    server.service.strict = True
    try:
        assert http.post(path, json=fields).status_code == 400
    finally:
        server.service.strict = False


def test_a_failure_in_a_stream_is_an_event(server: serving.Running, client: Any) -> None:
    server.engine.fault = "error"
    with pytest.raises(openai.APIError, match="could not go on"):
        for _ in client.chat.completions.create(**body(stream=True)):
            pass
    server.engine.fault = "overload"
    answer = client.chat.completions.create(**body())
    assert answer.choices[0].finish_reason == "insufficient_system_resource"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is []; it must be a list of one or more items."),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role is 'bot'; use one of"),
        (
            {"messages": [USER | {"content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "set prefix to true"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id is missing"),
        ({"n": 2}, "n is 2; it must be 1."),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stop": "a" * 600}, "more than 512 characters"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "an integer from 0 to 20"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{}] * 129}, "tools has 129 items; at most 128"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "not in tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
        ({"logit_bias": {"1": 2}}, "logit_bias is not supported"),
        ({"user_id": "\u20ac" * 200}, "at most 512 bytes"),
        ({"reasoning_effort": "huge"}, "reasoning_effort is 'huge'; use one of none,"),
        ({"model": None}, "model is missing"),
    ],
)
def test_a_refusal_names_the_field(
    http: httpx.Client, fields: dict[str, Any], message: str
) -> None:
    answer = http.post(CHAT, json=body(**fields))
    assert answer.status_code == 422
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "Failed to parse the request body as JSON"),
        (b"\xff\xfe", 400, "not UTF-8"),
        (b"[]", 422, "The body is []; it must be an object."),
        (b'{"model": NaN}', 400, "NaN is not a JSON number"),
        (b'{"model": "\\ud800"}', 400, "surrogate"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, 400, "nested deeper"),
        (b"[" * 100_000, 400, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 400, "JSON"),
    ],
)
def test_a_malformed_body_is_refused(
    http: httpx.Client, content: bytes, status: int, message: str
) -> None:
    answer = http.post(CHAT, content=content)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_body_may_not_be_too_long(server: serving.Running, http: httpx.Client) -> None:
    limit = server.service.limits.body_bytes
    for content in ((b" " * 2**20 for _ in range(limit // 2**20 + 1)), b" " * (limit + 1)):
        answer = http.post(CHAT, content=content)
        assert answer.status_code == 413
        assert str(limit) in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_answer_in_json(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    wrong = http.get(CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "Method Not Allowed" in wrong.json()["error"]["message"]
    assert http.get("/v1/messages").json()["type"] == "error"


def test_a_failure_of_the_server_is_json_and_logged(
    server: serving.Running, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.submit, submit = None, server.engine.submit  # pyright: ignore
    try:
        answer = http.post(CHAT, json=body())
    finally:
        server.engine.submit = submit
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "The server failed; its log says why."
    assert "x-request-id" in answer.headers
    until(lambda: any(record.exc_info for record in caplog.records))


def test_api_keys_are_needed_but_for_health(server: serving.Running, http: httpx.Client) -> None:
    server.service.keys = ("first-key", "second-key")
    try:
        for path in ("/health", "/ready", "/metrics"):
            assert http.get(path).status_code == 200
        refused = http.get("/v1/models", headers={"authorization": "Bearer wrong"})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert "****rong" in refused.json()["error"]["message"]
        for headers in ({"authorization": "Bearer second-key"}, {"x-api-key": "first-key"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
    finally:
        server.service.keys = ()


def test_a_request_is_one_log_line_without_its_text(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "v4jax.serve")
    answer = http.post(CHAT, json=body(user="anna"), headers={"x-request-id": "my-id"})
    assert answer.headers["x-request-id"] == "my-id"
    http.get("/health")
    lines = lambda: [record.message for record in caplog.records if record.name == "v4jax.serve"]
    until(lines)
    [line] = lines()
    fields = json.loads(line)
    assert (fields["id"], fields["status"], fields["finish"]) == ("my-id", 200, "stop")
    assert fields["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert "anna" not in line
    assert "Question" not in line
    assert "Hello" not in line
    injected = http.get("/v1/models", headers={"x-request-id": "a b"})
    assert injected.headers["x-request-id"] != "a b"


def test_metrics_count_requests(server: serving.Running, http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    name = 'vllm:request_success_total{finished_reason="stop"'
    latency = "vllm:time_to_first_token_seconds_count"
    before, counted = value(name), value(latency)
    http.post(CHAT, json=body())
    until(lambda: value(name) == before + 1)
    assert value(latency) == counted + 1
    assert value("vllm:num_requests_running") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(
    server: serving.Running, http: httpx.Client, stream: bool
) -> None:
    server.engine.script, server.engine.delay = (lambda _: "word " * 1000), 0.02
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=body(stream=stream), timeout=0.1 if not stream else 0.01)
    until(lambda: server.engine.finished == ["abort"])
    assert not server.service.running


def test_a_client_that_does_not_read_ends_its_request(
    server: serving.Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL_SECONDS", 0.3)
    server.engine.script = lambda _: "word " * 5000
    content = json.dumps(body(stream=True, logprobs=True, top_logprobs=20)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + content)
        until(lambda: server.service.running)
        until(lambda: not server.service.running)


def test_time_for_an_answer_is_limited() -> None:
    limits = serving.Limits(context=serving.CONTEXT, seconds=0.2, keep_alive=5)
    with serving.serve(lambda _: "</think>" + "word " * 1000, limits=limits) as running:
        running.engine.delay = 0.02
        answer = httpx.post(running.url + CHAT, json=body()).json()["choices"][0]
        assert answer["finish_reason"] == "insufficient_system_resource"
        assert answer["message"]["content"].startswith("word word")
        until(lambda: running.engine.finished == ["abort"])


def test_a_drain_finishes_streams_and_refuses_new_requests() -> None:
    script = lambda _: "</think>" + "word " * 1000
    with (
        serving.serve(script, drain_seconds=3) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        running.engine.delay = 0.02
        received: list[str] = []

        def read() -> None:
            with httpx.stream("POST", running.url + CHAT, json=body(stream=True)) as answer:
                received.extend(answer.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: running.service.running)
        running.server.handle_exit(signal.SIGTERM, None)
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        refused = client.post(CHAT, json=body())
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        reader.join(20)
        *_, last, _, done, _ = received
        assert done == "data: [DONE]"
        finish = json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert finish == "insufficient_system_resource"
        until(lambda: not running.server.started or running.server.should_exit)
