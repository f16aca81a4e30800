"""Users' rows are read in many spellings; what is not understood is rejected by name."""

import json
import re
from typing import Any

import pytest

from v4jax_train.data import rows
from v4jax_train.data.rows import ChatRow, RowSettings

USER = {"role": "user", "content": "u"}


def parse(row: dict[str, Any], **fields: Any) -> Any:
    return rows.parse(json.dumps(row).encode(), RowSettings(**fields))


def answered(**fields: Any) -> dict[str, Any]:
    """A row whose answer has these additional fields."""
    return {"messages": [USER, {"role": "assistant", "content": "a", **fields}]}


def answer(**fields: Any) -> dict[str, Any]:
    return parse(answered(**fields)).messages[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "r"},
        {"thinking": "r"},
        {"reasoning": "r", "reasoning_content": "r"},
        {"reasoning": None, "thinking": "", "reasoning_content": "r"},
        {"content": "<think>r</think>a"},
        {"content": "<think>\nr\n</think>\n\na"},
        {"content": "\n<think>r</think>a", "reasoning": "r"},
    ],
)
def test_reasoning_has_many_spellings(fields: dict[str, Any]) -> None:
    assert answer(**fields) == {"role": "assistant", "content": "a", "reasoning_content": "r"}


@pytest.mark.parametrize("kind", ["thinking", "reasoning", "reasoning_text"])
def test_reasoning_may_be_a_part_before_the_text(kind: str) -> None:
    key = "thinking" if kind == "thinking" else "text"
    parts = [{"type": kind, key: "r", "signature": "s"}, {"type": "text", "text": "a"}]
    message = answer(content=parts)
    assert message["reasoning_content"] == "r"
    assert message["content"] == parts[1:]


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_text_parts_of_three_apis_are_read(kind: str) -> None:
    part = {"type": kind, "text": "a", "annotations": [], "cache_control": {"type": "ephemeral"}}
    assert answer(content=[part])["content"] == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_mask", "trainable", "loss"])
@pytest.mark.parametrize("value", [0, 1, 0.0, False, True])
def test_training_flags_have_many_spellings(key: str, value: Any) -> None:
    assert answer(**{key: value})["train"] is bool(value)
    assert "train" not in answer(**{key: None})


def test_a_user_message_may_say_that_it_is_not_trained() -> None:
    assert parse({"messages": [{**USER, "loss_mask": 0}]}).messages[0]["train"] is False


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rationale": "r"}, "messages[1].rationale is not a field of assistant messages"),
        (
            {"reasoning_contents": "r"},
            "messages[1].reasoning_contents is not a field of assistant messages",
        ),
        ({"reasoning": ["r"]}, "messages[1].reasoning is list; give a string."),
        ({"reasoning": "r", "thinking": "s"}, "messages[1] has reasoning in two places"),
        ({"content": "r</think>a"}, "messages[1].content has </think>"),
        ({"content": "a<think>r</think>"}, "messages[1].content has <think>"),
        ({"reasoning": "<think>r"}, "messages[1].reasoning_content has <think>"),
        ({"weight": 0.5}, "messages[1].weight is 0.5; give 0 or 1"),
        ({"loss_mask": "0"}, "messages[1].loss_mask is '0'; give 0 or 1"),
        ({"weight": 0, "train": True}, "messages[1] has train True and weight 0"),
        ({"mask": 1}, "messages[1].mask is not a field of assistant messages; use 'train'"),
        ({"no_loss": True}, "messages[1].no_loss is not a field"),
        ({"function_call": {"name": "f"}}, "messages[1].function_call is not a field"),
        ({"name": "Bob"}, "messages[1].name is not a field"),
        ({"prefix": True}, "messages[1].prefix is not a field"),
        ({"tools": [{"function": {}}]}, "messages[1].tools is not a field"),
        ({"wo_eos": "false"}, "messages[1].wo_eos is 'false'; give true or false."),
        ({"content": None}, "messages[1] has neither content nor tool_calls"),
        (
            {"content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0].type is 'im",
        ),
        (
            {"content": [{"type": "refusal", "refusal": "no"}]},
            "messages[1].content[0].type is 'ref",
        ),
        ({"content": [{"text": "a"}]}, "messages[1].content[0].type is None"),
        ({"content": [{"type": "text", "text": None}]}, "messages[1].content[0].text is missing"),
        (
            {"content": [{"type": "text", "text": "a", "lang": "de", "bold": True}]},
            "messages[1].content[0].bold is not a field of content parts",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "r"}]},
            "messages[1].content[1] is reasoning after text",
        ),
    ],
)
def test_what_is_not_understood_is_rejected_by_name(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        answer(**fields)


@pytest.mark.parametrize(
    "message",
    [
        {**USER, "reasoning": "r"},
        {**USER, "tool_calls": [{}]},
        {**USER, "weight": 1},
        {"role": "system", "content": "s", "tool_call_id": "x"},
        {"role": "tool", "content": "t", "task": "title"},
    ],
)
def test_fields_that_a_role_does_not_have_are_rejected(message: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^messages\[0\]\.\w+ is (not a field of \w+ messages|1 in)"
    ):
        parse({"messages": [message, *answered()["messages"]]})


def test_null_and_provenance_are_ignored() -> None:
    fields = {"tool_calls": None, "refusal": None, "annotations": [], "id": "x", "model": "m"}
    assert answer(**fields, weight=None, audio=None) == {"role": "assistant", "content": "a"}
    row = answered() | {"text": None, "conversations": None, "url": "x", "images": [], "row_id": 3}
    assert parse(row) == ChatRow(messages=answered()["messages"])
    tool = {"role": "tool", "name": "f", "content": "t", "tool_call_id": "c"}
    assert "name" not in parse({"messages": [USER, tool]}).messages[1]


def test_ignored_fields_are_removed_first() -> None:
    row = answered(score=3, reasoning="r") | {"quality": 0.5}
    with pytest.raises(ValueError, match=r"^quality is not a field of messages rows; remove it"):
        parse(row)
    parsed = parse(row, ignore=("quality", "score", "reasoning"))
    assert parsed == ChatRow(messages=answered()["messages"])


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "disabled"}}, "chat"),
        ({"thinking": True}, "thinking"),
        ({"chat_template_kwargs": {"thinking": True}}, "thinking"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "thinking_mode": "chat"}, "chat"),
        ({"chat_template_kwargs": None}, None),
    ],
)
def test_the_thinking_mode_is_read_where_apis_and_servers_put_it(fields, mode) -> None:
    assert parse(answered() | fields).thinking_mode == mode


def test_other_template_settings_are_read() -> None:
    options = {"reasoning_effort": "max", "truncate_history_thinking": False}
    row = parse(answered() | {"chat_template_kwargs": options})
    assert (row.reasoning_effort, row.drop_thinking) == ("max", False)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"thinking": {"type": "adaptive"}}, "thinking.type is 'adaptive'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens has no"),
        ({"thinking": "on"}, "thinking is str; give a bool"),
        ({"chat_template_kwargs": {"think": True}}, "chat_template_kwargs.think is not a setting"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is list; give a dict"),
        (
            {"chat_template_kwargs": {"thinking": True}, "thinking": {"type": "disabled"}},
            "chat_template_kwargs.thinking contradicts thinking 'chat'",
        ),
        ({"reasoning": {"effort": "low"}}, "reasoning is not a field of messages rows"),
        ({"weight": 0.5}, "weight is not a field of messages rows"),
        ({"train_on_inputs": True}, "train_on_inputs is not a field of messages rows"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls is not a field"),
    ],
)
def test_row_settings_that_are_not_understood_are_rejected(fields, problem) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        parse(answered() | fields)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "t", "thinking_mode": "chat"}, "thinking_mode is not a field of text rows"),
        (
            {"prompt": "p", "completion": "c", "reasoning": "r"},
            "reasoning is not a field of completion rows",
        ),
        (
            {"prompt": [USER], "completion": [USER]},
            "prompt is list; give a string. Messages belong",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "The row has none of messages"),
        ({"text": None, "messages": None}, "The row has none of messages, prompt and completion"),
    ],
)
def test_other_rows_are_rejected(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        parse(row)


def test_a_duplicate_key_is_rejected() -> None:
    with pytest.raises(ValueError, match="the key 'text' occurs twice"):
        rows.parse(b'{"text": "a", "text": "b"}')
