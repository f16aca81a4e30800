"""Parsing model output: reference vectors, arbitrary chunks and malformed text."""

import itertools
import json
from pathlib import Path

import pytest

from v4jax.text.chat import DSML, EOS
from v4jax.text.chat_parser import (
    ArgumentsDelta,
    ChatParser,
    ContentDelta,
    Done,
    Event,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
    parse_chat,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "chat_vectors.json").read_text("utf-8"))
OPEN, CLOSE = f"\n\n<{DSML}tool_calls>\n", f"\n</{DSML}tool_calls>"
END_INVOKE = f"\n</{DSML}invoke>"


def invoke(name: str, *parameters: str) -> str:
    return f'<{DSML}invoke name="{name}">\n' + "\n".join(parameters) + END_INVOKE


def parameter(key: str, value: str, is_string: bool = True) -> str:
    opening = f'<{DSML}parameter name="{key}" string="{str(is_string).lower()}">'
    return f"{opening}{value}</{DSML}parameter>"


def called(name: str, arguments: str, **extra: bool) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def events(pieces, mode: str = "chat") -> list[Event]:
    """All events of a text fed in pieces; adjacent deltas of the same kind are merged."""
    parser = ChatParser(mode, new_id=map(str, itertools.count()).__next__)
    merged: list[Event] = []
    for event in [*itertools.chain(*map(parser.feed, pieces)), *parser.finish()]:
        match merged[-1:], event:
            case [ContentDelta(a)], ContentDelta(b):
                merged[-1] = ContentDelta(a + b)
            case [ReasoningDelta(a)], ReasoningDelta(b):
                merged[-1] = ReasoningDelta(a + b)
            case [ArgumentsDelta(i, a)], ArgumentsDelta(j, b) if i == j:
                merged[-1] = ArgumentsDelta(i, a + b)
            case _:
                merged.append(event)
    return merged


@pytest.mark.parametrize("vector", VECTORS["parse"], ids=lambda v: v["name"])
def test_reference_vectors_are_parsed_and_errors_become_incomplete_calls(vector):
    message = parse_chat(vector["text"], vector["thinking_mode"])
    if vector["reference_error"] is None:
        assert message == vector["message"]
    else:
        assert message["content"] == message["reasoning_content"] == ""
        assert [call["incomplete"] for call in message["tool_calls"]] == [True]


def test_a_call_is_reported_step_by_step():
    text = f"Hm.{OPEN}{invoke('f', parameter('a', 'x'), parameter('b', '[1]', False))}\n"
    assert events([text + invoke("g") + CLOSE + EOS + "never read"]) == [
        ContentDelta("Hm."),
        ToolCallStart(0, "0", "f"),
        ArgumentsDelta(0, '{"a": "x", "b": [1]}'),
        ToolCallEnd(0, complete=True),
        ToolCallStart(1, "1", "g"),
        ArgumentsDelta(1, "{}"),
        ToolCallEnd(1, complete=True),
        Done(truncated=False),
    ]


def test_ids_differ_from_call_to_call_and_from_parser_to_parser():
    text = OPEN + invoke("f") + "\n" + invoke("f") + CLOSE
    starts = [e for _ in range(2) for e in ChatParser().feed(text) if isinstance(e, ToolCallStart)]
    assert len({event.id for event in starts}) == 4


def test_text_and_string_values_are_streamed_without_delay():
    parser = ChatParser("thinking")
    assert parser.feed("Let") == [ReasoningDelta("Let")]
    assert parser.feed(" me</th") == [ReasoningDelta(" me")]
    assert parser.feed("ink>So\n") == [ContentDelta("So")]
    assert parser.feed(f'\n<{DSML}tool_calls><{DSML}invoke name="f"') == []
    assert [type(e) for e in parser.feed(">")] == [ToolCallStart]
    opening = parser.feed(f'\n<{DSML}parameter name="a" string="true">')
    assert opening == [ArgumentsDelta(0, '{"a": "')]
    assert parser.feed('say "hi"\n</') == [ArgumentsDelta(0, 'say \\"hi\\"\\n')]
    assert parser.feed("b>") == [ArgumentsDelta(0, "</b>")]
    assert parser.feed(f"</{DSML}parameter>") == [ArgumentsDelta(0, '"')]


def test_nothing_comes_after_done():
    parser = ChatParser()
    assert parser.feed(EOS) == [Done(truncated=False)]
    assert parser.feed("more") == parser.finish() == []


def test_an_unknown_mode_is_rejected():
    with pytest.raises(ValueError, match="thinking_mode is 'both'; use one of chat, thinking"):
        ChatParser("both")


CASES = {
    "less-than signs are text": ("chat", "a < b </b> <thin", ("a < b </b> <thin", "", [])),
    "line ends are text": ("chat", "a\n\nb\n\n\n", ("a\n\nb\n\n\n", "", [])),
    "only the empty line before a call belongs to it": (
        "chat",
        f"a\n{OPEN}{invoke('f')}{CLOSE}",
        ("a\n", "", [called("f", "{}")]),
    ),
    "a call needs neither an empty line nor line ends": (
        "chat",
        (f"a{OPEN}{invoke('f', parameter('k', 'v'))}{CLOSE}").replace("\n", ""),
        ("a", "", [called("f", '{"k": "v"}')]),
    ),
    "an empty block is no call": ("chat", f"a{OPEN}{CLOSE[1:]}", ("a", "", [])),
    "a call needs no block": ("chat", f"a{invoke('f')}b", ("ab", "", [called("f", "{}")])),
    "text after calls is content": (
        "thinking",
        f"r</think>{OPEN}{invoke('f')}{CLOSE}b",
        ("b", "r", [called("f", "{}")]),
    ),
    "a call in unclosed reasoning is a call": (
        "thinking",
        f"r{OPEN}{invoke('f', parameter('k', '1', False))}{CLOSE}s</think>a",
        ("a", "rs", [called("f", '{"k": 1}')]),
    ),
    "reasoning may be opened by the model": ("chat", "<think>r</think>a", ("a", "r", [])),
    "a second opening of the reasoning is text": ("thinking", "r<think>", ("", "r<think>", [])),
    "a stray end of reasoning is dropped": ("chat", "a</think>b", ("ab", "", [])),
    "stray tags are text": (
        "chat",
        f"a{END_INVOKE}{CLOSE}{parameter('k', 'v')}",
        (f"a{END_INVOKE}{CLOSE}{parameter('k', 'v')}", "", []),
    ),
    "a block without a call is text": ("chat", f"a{OPEN}hello", (f"a{OPEN}hello", "", [])),
    "a malformed call is text": (
        "chat",
        f'a{OPEN}<{DSML}invoke name="f\n{CLOSE}',
        (f'a{OPEN}<{DSML}invoke name="f\n{CLOSE}', "", []),
    ),
    "a call in a malformed call is a call": (
        "chat",
        f'<{DSML}invoke name="{invoke("f")}',
        (f'<{DSML}invoke name="', "", [called("f", "{}")]),
    ),
    "text in a call ends it": (
        "chat",
        f'{OPEN}<{DSML}invoke name="f">{parameter("k", "v")}\nhello{END_INVOKE}{CLOSE}',
        (f"\nhello{END_INVOKE}{CLOSE}", "", [called("f", '{"k": "v"}', incomplete=True)]),
    ),
    "a malformed parameter ends the call": (
        "chat",
        f'<{DSML}invoke name="f"><{DSML}parameter name="k">v</{DSML}parameter>',
        (
            f'<{DSML}parameter name="k">v</{DSML}parameter>',
            "",
            [called("f", "{}", incomplete=True)],
        ),
    ),
    "a call that is not closed ends where the next begins": (
        "chat",
        f'{OPEN}<{DSML}invoke name="f">{parameter("k", "v")}{invoke("g")}{CLOSE}',
        ("", "", [called("f", '{"k": "v"}', incomplete=True), called("g", "{}")]),
    ),
    "a call that is not closed ends with the block": (
        "chat",
        f'{OPEN}<{DSML}invoke name="f">{CLOSE}a',
        ("a", "", [called("f", "{}", incomplete=True)]),
    ),
    "a block that is not closed is read": (
        "chat",
        f"{OPEN}{invoke('f')}\n{EOS}",
        ("", "", [called("f", "{}")]),
    ),
    "a repeated parameter keeps its first value": (
        "chat",
        invoke("f", parameter("k", "v"), parameter("k", "w"), parameter("l", "1", False)),
        ("", "", [called("f", '{"k": "v", "l": 1}', incomplete=True)]),
    ),
    "values may speak of tags": (
        "chat",
        invoke("f", parameter("k", f"{OPEN}{END_INVOKE}</think><{DSML}parameter")),
        ("", "", [called("f", json.dumps({"k": f"{OPEN}{END_INVOKE}</think><{DSML}parameter"},
                                         ensure_ascii=False))]),
    ),
    "values that are not strings stand as they are": (
        "chat",
        invoke("f", parameter("k", ' {"a":1e5} ', False), parameter('"q"', "", True)),
        ("", "", [called("f", '{"k":  {"a":1e5} , "\\"q\\"": ""}')]),
    ),
    **{
        f"a value that is no JSON becomes a string: {value[:9]}": (
            "chat",
            invoke("f", parameter("k", value, False), parameter("l", "1", False)),
            ("", "", [called("f", json.dumps({"k": value, "l": 1}), incomplete=True)]),
        )
        for value in ("Tense", "", "{'a': 1}", "True", "[1, 2", '"a', "1, 2", "NaN", "-Infinity",
                      "1e999", '{"a": [NaN]}', '"\\ud800"', "9" * 5000, "[" * 100000)
    },
    "blanks may stand in tags": (
        "chat",
        f'a\n\n<{DSML}tool_calls >\n<{DSML}invoke  name = "f" \n>\n<{DSML}parameter\tname="k" '
        f'string = "true"\t>v</{DSML}parameter  >\n</{DSML}invoke\n>\n</{DSML}tool_calls >b',
        ("ab", "", [called("f", '{"k": "v"}')]),
    ),
    "quotes and blanks may stand in names": (
        "chat",
        invoke('f" g', parameter('k" > "', "v")),
        ("", "", [called('f" g', '{"k\\" > \\"": "v"}')]),
    ),
    "closers before a call do not lose it": (
        "chat",
        f"a{OPEN}</{DSML}invoke></{DSML}parameter>\n{invoke('f')}{CLOSE}",
        ("a", "", [called("f", "{}")]),
    ),
    "closers in a call and after it do not lose it": (
        "thinking",
        f"r{OPEN}"
        + invoke("f", parameter("k", "v") + f"</{DSML}parameter >", "</think>", parameter("l", "w"))
        + f"\n</{DSML}invoke>\n{invoke('g')}{CLOSE}a",
        ("a", "r", [called("f", '{"k": "v", "l": "w"}'), called("g", "{}")]),
    ),
    "the end of the sentence ends a value": (
        "chat",
        f"{OPEN}{invoke('f', parameter('k', f'v{EOS}w'))}",
        ("", "", [called("f", '{"k": "v"}', incomplete=True)]),
    ),
    "the end of the sentence ends a call": (
        "chat",
        f'<{DSML}invoke name="f">{EOS}',
        ("", "", [called("f", "{}", incomplete=True)]),
    ),
    "nothing is nothing": ("thinking", "", ("", "", [])),
}  # fmt: skip


@pytest.mark.parametrize(("mode", "text", "expected"), CASES.values(), ids=CASES.keys())
def test_parsed_messages(mode, text, expected):
    message = parse_chat(text, mode)
    got = (message["content"], message["reasoning_content"], message["tool_calls"])
    assert got == expected


CALL = f"Hm.{OPEN}{invoke('f', parameter('s', 'ab'), parameter('j', '[10]', False))}{CLOSE}"


@pytest.mark.parametrize(
    ("cut_before", "arguments"),
    [
        ("tool_calls", None),
        (f'<{DSML}invoke', None),
        (' name="f"', None),
        ('">', None),
        (f'<{DSML}parameter name="s"', "{}"),
        ('" string="true"', "{}"),
        ("b</", '{"s": "a"}'),
        (f"</{DSML}parameter>", '{"s": "ab"}'),
        ("parameter>", '{"s": "ab"}'),
        ('" string="false"', '{"s": "ab"}'),
        ("0]", '{"s": "ab"}'),
        (f"</{DSML}invoke>", '{"s": "ab", "j": [10]}'),
        ("invoke>", '{"s": "ab", "j": [10]}'),
    ],
)  # fmt: skip
def test_truncation_in_a_call_leaks_no_tag_and_leaves_valid_arguments(cut_before, arguments):
    text = CALL[: CALL.index(cut_before)]
    *before, done = events([text])
    assert done == Done(truncated=True)
    assert before[0] == ContentDelta("Hm.")
    message = parse_chat(text)
    expected = [] if arguments is None else [called("f", arguments, incomplete=True)]
    assert (message["content"], message["tool_calls"]) == ("Hm.", expected)


@pytest.mark.parametrize("cut_before", ["tool_calls>", ">"])
def test_truncation_after_the_calls_loses_nothing_and_leaks_no_tag(cut_before):
    text = CALL[: CALL.rindex(cut_before)]
    message = parse_chat(text)
    assert message == parse_chat(CALL)
    assert events([text])[-1] == Done(truncated=True)
    assert events([CALL])[-1] == Done(truncated=False)
