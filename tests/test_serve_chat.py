"""Chat completions through the `openai` client: what clients see, and what the engine is asked."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests import serving
from v4jax.text.chat import DSML, encode_chat
from v4jax_serve.conversation import EFFORTS
from v4jax_serve.replays import Replays, Turn

USER = {"role": "user", "content": "Question"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks it up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: str, days: str = "3") -> str:
    """A call as the model writes it."""
    return (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n'
        f'<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">{days}</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.serve(lambda _: "") as running:
        yield running


@pytest.fixture
def client(server: serving.Running) -> Iterator[Any]:
    with serving.openai_client(server) as api:
        yield api


def ask(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": [USER]} | fields)


def prompt(server: serving.Running) -> str:
    """The text of the last prompt."""
    return serving.tokenizer().decode(server.engine.requests[-1].tokens)


def chunks(server: serving.Running, **fields: Any) -> list[Any]:
    """The lines of a streamed answer that say something."""
    body = {"model": "tiny", "messages": [USER], "stream": True} | fields
    text = httpx.post(f"{server.url}/chat/completions", json=body).text
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer_has_content_reasoning_and_usage(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "I think.</think>Answer \u20ac"
    answer = ask(client, max_tokens=100)
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == "Answer \u20ac"
    assert choice.message.reasoning_content == "I think."
    request = server.engine.requests[-1]
    expected = encode_chat([USER], "thinking")
    assert prompt(server) == expected
    assert answer.usage.prompt_tokens == len(serving.tokenizer().encode(expected))
    total = len(serving.tokenizer().encode("I think.</think>Answer \u20ac")) + 1
    thought = len(serving.tokenizer().encode("I think.</think>"))
    assert answer.usage.completion_tokens == total
    assert answer.usage.completion_tokens_details.reasoning_tokens == thought
    assert request.max_tokens == 100


def test_a_stream_has_the_documented_order(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "Hm</think>Hello" + call("Rome")
    read = chunks(server, tools=[WEATHER])
    deltas = [chunk["choices"][0]["delta"] for chunk in read]
    assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": ""}
    kinds = [next(k for k, v in delta.items() if v) for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, key=["reasoning_content", "content", "tool_calls"].index)
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0].keys() == {"index", "id", "type", "function"}
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert all(c.keys() == {"index", "function"} and c["index"] == 0 for c in calls[1:])
    arguments = "".join(c["function"]["arguments"] for c in calls)
    assert json.loads(arguments) == {"city": "Rome", "days": 3}
    assert deltas[-1] == {"content": ""}
    assert read[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert "usage" in read[-1]
    assert not any("usage" in chunk for chunk in read[:-1])
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in read}) == 1


def test_a_stream_with_usage_has_null_before_the_last_chunk(
    server: serving.Running, client: Any
) -> None:
    server.engine.script = lambda _: "Hm</think>Hello"
    *rest, last = chunks(server, stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in rest} == {None}
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_waiting_clients_get_comments_and_blank_lines(server: serving.Running, client: Any) -> None:
    server.engine.script, server.engine.first_delay = (lambda _: "</think>Hello"), 0.5
    body = {"model": "tiny", "messages": [USER]}
    url = f"{server.url}/chat/completions"
    assert httpx.post(url, json=body | {"stream": True}).text.startswith(": keep-alive\n\n" * 2)
    whole = httpx.post(url, json=body)
    assert whole.text.startswith("\n\n{")
    assert whole.json()["choices"][0]["message"]["content"] == "Hello"
    assert ask(client).choices[0].message.content == "Hello"


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"model": "deepseek-chat"}, False),
        ({"model": "deepseek-chat", "thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, True),
    ],
)
def test_every_spelling_of_thinking_is_read(
    server: serving.Running, client: Any, fields: dict[str, Any], thinks: bool
) -> None:
    server.engine.script = lambda _: "Text"
    message = ask(client, extra_body=fields).choices[0].message
    assert prompt(server) == encode_chat([USER], "thinking" if thinks else "chat")
    said = (message.reasoning_content, message.content) if thinks else (message.content, "")
    assert said == ("Text", "")


def test_efforts_follow_the_checkpoint_s_revision(server: serving.Running, client: Any) -> None:
    for revision, efforts in EFFORTS.items():
        server.service.revision = revision
        for spelled, effort in efforts.items():
            ask(client, **({} if spelled is None else {"reasoning_effort": spelled}))
            assert prompt(server) == encode_chat([USER], "thinking", effort, revision=revision)
    server.service.revision = "april"


def test_tools_are_called_and_replayed_token_for_token(
    server: serving.Running, client: Any
) -> None:
    # Written anew, the list would have a blank.
    sampled = "Which?</think>Wait." + call("Rome", days="[1,2]")
    server.engine.script = lambda _: sampled
    answer = ask(client, tools=[WEATHER])
    message, first = answer.choices[0].message, server.engine.requests[-1].tokens
    assert answer.choices[0].finish_reason == "tool_calls"
    [tool] = message.tool_calls
    assert (message.content, json.loads(tool.function.arguments)) == (
        "Wait.",
        {"city": "Rome", "days": [1, 2]},
    )
    server.engine.script = lambda _: "</think>Sunny."
    result = {"role": "tool", "tool_call_id": tool.id, "content": "sun"}
    back = [USER, message.to_dict(), result]
    sent = [*first, *serving.tokenizer().encode(sampled), 1]
    for kept in (back, [USER, message.to_dict() | {"reasoning_content": None}, result]):
        assert ask(client, messages=kept, tools=[WEATHER]).choices[0].message.content == "Sunny."
        assert [*server.engine.requests[-1].tokens][: len(sent)] == sent
    # A changed call is written anew.
    tool.function.arguments = tool.function.arguments.replace("Rome", "Oslo")
    ask(client, messages=[USER, message.to_dict(), result], tools=[WEATHER])
    assert call("Oslo", days="[1, 2]") in prompt(server)


def test_malformed_calls_are_counted(server: serving.Running, client: Any) -> None:
    def malformed() -> int:
        text = httpx.get(f"{server.url}/metrics").text
        return int(float(re.findall(r"^v4jax:malformed_calls_total\S* (\S+)", text, re.M)[0]))

    before = malformed()
    # Without tools, nothing constrains what the model writes.
    server.engine.script = lambda _: "</think>Hi" + call("Rome", days="[1,") + call("Oslo")
    assert ask(client).choices[0].message.content == "Hi"
    assert malformed() == before + 1
    # What the limit cuts off is not malformed.
    cut = ask(client, max_tokens=20)
    assert (cut.choices[0].finish_reason, malformed()) == ("length", before + 1)


def test_the_least_recently_used_turns_are_not_kept() -> None:
    replays = Replays(max_tokens=5)
    function = {"name": "f", "arguments": "{}"}
    messages = [
        {"content": "", "reasoning_content": "", "tool_calls": [{"id": i, "function": function}]}
        for i in "abc"
    ]
    for message in messages[:2]:
        replays.keep(Turn(message, [], [1, 2]))
    assert replays.find(messages[0])
    replays.keep(Turn(messages[2], [], [1, 2]))
    assert [replays.find(message) is not None for message in messages] == [True, False, True]


def test_tool_choice_none_removes_the_tools(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "</think>Hi" + call("Rome")
    answer = ask(client, tools=[WEATHER], tool_choice="none")
    assert prompt(server) == encode_chat([USER], "thinking")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == "Hi"


def test_logprobs_cover_content_and_reasoning(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "Hm</think>H\u20ac"
    logprobs = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs
    text = lambda entries: b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert text([entry.to_dict() for entry in logprobs.content]) == "H\u20ac"
    assert text(logprobs.reasoning_content) == "Hm"
    for entry in logprobs.content:
        assert entry.logprob == -0.5
        assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5]
    streamed = chunks(server, logprobs=True)
    parts = [chunk["choices"][0]["logprobs"] or {} for chunk in streamed]
    assert text(entry for part in parts for entry in part.get("content", [])) == "H\u20ac"
    assert text(entry for part in parts for entry in part.get("reasoning_content", [])) == "Hm"


def test_a_prefix_is_continued(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: " world"
    prefix = {"role": "assistant", "content": "Hello", "prefix": True}
    answer = ask(client, messages=[USER, prefix], extra_body={"thinking": {"type": "disabled"}})
    assert answer.choices[0].message.content == " world"
    assert prompt(server) == encode_chat([USER], "chat") + "Hello"
    thoughts = prefix | {"content": "", "reasoning_content": "I"}
    assert ask(client, messages=[USER, thoughts]).choices[0].message.reasoning_content == " world"
    assert prompt(server) == encode_chat([USER], "thinking") + "I"


def test_stop_strings_end_the_answer_but_not_the_reasoning(
    server: serving.Running, client: Any
) -> None:
    server.engine.script = lambda _: "a END b</think>text END more"
    answer = ask(client, stop=[" END"])
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("a END b", "text")
    assert answer.choices[0].finish_reason == "stop"
    assert (
        answer.usage.completion_tokens
        < len(serving.tokenizer().encode("a END b</think>text END")) + 1
    )


def test_the_engine_is_asked_for_what_the_client_said(server: serving.Running, client: Any) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "presence_penalty": 1.0}
    more = {"top_k": 5, "user_id": "anna", "return_token_ids": True}
    answer = ask(client, **sampling, max_completion_tokens=3, extra_body=more)
    request = server.engine.requests[-1]
    assert (request.max_tokens, request.salt) == (3, "anna")
    for name, value in (sampling | {"top_k": 5}).items():
        assert getattr(request.sampling, name) == value
    assert answer.prompt_token_ids == [*request.tokens]
    assert answer.choices[0].token_ids == [1]


def test_a_prompt_s_log_probabilities_are_reported(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "</think>Hi"
    asked = {"prompt_logprobs": 1, "return_token_ids": True}
    answer = ask(client, logprobs=True, extra_body=asked)
    request, ids = server.engine.requests[-1], answer.prompt_token_ids
    assert (request.prompt_logprobs, request.top_logprobs) == (True, 1)
    assert ids == [*request.tokens]
    first, *rest = answer.prompt_logprobs
    assert first is None
    text = serving.tokenizer().token_bytes(ids[1]).decode()
    alone = {"logprob": -0.5, "rank": 1, "decoded_token": text}
    assert rest[0] == {str(ids[1]): alone}
    assert all(str(token) in entry for token, entry in zip(ids[1:], rest, strict=True))
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    first, *_ = chunks(server, **asked)
    assert (first["prompt_logprobs"], first["prompt_token_ids"]) == (answer.prompt_logprobs, ids)


def test_a_schema_is_in_the_prompt(server: serving.Running, client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    server.engine.script = lambda _: '</think>{"n": 1}'
    assert ask(client, response_format=form).choices[0].message.content == '{"n": 1}'
    system = {"role": "system", "content": "", "response_format": schema}
    assert prompt(server) == encode_chat([system, USER], "thinking")


def test_cached_tokens_are_reported_in_both_spellings(server: serving.Running, client: Any) -> None:
    long = [{"role": "user", "content": "word " * 200}]
    ask(client, messages=long)
    usage = ask(client, messages=long).usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens > 100
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert (
        ask(client, messages=long, extra_body={"user_id": "b"}).usage.prompt_cache_hit_tokens == 0
    )


def test_answers_are_constrained(server: serving.Running, client: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    cases = [
        ({"response_format": {"type": "json_object"}}, "</think>{}", "</think>no"),
        ({"response_format": schema}, "</think>[1]", "</think>{}"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "</think>" + call("A"), "</think>no"),
        ({"tools": [WEATHER]}, "</think>no", "</think>" + call("A").replace("weather", "other")),
        ({"extra_body": {"thinking_token_budget": 3}}, "a</think>b", "a b c d e"),
    ]
    for fields, right, wrong in cases:
        server.engine.script = lambda _, text=right: text
        assert ask(client, **fields).choices[0].finish_reason in ("stop", "tool_calls")
        server.engine.script = lambda _, text=wrong: text
        with pytest.raises(openai.InternalServerError, match="could not go on"):
            ask(client, **fields)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_answers_do_not_depend_on_how_many_tokens_come_at_once(
    server: serving.Running, client: Any, step: int
) -> None:
    server.engine.script = lambda _: "\u20ac</think>\u20acA END" + call("Rome")
    server.engine.step = step
    for stop, finish, names in (([], "tool_calls", ["weather"]), ([" END"], "stop", [])):
        streamed = client.chat.completions.create(
            model="tiny", messages=[USER], tools=[WEATHER], stop=stop, logprobs=True, stream=True
        )
        choices = [chunk.choices[0] for chunk in streamed]
        deltas = [choice.delta for choice in choices]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "\u20ac"
        content = "".join(delta.content or "" for delta in deltas)
        assert content == ("\u20acA" if stop else "\u20acA END")
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert [call.function.name for call in calls if call.id] == names
        assert choices[-1].finish_reason == finish


def test_a_system_message_may_come_alone_or_last(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "</think>Yes"
    for messages in (
        [{"role": "system", "content": "S"}],
        [USER, {"role": "developer", "content": "S"}],
    ):
        assert ask(client, messages=messages).choices[0].message.content == "Yes"
        assert prompt(server).endswith("<think>")


def test_strict_mode_refuses_what_the_hosted_api_refuses(
    server: serving.Running, client: Any
) -> None:
    server.service.strict = True
    past = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "sun"}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
    try:
        for fields in (
            {"messages": [USER, past, result], "tools": [WEATHER]},
            {"tools": [WEATHER], "tool_choice": "required"},
            {"response_format": schema},
        ):
            with pytest.raises(openai.BadRequestError):
                ask(client, **fields)
        past["reasoning_content"] = ""
        ask(client, messages=[USER, past, result], tools=[WEATHER], temperature=0.1)
        assert server.engine.requests[-1].sampling.temperature == 1
    finally:
        server.service.strict = False
