"""The chat encoding against vectors from the reference encoder, and rule by rule."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from v4jax.text import chat
from v4jax.text.chat import ASSISTANT, BOS, DSML, END_THINK, EOS, LATEST_REMINDER, THINK, USER
from v4jax.text.chat import encode_chat as encode

VECTORS = json.loads((Path(__file__).parent / "data" / "chat_vectors.json").read_text("utf-8"))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"unit": "\u00b0C"}}}


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(content: Any, call_id: Any = "a"):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(arguments: Any = "{}", call_id: Any = "a", name: Any = "f"):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def result(text):
    return f"<tool_result>{text}</tool_result>"


def calls_block(*parameters):
    """One call of f for each argument, which is the DSML of its parameters."""
    invokes = "\n".join(f'<{DSML}invoke name="f">\n{p}\n</{DSML}invoke>' for p in parameters)
    return f"\n\n<{DSML}tool_calls>\n{invokes}\n</{DSML}tool_calls>"


def parameter(key, value, is_string):
    return f'<{DSML}parameter name="{key}" string="{is_string}">{value}</{DSML}parameter>'


def vector_name(vector):
    fields = ("name", "revision", "thinking_mode", "reasoning_effort", "drop_thinking")
    return "-".join(str(vector[field]) for field in fields)


@pytest.mark.parametrize("vector", VECTORS["encode"], ids=vector_name)
def test_reference_vectors_are_encoded_byte_for_byte(vector):
    text = encode(
        vector["messages"],
        vector["thinking_mode"],
        vector["reasoning_effort"],
        drop_thinking=vector["drop_thinking"],
        revision=vector["revision"],
    )
    assert text == vector["prompt"]


@pytest.mark.parametrize("mode", chat.THINKING_MODES)
@pytest.mark.parametrize("task", [task for task in chat.TASKS if task != "action"])
def test_a_task_token_follows_the_user_directly_in_either_mode(task, mode):
    assert encode([user("q", task=task)], mode) == f"{BOS}{USER}q{chat.TASKS[task]}"


@pytest.mark.parametrize(("mode", "mark"), [("chat", END_THINK), ("thinking", THINK)])
def test_the_action_task_opens_the_assistant_first(mode, mark):
    text = encode([user("q", task="action")], mode)
    assert text == f"{BOS}{USER}q{ASSISTANT}{mark}{chat.TASKS['action']}"


def test_the_action_task_thinks_in_earlier_turns_too():
    messages = [user("q", task="action"), assistant("yes"), user("u")]
    action = f"{ASSISTANT}{THINK}{chat.TASKS['action']}"
    assert encode(messages, "thinking") == f"{BOS}{USER}q{action}yes{EOS}{USER}u{ASSISTANT}{THINK}"


def test_the_answer_to_a_task_shows_no_thinking():
    messages = [user("q", task="query"), assistant("terms", reasoning_content="r")]
    expected = f"{BOS}{USER}q{chat.TASKS['query']}terms{EOS}"
    assert encode(messages, "thinking", drop_thinking=False) == expected


def test_a_user_after_a_task_is_not_merged_and_the_task_token_is_dropped():
    text = encode([user("q", task="title"), user("u")])
    assert text == f"{BOS}{USER}q{USER}u{ASSISTANT}{END_THINK}"


def test_a_task_is_lost_when_its_message_merges_into_the_previous_one():
    text = encode([user("u"), user("q", task="title")])
    assert text == f"{BOS}{USER}u\n\nq{ASSISTANT}{END_THINK}"


def test_a_tool_result_merges_into_a_user_with_a_task():
    text = encode([user("q", task="title"), tool("r")])
    assert text == f"{BOS}{USER}q\n\n{result('r')}{chat.TASKS['title']}"


def test_an_assistant_may_have_a_task():
    text = encode([user("u"), assistant("a", task="domain")])
    assert text == f"{BOS}{USER}u{ASSISTANT}{END_THINK}a{EOS}{chat.TASKS['domain']}"


def test_wo_eos_omits_the_end_token_and_mask_changes_nothing():
    messages = [user("u", mask=1), assistant("par", wo_eos=True), assistant("tial", mask=0)]
    assert encode(messages) == f"{BOS}{USER}u{ASSISTANT}{END_THINK}partial{EOS}"


def test_tool_results_are_sorted_by_call_and_texts_keep_their_places():
    calls = [call(call_id="a"), call(call_id="b"), call(call_id="c")]
    messages = [
        *(user("u"), assistant(None, tool_calls=calls)),
        *(tool("C", "c"), user("between"), tool("B", "b"), tool("A", "a")),
    ]
    ordered = "\n\n".join([result("A"), "between", result("B"), result("C")])
    assert encode(messages).endswith(f"{USER}{ordered}{ASSISTANT}{END_THINK}")


def test_results_of_unknown_calls_come_first_in_their_original_order():
    messages = [
        assistant("", tool_calls=[call(call_id="a"), call(call_id="b")]),
        *(tool("B", "b"), tool("X", "x"), {"role": "tool", "content": "none"}, tool("A", "a")),
    ]
    ordered = "\n\n".join(result(text) for text in ("X", "none", "A", "B"))
    assert f"{USER}{ordered}{ASSISTANT}" in encode(messages)


def test_calls_without_ids_keep_the_order_of_results():
    earlier = [call(call_id="a"), call(call_id="b")]
    nameless = [call(call_id=None), call(call_id="")]
    messages = [
        *(assistant("", tool_calls=earlier), tool("A", "a"), tool("B", "b")),
        *(assistant("", tool_calls=nameless), tool("B", "b"), tool("A", "a")),
    ]
    assert encode(messages).endswith(f"{result('B')}\n\n{result('A')}{ASSISTANT}{END_THINK}")


@pytest.mark.parametrize("role", ["user", "tool"])
def test_content_parts_are_joined_and_unsupported_ones_are_marked(role):
    parts = [{"type": "text", "text": "one"}, {"type": "image_url"}, {"type": "text"}, {}]
    joined = "one\n\n[Unsupported image_url]\n\n\n\n[Unsupported None]"
    expected = joined if role == "user" else result(joined)
    assert encode([{"role": role, "content": parts}]).startswith(
        f"{BOS}{USER}{expected}{ASSISTANT}"
    )


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_text_parts_of_three_apis_are_equivalent(kind):
    content = [{"type": kind, "text": "one"}, {"type": kind, "text": "two"}]
    texts = [encode([user(content), assistant(content)]) for content in (content, "one\n\ntwo")]
    assert texts[0] == texts[1]


def test_a_reminder_does_not_separate_the_user_from_the_answer():
    messages = [user("u"), {"role": "latest_reminder", "content": "now"}, assistant("a")]
    opened = f"{BOS}{USER}u{ASSISTANT}{THINK}{LATEST_REMINDER}now"
    assert encode(messages, "thinking") == f"{opened}{END_THINK}a{EOS}"


@pytest.mark.parametrize(
    ("message", "lead"),
    [
        ({"role": "system", "content": None}, ""),
        ({"role": "system"}, ""),
        ({"role": "developer", "content": "D"}, f"{USER}D"),
    ],
)
def test_tools_and_format_follow_the_content_of_system_and_developer(message, lead):
    sections = {"tools": [TOOL, TOOL], "response_format": {"type": "object"}}
    text = encode([{**message, **sections}, user("u")], "thinking")
    schema = json.dumps(TOOL["function"], ensure_ascii=False)
    assert text.startswith(f"{BOS}{lead}\n\n## Tools\n\n")
    assert f"\n\n{schema}\n{schema}\n\nYou MUST strictly follow" in text
    assert "tool calls.\n\n\n## Response Format:\n\nYou MUST strictly adhere" in text
    assert text.endswith(f'schema to reply:\n{{"type": "object"}}{USER}u{ASSISTANT}{THINK}')


def test_empty_tools_and_formats_write_nothing_and_thinking_is_still_dropped():
    system = {"role": "system", "content": "S", "tools": [], "response_format": {}}
    messages = [system, user("u"), assistant("a", reasoning_content="r"), user("v")]
    assert encode(messages, "thinking").startswith(f"{BOS}S{USER}u{ASSISTANT}{END_THINK}a{EOS}")


def test_tools_of_a_user_are_ignored_and_those_of_an_assistant_keep_the_thinking():
    messages = [user("u", tools=[TOOL]), assistant("a", reasoning_content="r"), user("v")]
    assert "r</think>" not in encode(messages, "thinking")
    messages[1]["tools"] = [TOOL]
    assert f"{THINK}r</think>a{EOS}" in encode(messages, "thinking")
    assert "## Tools" not in encode(messages, "thinking")


def test_developers_before_the_last_user_are_dropped_only_with_the_thinking():
    messages = [{"role": "developer", "content": "D"}, assistant("a", reasoning_content="r")]
    messages += [{"role": "developer", "content": "E"}, assistant("b", reasoning_content="s")]
    last = f"{USER}E{ASSISTANT}{THINK}s{END_THINK}b{EOS}"
    assert encode(messages, "thinking", "max").startswith(f"{BOS}Reasoning Effort: Absolute")
    assert encode(messages, "thinking") == f"{BOS}a{EOS}{last}"
    full = f"{BOS}{USER}D{ASSISTANT}{THINK}r{END_THINK}a{EOS}{last}"
    assert encode(messages, "thinking", drop_thinking=False) == full
    assert encode(messages).startswith(f"{BOS}{USER}D{ASSISTANT}{END_THINK}a{EOS}{USER}E")


def test_without_a_user_all_thinking_is_kept():
    text = encode([assistant("a", reasoning_content="r"), assistant("b")], "thinking")
    assert text == f"{BOS}r{END_THINK}a{EOS}{END_THINK}b{EOS}"


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ("{}", []),
        ("", [("arguments", "", "true")]),
        ('{"a": ', [("arguments", '{"a": ', "true")]),
        ('{"a": "1", "b": 1}', [("a", "1", "true"), ("b", "1", "false")]),
        ('{"a":{"b":[1,null,{"c":true}]}}', [("a", '{"b": [1, null, {"c": true}]}', "false")]),
        ('{"\\u00e9": ["\\u4f60"]}', [("\u00e9", '["\u4f60"]', "false")]),
        ('{"a": "<b>\\n\\"q\\""}', [("a", '<b>\n"q"', "true")]),
        ('{"a": 1.50, "a": 2.50}', [("a", "2.5", "false")]),
        ('{"arguments": "x"}', [("arguments", "x", "true")]),
        ('{"a": ' + "9" * 5000 + "}", [("arguments", '{"a": ' + "9" * 5000 + "}", "true")]),
        ("[" * 100_000, [("arguments", "[" * 100_000, "true")]),
        ("null", [("arguments", "null", "true")]),
        ("[1, 2]", [("arguments", "[1, 2]", "true")]),
        ("true", [("arguments", "true", "true")]),
        ('"a"', [("arguments", '"a"', "true")]),
        (None, [("arguments", "null", "true")]),
        ([1, "\u4f60"], [("arguments", '[1, "\u4f60"]', "true")]),
        (3.5, [("arguments", "3.5", "true")]),
        ({}, []),
        ({"a": "1", "b": {"c": None}}, [("a", "1", "true"), ("b", '{"c": null}', "false")]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_arguments_become_parameters(arguments, rows):
    text = encode([user("u"), assistant("x", tool_calls=[call(arguments), call()])])
    block = calls_block("\n".join(parameter(*row) for row in rows), "")
    assert text == f"{BOS}{USER}u{ASSISTANT}{END_THINK}x{block}{EOS}"


@pytest.mark.parametrize("revision", ["april", "0731"])
@pytest.mark.parametrize("effort", [None, "high", "max"])
def test_effort_writes_nothing_in_chat_mode(revision, effort):
    assert encode([user("u")], "chat", effort, revision=revision) == encode([user("u")])


def test_the_default_effort_of_0731_is_low():
    low = encode([user("u")], "thinking", "low", revision="0731")
    assert (
        encode([user("u")], "thinking", revision="0731") == low == encode([user("u")], "thinking")
    )


def test_encoding_no_messages_is_an_error_and_their_only_segment_is_bos():
    with pytest.raises(ValueError, match="it must be a list of one or more messages"):
        encode([], "thinking", "max")
    assert [part.text for part in chat.chat_segments([], "thinking", "max")] == [BOS]
    assert chat.chat_segments([], add_bos=False) == []


def test_add_bos_false_omits_bos():
    assert encode([user("u")], add_bos=False) == f"{USER}u{ASSISTANT}{END_THINK}"


def test_a_context_affects_the_text_but_is_not_part_of_it():
    context = [{"role": "system", "content": "S"}, user("u")]
    context += [assistant("", tool_calls=[call(call_id="a"), call(call_id="b")])]
    text = encode([tool("B", "b"), tool("A", "a")], "thinking", "max", context=context)
    assert text == f"{USER}{result('A')}\n\n{result('B')}{ASSISTANT}{THINK}"


def test_tools_in_the_context_keep_the_thinking():
    context = [{"role": "system", "content": "S", "tools": [TOOL]}]
    messages = [user("u"), assistant("a", reasoning_content="r"), user("v")]
    assert f"{THINK}r{END_THINK}a" in encode(messages, "thinking", context=context)
    assert f"{THINK}r{END_THINK}a" not in encode(messages, "thinking", context=[user("s")])


BAD = [
    ({}, "messages[1].role is None; use one of system, developer, user"),
    ({"role": "function", "content": "x"}, "messages[1].role is 'function'; use one of"),
    ({"role": "direct_search_results", "content": "x"}, "messages[1].role is 'direct_search"),
    ({"role": ["user"], "content": "x"}, "messages[1].role is ['user']"),
    ("hello", "messages[1] is str; a message is an object"),
    (None, "messages[1] is missing or null; a message is an object"),
    ({"role": "developer"}, "messages[1].content is missing or null; give a string"),
    ({"role": "developer", "content": ""}, "messages[1].content is empty"),
    ({"role": "latest_reminder"}, "messages[1].content is missing or null"),
    (user(None), "messages[1].content is missing or null"),
    (user(3), "messages[1].content is int; give a string"),
    (user({"type": "text"}), "messages[1].content is dict"),
    (user(["x"]), "messages[1].content[0] is str; a part is an object"),
    (user([{"type": "text", "text": 1}]), "messages[1].content[0].text is int"),
    ({"role": "user", "content_blocks": []}, "give the parts of content_blocks as a list"),
    (tool(None), "messages[1].content is missing or null"),
    (tool("x", 7), "messages[1].tool_call_id is int"),
    (user("u", task="poem"), "messages[1].task is 'poem'; leave it out or use one of action"),
    (user("u", task={}), "messages[1].task is {}"),
    (assistant("a", reasoning_content=["r"]), "messages[1].reasoning_content is list"),
    (assistant("a", tool_calls={"id": "x"}), "messages[1].tool_calls is dict; give a list"),
    (assistant("a", tool_calls=["f"]), "messages[1].tool_calls[0] has no function object"),
    (assistant("a", tool_calls=[{"id": "x"}]), "messages[1].tool_calls[0] has no function"),
    (assistant("a", tool_calls=[call(call_id=1)]), "messages[1].tool_calls[0].id is int"),
    (
        assistant("a", tool_calls=[call(), call(name=None)]),
        "tool_calls[1].function.name is missing",
    ),
    (
        assistant("a", tool_calls=[{"function": {"name": "f"}}]),
        "tool_calls[0].function.arguments is missing; give an object, or its JSON text.",
    ),
    (assistant("a", tool_calls=[call({1, 2})]), "function.arguments is not a JSON value"),
    (assistant("a", tool_calls=[call(b"{}")]), "function.arguments is not a JSON value"),
    ({"role": "system", "tools": "f"}, "messages[1].tools is str; give a list"),
    ({"role": "system", "tools": [{"name": "f"}]}, "messages[1].tools[0] has no function object"),
    (
        {"role": "system", "response_format": {1, 2}},
        "messages[1].response_format is not a JSON value",
    ),
]


@pytest.mark.parametrize("where", ["messages", "context"])
@pytest.mark.parametrize(("message", "problem"), BAD, ids=[problem[:60] for _, problem in BAD])
def test_bad_messages_are_rejected_by_index_and_field(message, problem, where):
    conversation = [user("u"), message, user("v")]
    arguments = {"messages": [user("w")], where: conversation}
    with pytest.raises(ValueError, match=re.escape(problem.replace("messages[", f"{where}["))):
        encode(**arguments, thinking_mode="thinking")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"thinking_mode": "think"}, "thinking_mode is 'think'; use one of chat, thinking"),
        ({"revision": "may"}, "revision is 'may'; use one of april, 0731"),
        ({"reasoning_effort": "low"}, "reasoning_effort is 'low'; revision april has None, high"),
        (
            {"reasoning_effort": "medium", "revision": "0731"},
            "'medium'; revision 0731 has None, low",
        ),
    ],
)
def test_unknown_settings_are_rejected_in_any_mode(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        encode([user("u")], **arguments)


def test_every_special_token_is_listed_once():
    assert len(chat.SPECIAL_TOKENS) == 14 == len(set(chat.SPECIAL_TOKENS))
    assert BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert chat.TASKS["read_url"] == "<\uff5cread_url\uff5c>"


def test_importing_the_encoding_loads_neither_jax_nor_tokenizers():
    heavy = "{'jax', 'flax', 'numpy', 'tokenizers'}"
    modules = "v4jax.text.chat, v4jax.text.chat_parser"
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
