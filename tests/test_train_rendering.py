"""Rows become the tokens of the chat encoding, and the right ones are trained."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.text import chat
from v4jax.text.chat import BOS, END_THINK, EOS, USER
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer
from v4jax_train.data.rendering import Document, Renderer, RenderSettings
from v4jax_train.data.rows import ChatRow, CompletionRow, TextRow

VECTORS = json.loads((Path(__file__).parent / "data" / "chat_vectors.json").read_text("utf-8"))
DEMO = Tokenizer(build_demo_tokenizer(1024))
TOOL = {"type": "function", "function": {"name": "f"}}
TALK = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a", "reasoning_content": "r"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b", "reasoning_content": "s"},
]
THINKING = {"thinking_mode": "thinking", "drop_thinking": False}


def render(row: Any, **fields: Any) -> Document:
    return Renderer(DEMO, RenderSettings(**fields)).render(row)


def spans(document: Document) -> list[str]:
    """The text of each run of trained tokens."""
    runs = itertools.groupby(zip(document.trained_N, document.ids_N, strict=True), lambda x: x[0])
    return [DEMO.decode([int(i) for _, i in run]) for trained, run in runs if trained]


def marked(messages: list[dict]) -> list[dict]:
    """The messages with a mark where each assistant's reasoning and answer begin."""
    messages = copy.deepcopy(messages)
    for message in messages:
        if message["role"] == "assistant":
            message["reasoning_content"] = "{R}" + (message.get("reasoning_content") or "")
            message["content"] = "{A}" + (message.get("content") or "")
    return messages


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize(
    "vector", VECTORS["encode"], ids=lambda v: f"{v['name']}-{v['thinking_mode']}"
)
def test_vectors_render_to_their_prompts_and_train_what_assistants_say(
    vector: dict[str, Any], reasoning: bool
) -> None:
    """What assistants say is located by marks inserted into their messages."""
    fields = {name: vector[name] for name in ("thinking_mode", "reasoning_effort", "drop_thinking")}
    revision = vector["revision"]
    text = chat.encode_chat(marked(vector["messages"]), **fields, revision=revision)
    expected = re.findall(rf"{'{[RA]}' if reasoning else '{A}'}.*?{EOS}", text, re.DOTALL)
    expected = [span.replace("{R}", "").replace("{A}", "") for span in expected]
    row = ChatRow(messages=vector["messages"], **fields)
    if not expected:
        with pytest.raises(ValueError, match="messages have no assistant's token to train"):
            render(row, revision=revision, reasoning=reasoning)
        return
    document = render(row, revision=revision, reasoning=reasoning)
    assert document.ids_N.tolist() == DEMO.encode(vector["prompt"])
    assert spans(document) == expected


def test_turns_and_reasoning_are_trained_as_configured() -> None:
    row = ChatRow(messages=TALK, thinking_mode="thinking")
    answers = [f"a{EOS}", f"s{END_THINK}b{EOS}"]
    assert spans(render(row)) == answers
    assert spans(render(row, turns="last")) == answers[1:]
    assert spans(render(row, reasoning=False)) == [f"a{EOS}", f"b{EOS}"]
    assert spans(render(row, drop_thinking=False))[0] == f"r{END_THINK}a{EOS}"
    assert spans(render(row, turns="last", reasoning=False)) == [f"b{EOS}"]
    unanswered = ChatRow(messages=TALK[:3], thinking_mode="thinking")
    assert spans(render(unanswered, turns="last")) == answers[:1]


def test_a_row_overrides_the_settings() -> None:
    row = ChatRow(messages=TALK, thinking_mode="chat", reasoning_effort="max")
    assert spans(render(row, thinking_mode="thinking")) == [f"a{EOS}", f"b{EOS}"]
    row = ChatRow(messages=TALK, **THINKING)
    document = render(row, reasoning_effort="max", revision="0731")
    text = chat.encode_chat(TALK, reasoning_effort="max", revision="0731", **THINKING)
    assert DEMO.decode(document.ids_N.tolist()) == text
    assert spans(document)[0] == f"r{END_THINK}a{EOS}"


def test_empty_reasoning_is_trained() -> None:
    row = ChatRow(messages=[TALK[0], {"role": "assistant", "content": "a"}], **THINKING)
    assert spans(render(row)) == [f"{END_THINK}a{EOS}"]
    assert spans(render(row, reasoning=False)) == [f"a{EOS}"]


@pytest.mark.parametrize(
    ("flags", "turns", "expected"),
    [
        ((None, None), "all", ["a", "b"]),
        ((False, None), "all", ["b"]),
        ((None, False), "all", ["a"]),
        ((True, None), "last", ["a", "b"]),
        ((True, False), "last", ["a"]),
    ],
)
def test_a_messages_flag_overrides_the_settings(flags, turns, expected) -> None:
    messages = [dict(message) for message in TALK]
    messages[1]["train"], messages[3]["train"] = flags
    document = render(ChatRow(messages=messages, thinking_mode="chat"), turns=turns)
    assert spans(document) == [text + EOS for text in expected]


def test_flags_stay_with_their_messages_when_others_are_merged_dropped_or_added() -> None:
    messages = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "u"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "one", "train": False},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "two", "train": True},
        {"role": "user", "content": "w"},
        {"role": "assistant", "content": "three", "train": False},
    ]
    for tools in ([], [TOOL]):
        row = ChatRow(messages=messages, tools=tools, thinking_mode="thinking")
        assert spans(render(row)) == [f"{END_THINK}two{EOS}" if tools else f"two{EOS}"]


def test_tools_of_a_row_belong_to_its_system_message() -> None:
    system = {"role": "system", "content": "S"}
    for messages, merged in (
        (TALK, [{"role": "system", "tools": [TOOL]}, *TALK]),
        ([system, *TALK], [{**system, "tools": [TOOL]}, *TALK]),
    ):
        row = ChatRow(messages=messages, tools=[TOOL], thinking_mode="thinking")
        text = chat.encode_chat(merged, "thinking")
        assert render(row).ids_N.tolist() == DEMO.encode(text)
        assert spans(render(row))[0] == f"r{END_THINK}a{EOS}"
    assert system == {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("messages", "fields", "problem"),
    [
        (TALK, {}, "thinking_mode is set neither in the row nor in the settings"),
        ([*TALK, {"role": "bot"}], {"thinking_mode": "chat"}, "messages[4].role is 'bot'"),
        (["u"], {"thinking_mode": "chat", "tools": [TOOL]}, "messages[0] is str"),
        (
            [*TALK, {"role": "bot"}],
            {"thinking_mode": "chat", "tools": [TOOL]},
            "messages[4].role is 'bot'",
        ),
        (TALK, {"thinking_mode": "chat", "tools": ["f"]}, "tools[0] has no function object"),
        (
            [{"role": "system", "tools": [TOOL]}, *TALK],
            {"thinking_mode": "chat", "tools": [TOOL]},
            "tools are given by the row and by messages[0]",
        ),
        (
            TALK,
            {"thinking_mode": "thinking", "reasoning_effort": "low"},
            "reasoning_effort is 'low'; revision april has",
        ),
        (TALK[:1], {"thinking_mode": "chat"}, "messages have no assistant's token to train"),
        (
            [TALK[0], {**TALK[1], "train": False}],
            {"thinking_mode": "chat"},
            "messages have no assistant's token to train",
        ),
        (
            [{"role": "user", "content": "\ud83d"}, TALK[1]],
            {"thinking_mode": "chat"},
            "The text has half a surrogate pair",
        ),
    ],
)
def test_rows_that_cannot_be_rendered_are_rejected(messages, fields, problem) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        render(ChatRow(messages=messages, **fields))


def test_only_a_completion_and_its_end_are_trained() -> None:
    document = render(CompletionRow(prompt="a t", completion="he"))
    # Encoded separately, as in generation: joined first, " the" would be one token.
    assert document.ids_N.tolist() == [0, *DEMO.encode("a t"), *DEMO.encode("he"), 1]
    assert spans(document) == [f"he{EOS}"]
    marked_up = CompletionRow(prompt=f"{BOS}a t", completion=f"he{EOS}")
    assert render(marked_up).ids_N.tolist() == document.ids_N.tolist()


@pytest.mark.parametrize("text", ["a document", f"{BOS}a document", f"a document{EOS}"])
def test_all_of_a_text_is_trained(text: str) -> None:
    document = render(TextRow(text=text))
    assert document.ids_N.tolist() == [0, *DEMO.encode("a document"), 1]
    assert document.trained_N.all()


def test_a_partly_trained_token_is_not_trained() -> None:
    first = {"role": "assistant", "content": "say t", "wo_eos": True}
    messages = [first, {"role": "assistant", "content": "he end", "train": False}]
    document = render(ChatRow(messages=messages, thinking_mode="chat"))
    assert document.ids_N.tolist() == DEMO.encode(f"{BOS}say the end{EOS}")
    assert spans(document) == ["say"]
    row = ChatRow(messages=[first, {**messages[1], "train": None}], thinking_mode="chat")
    assert spans(render(row)) == [f"say the end{EOS}"]


TEXTS = st.one_of(st.text(max_size=6), st.sampled_from([" the", " t", "he and", "\u4f60", USER]))
RENDERER = Renderer(DEMO, RenderSettings(thinking_mode="chat"))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=6))
def test_trained_tokens_are_those_with_all_bytes_in_trained_messages(parts) -> None:
    messages = [
        {"role": "assistant", "content": text, "wo_eos": True, "train": flag}
        for text, flag in parts
    ]
    messages.append({"role": "assistant", "content": "", "train": True})
    document = RENDERER.render(ChatRow(messages=messages))
    trained_bytes = [False] * len(BOS.encode())
    trained_bytes += [flag for text, flag in parts for _ in text.encode()]
    trained_bytes += [True] * len(EOS.encode())
    for token, trained in zip(document.ids_N, document.trained_N, strict=True):
        size = len(DEMO.token_bytes(int(token)))
        assert trained == all(trained_bytes[:size])
        trained_bytes = trained_bytes[size:]
    assert not trained_bytes
    assert document.ids_N.dtype == np.int32


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"thinking_mode": "on"}, "thinking_mode is 'on'"),
        ({"reasoning_effort": "most"}, "reasoning_effort is 'most'"),
        ({"revision": "may"}, "revision is 'may'"),
        ({"turns": "first"}, "turns is 'first'; use 'all' or 'last'"),
    ],
)
def test_invalid_settings_are_rejected(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RenderSettings(**fields)


def test_unsuitable_tokenizers_are_rejected() -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    bare.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ValueError, match="The tokenizer has no"):
        Renderer(Tokenizer(bare), RenderSettings())
    altering = build_demo_tokenizer(300)
    altering.normalizer = tokenizers.normalizers.Replace("a", "")
    renderer = Renderer(Tokenizer(altering), RenderSettings(thinking_mode="chat"))
    with pytest.raises(ValueError, match="The tokenizer changes the text"):
        renderer.render(ChatRow(messages=TALK))
