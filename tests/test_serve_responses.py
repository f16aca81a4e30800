"""OpenAI's Responses interface: what requests mean, and OpenAI's own client against a server."""

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given

from tests import serving
from tests.answers import USAGE, answers, bodies, script, updates
from v4jax.text.chat_parser import ArgumentsDelta, ReasoningDelta, ToolCallStart
from v4jax_serve.conversation import ChatRequest, Delta, Update
from v4jax_serve.errors import ApiError
from v4jax_serve.fields import Fields
from v4jax_serve.responses import BODY, ResponseWriter, read_request

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}
SPACE = {"type": "namespace", "name": "mcp", "description": "A server.", "tools": [WEATHER]}
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Rain."}


def body(**fields: Any) -> Fields:
    return BODY.read("", {"model": "tiny", "input": "Hello"} | fields)


def read(**fields: Any) -> ChatRequest:
    return read_request(body(**fields))


def writer(**fields: Any) -> ResponseWriter:
    return ResponseWriter(given := body(**fields), read_request(given), "resp_1", 0)


def text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def test_items_become_messages_of_a_chat():
    request = read(
        instructions="Be brief.",
        input=[
            {"role": "system", "content": "In English."},
            {"type": "message", "role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "The weather?"}]},
            {"type": "reasoning", "summary": [], "content": text("I ask.")},
            {"role": "assistant", "content": [{"type": "output_text", "text": "A moment."}]},
            CALLED,
            CALLED | {"call_id": "c2", "namespace": "mcp"},
            RESULT,
            RESULT | {"call_id": "c2", "output": [{"type": "input_text", "text": "Sun."}]},
            {"role": "system", "content": "It is late."},
        ],
    )
    function = {"name": "weather", "arguments": "{}"}
    assert request.messages == [
        {"role": "system", "content": "Be brief.\n\nIn English."},
        {"role": "user", "content": "Be kind."},
        {"role": "user", "content": "The weather?"},
        {
            "role": "assistant",
            "content": "A moment.",
            "reasoning_content": "I ask.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function | {"name": "mcp__weather"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        {"role": "tool", "tool_call_id": "c2", "content": "Sun."},
        {"role": "user", "content": "It is late."},
    ]
    assert not request.prefix


@pytest.mark.parametrize(
    "fields",
    [
        {"content": [{"type": "reasoning_text", "text": "Why?"}], "summary": []},
        {"encrypted_content": "v4jax-reasoning:" + base64.b64encode(b"Why?").decode()},
        {"encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "Why?"}]},
    ],
)
def test_reasoning_is_read_from_where_the_client_has_it(fields: dict[str, Any]):
    request = read(input=[{"type": "reasoning", **fields}, CALLED, RESULT])
    assert request.messages[0]["reasoning_content"] == "Why?"


def test_settings():
    request = read(
        max_output_tokens=5,
        temperature=0.5,
        top_p=0.9,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": PARAMETERS}},
        tools=[WEATHER, SPACE, {"type": "web_search", "external_web_access": False}],
        tool_choice={"type": "function", "name": "weather", "namespace": "mcp"},
        stream=True,
        user="ann",
        store=False,
    )
    assert (request.max_tokens, request.stream, request.user) == (5, True, "ann")
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.9)
    assert (request.thinking, request.effort, request.json) == (True, "low", PARAMETERS)
    assert [tool["name"] for tool in request.tools] == ["weather", "mcp__weather"]
    assert request.tool_choice == {"name": "mcp__weather"}
    assert read(text={"format": {"type": "json_object"}}).json is True
    assert not read(reasoning={"effort": "none"}).thinking


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"input": None}, "input is missing"),
        ({"input": [IMAGE]}, "input[0].content[0].type is 'input_image'; this model reads text"),
        ({"input": [RESULT | {"output": IMAGE["content"]}]}, "input[0].output[0].type is"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type is 'item_reference'"),
        ({"input": [CALLED]}, "input ends with a call"),
        ({"input": [{"type": "reasoning", "encrypted_content": "v4jax-reasoning:?"}]}, "changed"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported: nothing is"),
        ({"store": True}, "store is not supported"),
        ({"background": True}, "background is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"top_logprobs": 2}, "top_logprobs is not supported here"),
        ({"tools": [{"type": "custom", "name": "patch"}]}, "tools[0].type is 'custom'; this"),
        ({"tools": [SPACE | {"tools": [{"type": "x"}]}]}, "tools[0].tools[0].type is 'x'"),
        ({"tools": [WEATHER, WEATHER]}, "tools has more than one 'weather'"),
        ({"tool_choice": "required"}, "tool_choice asks for a call"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type is 'web_search'"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type is 'grammar'"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort is 'much'"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], message: str):
    with pytest.raises(ApiError) as error:
        read(**fields)
    assert message in error.value.message


WORDS = "model input message user assistant reasoning function_call function_call_output call_id"


@given(bodies(*WORDS.split(), "arguments", "output", "tools", "function", "namespace", "include"))
def test_any_body_is_read_or_refused(fields: dict[str, Any]):
    with contextlib.suppress(ApiError):
        writer(**fields).body()


def written(answer: list[Update], **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an answer, and the response."""
    response = writer(**fields)
    events = [event for update in answer for event in response.events(update)]
    return events, response.body()


@given(answers())
def test_events_add_up_to_the_response(answer: tuple[list[list[Delta]], str]):
    events, response = written(updates(*answer))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[dict[str, Any]] = []
    pieces = ""
    for event in events[2:-1]:
        name = event["type"].removeprefix("response.")
        if name == "output_item.added":
            pieces = ""
            assert event["item"]["status"] == "in_progress"
        elif name == "output_item.done":
            items.append(event["item"])
            whole = event["item"].get("arguments") or event["item"]["content"][0]["text"]
            assert whole == pieces
        elif name.endswith(".delta"):
            pieces += event["delta"]
        elif not name.startswith("content_part"):
            assert event.get("text", event.get("arguments")) == pieces
        assert event["output_index"] == len(items) - (name == "output_item.done")
    assert items == response["output"]
    assert len({item["id"] for item in items}) == len(items)
    assert events[-1] == {
        "type": f"response.{response['status']}",
        "sequence_number": len(events) - 1,
        "response": response,
    }
    assert [item["status"] for item in items[:-1]] == ["completed"] * len(items[:-1])
    assert all(item["status"] == response["status"] for item in items[-1:])


def test_reasoning_is_sealed_for_clients_that_ask_so():
    answer = updates([[ReasoningDelta("Why "), ReasoningDelta("not?")]])
    _, response = written(answer, include=["reasoning.encrypted_content"])
    (item,) = response["output"]
    request = read(input=[{"type": "reasoning", "summary": []} | item | {"content": None}])
    assert request.messages[0]["reasoning_content"] == "Why not?"


def test_calls_of_a_namespace_are_named_in_it():
    deltas = [ToolCallStart(0, "c1", "mcp__weather"), ArgumentsDelta(0, "{}")]
    _, response = written(updates([deltas], "tool_calls"), tools=[SPACE, WEATHER])
    (item,) = response["output"]
    assert (item["namespace"], item["name"], item["call_id"]) == ("mcp", "weather", "c1")


def test_usage_is_that_of_the_engine():
    _, response = written(updates([]))
    assert response["usage"] == {
        "input_tokens": USAGE.prompt_tokens,
        "input_tokens_details": {"cached_tokens": USAGE.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": USAGE.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": USAGE.prompt_tokens + USAGE.completion_tokens,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.serve(script) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: serving.Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_has_reasoning_and_text(client: Any):
    response = client.responses.create(model="tiny", input="Hello")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.output_text, response.status) == ("So be it.", "completed")
    assert response.output[0].content[0].text == "I think."
    asked = client.responses.create(
        model="tiny", input="Hello", stream=True, extra_body={"return_token_ids": True}
    )
    *_, last = asked
    assert last.response.token_ids == [*serving.tokenizer().encode(script("")), 1]
    short = client.responses.create(model="tiny", input="Hello", max_output_tokens=2)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize("include", [[], ["reasoning.encrypted_content"]])
def test_rounds_with_a_tool_replay_the_answer(
    client: Any, server: serving.Running, include: list[Any]
):
    conversation: list[Any] = [{"role": "user", "content": "The weather? " * 50}]
    ask: dict[str, Any] = {"model": "tiny", "tools": [WEATHER], "include": include}
    with client.responses.stream(**ask, input=conversation) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    for name in ("reasoning_text", "output_text", "function_call_arguments"):
        assert kinds.index(f"response.{name}.delta") < kinds.index(f"response.{name}.done")
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    call = response.output[2]
    assert (call.name, call.arguments) == ("weather", '{"city": "Z\u00fcrich"}')
    items = [item.to_dict() for item in response.output]
    if include:
        items[0].pop("content")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    last = client.responses.create(**ask, input=[*conversation, *items, output])
    assert last.output_text == "So be it."
    assert last.usage.input_tokens_details.cached_tokens >= 128
    first, second = (request.tokens for request in server.engine.requests[-2:])
    sampled = serving.tokenizer().encode(script("city"))
    assert second[: len(first) + len(sampled)] == [*first, *sampled]


def test_errors_have_the_classes_of_the_client(client: Any):
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.responses.create(model="other", input="Hello")
    with pytest.raises(openai.UnprocessableEntityError, match="store is not supported"):
        client.responses.create(model="tiny", input="Hello", store=True)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.responses.create(model="tiny", input="word " * 5000)


@pytest.mark.parametrize("fault", ["error", "overload"])
def test_a_failure_in_a_stream_is_its_last_event(fault: str):
    with serving.serve(script) as server:
        server.engine.fault = fault
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            last: Any
            *_, last = client.responses.create(model="tiny", input="Hello", stream=True)
            assert last.type == "response.failed"
            assert (last.response.status, last.response.error.code) == ("failed", "server_error")
            with pytest.raises(openai.InternalServerError):
                client.responses.create(model="tiny", input="Hello")
