"""Anthropic's interface: what requests mean, and Anthropic's own client against a server."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from hypothesis import given

from tests import serving
from tests.answers import USAGE, answers, bodies, script, updates
from v4jax.text.chat_parser import ContentDelta
from v4jax_serve.anthropic import COUNT_BODY, MessageWriter, read_request
from v4jax_serve.conversation import ChatRequest, Delta, Update
from v4jax_serve.errors import ApiError

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USE = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Z\u00fcrich"}}


def read(**fields: Any) -> ChatRequest:
    return read_request(COUNT_BODY.read("", {"model": "tiny", "messages": HELLO} | fields))


def test_messages_of_blocks_become_messages_of_a_chat():
    request = read(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cch=1a2b3;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": "The weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I ask.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "?"},
                    {"type": "text", "text": "A moment."},
                    USE,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "Rain."},
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2",
                        "content": [{"type": "text", "text": "Failed."}],
                        "is_error": True,
                    },
                    {"type": "tool_result", "tool_use_id": "call_3"},
                    {"type": "text", "text": "And now?"},
                ],
            },
            {"role": "system", "content": "It is late."},
        ],
    )
    function = {"name": "weather", "arguments": '{"city": "Z\u00fcrich"}'}
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The weather?"},
        {
            "role": "assistant",
            "content": "A moment.",
            "reasoning_content": "I ask.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        {"role": "tool", "tool_call_id": "call_2", "content": "Failed."},
        {"role": "tool", "tool_call_id": "call_3", "content": ""},
        {"role": "user", "content": "And now?"},
        {"role": "user", "content": "It is late."},
    ]
    assert not request.prefix


def test_settings():
    request = read(
        max_tokens=5,
        temperature=1.5,
        top_k=3,
        stop_sequences=["END"],
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "max", "format": {"type": "json_schema", "schema": {"a": 1}}},
        metadata={"user_id": "ann"},
        stream=True,
    )
    assert (request.max_tokens, request.stop, request.stream) == (5, ("END",), True)
    assert (request.sampling.temperature, request.sampling.top_k) == (1.5, 3)
    tool = {**WEATHER, "parameters": WEATHER["input_schema"]}
    assert request.tools == [{k: v for k, v in tool.items() if k != "input_schema"}]
    assert request.tool_choice == {"name": "weather"}
    assert (request.thinking, request.effort, request.thinking_budget) == (True, "max", 1024)
    assert (request.json, request.user) == ({"a": 1}, "ann")


@pytest.mark.parametrize(
    ("fields", "thinking", "effort"),
    [
        ({}, True, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True, "low"),
    ],
)
def test_thinking_is_on_unless_it_is_disabled(
    fields: dict[str, Any], thinking: bool, effort: str | None
):
    request = read(**fields)
    assert (request.thinking, request.effort) == (thinking, effort)


def test_sessions_of_a_user_of_claude_code_share_prefixes():
    users = [
        read(metadata={"user_id": json.dumps({"device_id": device, "session_id": session})}).user
        for device, session in [("a", "1"), ("a", "2"), ("b", "3")]
    ]
    assert users[0] == users[1] != users[2]


def test_a_last_message_of_the_assistant_is_continued():
    request = read(messages=[*HELLO, {"role": "assistant", "content": "Hel"}])
    assert request.prefix
    assert request.messages[-1]["content"] == "Hel"


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"messages": []}, "messages is []; it must be a list of one or more"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "content[0].type is 'image'; this"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "content[0].type is 'image'"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0].type is 'image'",
        ),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "messages ends with a call"),
        ({"system": 3}, "system is 3"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "tools[0].type is 'web_se"),
        ({"tools": [WEATHER | {"name": 'a"b'}]}, "tools[0].name is 'a\"b'"),
        ({"tools": [WEATHER, WEATHER]}, "tools has more than one 'weather'"),
        ({"tools": [WEATHER] * 129}, "tools has 129 items; at most 128"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice names the tool 'f'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"thinking": {"type": "on"}}, "thinking.type is 'on'"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type is 'xml'"),
        ({"stop_sequences": [""]}, "stop_sequences is wrong"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": 3}, "temperature is 3"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], message: str):
    with pytest.raises(ApiError) as error:
        read(**fields)
    assert message in error.value.message


WORDS = "model messages system user assistant tools tool_choice tool tool_use tool_result thinking"


@given(
    bodies(*WORDS.split(), "id", "input", "tool_use_id", "metadata", "user_id", "stop_sequences")
)
def test_any_body_is_read_or_refused(body: dict[str, Any]):
    with contextlib.suppress(ApiError):
        read(**body)


def written(answer: list[Update]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an answer, and the message."""
    writer = MessageWriter(read(), "msg_1")
    events = [event for update in answer for event in writer.events(update)]
    return events, writer.body()


@given(answers())
def test_events_add_up_to_the_message(answer: tuple[list[list[Delta]], str]):
    events, message = written(updates(*answer))
    contents: list[dict[str, Any]] = []
    is_open = False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert (event["index"], is_open) == (len(contents), False)
            contents.append(event["content_block"] | {"json": ""})
        assert event["index"] == len(contents) - 1
        is_open = event["type"] != "content_block_stop"
        match event.get("delta"):
            case {"type": "input_json_delta", "partial_json": text}:
                contents[-1]["json"] += text
                contents[-1]["input"] = None
            case {"type": "signature_delta", "signature": signature}:
                contents[-1]["signature"] = signature
            case {"type": "text_delta" | "thinking_delta" as kind, **fields}:
                contents[-1][kind.removesuffix("_delta")] += fields[kind.removesuffix("_delta")]
    assert not is_open
    for content in contents:
        if arguments := content.pop("json"):
            content["input"] = json.loads(arguments)
    assert contents == message["content"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    start, end = events[0]["message"], events[-2]
    assert start | end["delta"] | {"content": contents, "usage": end["usage"]} == message


def test_signs_of_life_are_pings_once_the_message_has_started():
    alive, *rest = updates([[ContentDelta("a")]])
    events, _ = written([alive, rest[0], alive, alive, *rest[1:]])
    types = [event["type"] for event in events]
    assert types[0] == "message_start"
    assert types[3:5] == ["ping", "ping"]


def test_tokens_from_the_cache_are_counted_apart():
    _, message = written(updates([]))
    usage = anthropic.types.Usage.model_validate(message["usage"])
    assert usage.input_tokens == USAGE.prompt_tokens - USAGE.cached_tokens
    assert usage.cache_read_input_tokens == USAGE.cached_tokens
    assert usage.cache_creation_input_tokens == 0
    assert usage.output_tokens == USAGE.completion_tokens


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.serve(script) as running:
        yield running


def connect(url: str, key: str = "none") -> Any:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: serving.Running) -> Iterator[Any]:
    with connect(server.url) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 200, "messages": HELLO} | fields


def test_an_answer_has_thinking_and_text(client: Any):
    message = client.messages.create(**ask())
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "I think."
    assert message.content[1].text == "So be it."
    assert message.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model="tiny", messages=HELLO)
    assert message.usage.input_tokens == counted.input_tokens
    short = client.messages.create(**ask(max_tokens=2))
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)
    stopped = client.messages.create(**ask(stop_sequences=["x", "be"]))
    assert stopped.content[1].text == "So "
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "be")


def test_token_ids_are_reported_on_request(client: Any, server: serving.Running):
    message = client.messages.create(**ask(), extra_body={"return_token_ids": True})
    assert message.prompt_token_ids == [*server.engine.requests[-1].tokens]
    assert message.token_ids == [*serving.tokenizer().encode(script("")), 1]


def test_rounds_with_a_tool_replay_the_answer(client: Any, server: serving.Running):
    messages: list[Any] = [{"role": "user", "content": "The weather? " * 50}]
    with client.messages.stream(**ask(messages=messages), tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds[0], kinds[-1] == ("message_start", "message_stop")
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    use = message.content[2]
    assert (use.name, use.input) == ("weather", {"city": "Z\u00fcrich"})
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}
    messages += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(**ask(messages=messages), tools=[WEATHER])
    assert (last.content[1].text, last.stop_reason) == ("So be it.", "end_turn")
    assert last.usage.cache_read_input_tokens >= 128
    first, second = (request.tokens for request in server.engine.requests[-2:])
    sampled = serving.tokenizer().encode(script("city"))
    assert second[: len(first) + len(sampled)] == [*first, *sampled]


@pytest.mark.parametrize("root", ["", "/anthropic"])
def test_errors_have_the_classes_of_the_client(server: serving.Running, root: str):
    with connect(server.url + root) as client:
        with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
            client.messages.create(**ask(model="other"))
        with pytest.raises(anthropic.BadRequestError, match="text only"):
            client.messages.create(**ask(messages=[{"role": "user", "content": [IMAGE]}]))
        long = [{"role": "user", "content": "word " * 5000}]
        with pytest.raises(
            anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 4096"
        ):
            client.messages.create(**ask(messages=long))


def test_keys_are_read_from_their_header():
    with serving.serve(script, keys=("secret",)) as server:
        for key, allowed in [("secret", True), ("wrong", False)]:
            with connect(server.url, key) as client:
                if allowed:
                    client.messages.create(**ask())
                else:
                    with pytest.raises(anthropic.AuthenticationError):
                        client.messages.create(**ask())


@pytest.mark.parametrize(
    ("fault", "kind", "status"),
    [("error", "api_error", 500), ("overload", "overloaded_error", 503)],
)
def test_a_failure_in_a_stream_is_an_event(fault: str, kind: str, status: int):
    with serving.serve(script) as server:
        server.engine.fault = fault
        with connect(server.url) as client:
            with pytest.raises(anthropic.APIStatusError, match=kind):
                list(client.messages.create(**ask(), stream=True))
            with pytest.raises(anthropic.APIStatusError, match=kind) as error:
                client.messages.create(**ask())
            assert error.value.status_code == status


def test_a_waiting_stream_is_kept_alive_before_the_message_starts():
    with serving.serve(script) as server:
        server.engine.first_delay = 0.5
        with connect(server.url) as client:
            raw = client.messages.with_streaming_response
            with raw.create(**ask(stream=True)) as response:
                lines = [line for line in response.iter_lines() if line]
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) >= 2
    assert lines[len(comments)] == "event: message_start"
