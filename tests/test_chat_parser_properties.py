"""Properties of parsing, for arbitrary output."""

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_chat_parser import (
    CALL,
    CLOSE,
    END_INVOKE,
    OPEN,
    called,
    events,
    invoke,
    parameter,
)
from v4jax.text.chat import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER, encode_chat
from v4jax.text.chat_parser import (
    ArgumentsDelta,
    Done,
    ToolCallEnd,
    ToolCallStart,
    parse_chat,
)

SNIPPETS = st.sampled_from(
    [
        *("a", "\n", "\n\n", "<", "</", '"', '">', "3", '{"k": 1}', "\u65e5", "\U0001f30d"),
        *(THINK, END_THINK, EOS, BOS, USER, ASSISTANT, DSML, f"<{DSML}", f"</{DSML}"),
        *(
            OPEN,
            CLOSE,
            invoke("f"),
            END_INVOKE,
            f'<{DSML}invoke name="',
            f'<{DSML}invoke name="f">',
        ),
        *(parameter("k", "v"), parameter("j", "1", False), f'<{DSML}parameter name="'),
        *(
            f'<{DSML}parameter name="k" string="true">',
            f'<{DSML}parameter name="j" string="false">',
        ),
        *(f"</{DSML}parameter>", f"<{DSML}tool_calls>", 'string="true">'),
        *(
            f"</{DSML}parameter >",
            f"</{DSML}invoke\n>",
            f'<{DSML}invoke name="g" >',
            '" ',
            " ",
            "\t",
        ),
        *(
            parameter("m", "Tense", False),
            parameter("n", "NaN", False),
            parameter("o", "[1e5]", False),
        ),
    ]
)
OUTPUTS = st.lists(SNIPPETS, max_size=12).map("".join)
MODES = st.sampled_from(["chat", "thinking"])


@settings(deadline=None, max_examples=500)
@given(OUTPUTS, MODES, st.lists(st.integers(0, 300), max_size=6))
def test_chunking_never_changes_the_events(text, mode, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert events(pieces, mode) == events([text], mode) == events(text, mode)


@settings(deadline=None, max_examples=500)
@given(OUTPUTS, MODES)
def test_events_of_any_text_are_in_order(text, mode):
    got = events([text], mode)
    assert sum(isinstance(e, Done) for e in got) == 1
    assert isinstance(got[-1], Done)
    open_call, calls = None, 0
    for event in got[:-1]:
        match event:
            case ToolCallStart(index, _, _):
                assert (open_call, index) == (None, calls)
                open_call = index
            case ArgumentsDelta(index, _):
                assert open_call == index
            case ToolCallEnd(index, _):
                assert open_call == index
                open_call, calls = None, calls + 1
            case _:
                assert open_call is None
    assert open_call is None
    assert all(isinstance(value, dict) for value in arguments(text, mode))


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def arguments(text: str, mode: str = "chat") -> list[Any]:
    """Arguments of all calls, complete or not."""
    calls = parse_chat(text, mode)["tool_calls"]
    return [json.loads(c["function"]["arguments"], parse_constant=strict) for c in calls]


VALUES = st.text() | st.sampled_from(["1", "1e400", "NaN", '"\\ud800"', "{}", '{"a": 1, "a": 2}'])
NUMBERS = st.floats().map(json.dumps) | st.integers().map(str)
PARAMETERS = st.builds(parameter, st.text(), VALUES | NUMBERS, st.booleans())
CALLS = st.builds(lambda name, parts: invoke(name, *parts), st.text(), st.lists(PARAMETERS))


@settings(deadline=None, max_examples=500)
@given(st.one_of(OUTPUTS, st.lists(CALLS | SNIPPETS, max_size=4).map("".join)), MODES)
def test_complete_calls_survive_encoding_and_parsing(text, mode):
    calls = parse_chat(text, mode)["tool_calls"]
    complete = [call for call in calls if not call.get("incomplete")]
    turn = {"role": "assistant", "content": "", "tool_calls": complete}
    parsed = parse_chat(encode_chat([turn], add_bos=False))["tool_calls"]
    value = lambda c: (c["function"]["name"], json.loads(c["function"]["arguments"]))
    assert [value(call) for call in parsed] == [value(call) for call in complete]
    assert not any(call.get("incomplete") for call in parsed)
    assert all(isinstance(members, dict) for members in arguments(text, mode))


PLAIN = st.text(max_size=12).filter(lambda s: DSML not in s and "<" not in s)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(PLAIN, JSONS, max_size=4)


@settings(deadline=None, max_examples=200)
@given(PLAIN, PLAIN, st.lists(st.tuples(st.sampled_from("fg"), ARGUMENTS), max_size=3))
def test_encoding_and_parsing_round_trip(reasoning, content, calls):
    turn = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [called(f, json.dumps(a, ensure_ascii=False)) for f, a in calls],
    }
    user = {"role": "user", "content": "u"}
    prompt = encode_chat([user], "thinking")
    assert parse_chat(encode_chat([user, turn], "thinking")[len(prompt) :], "thinking") == turn


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(CALL)), MODES)
def test_a_prefix_of_an_output_parses_to_a_prefix_of_its_message(cut, mode):
    """Except for line ends and '<', which may belong to a tag."""
    whole, part = parse_chat(CALL, mode), parse_chat(CALL[:cut], mode)
    for field in ("content", "reasoning_content"):
        text = part[field].split("<")[0].rstrip("\n")
        assert whole[field].startswith(text)
    assert len(part["tool_calls"]) <= 1
