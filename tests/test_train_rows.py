"""Rows of training data and files of them: what is read, and errors that name line and field."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer
from v4jax_train.data import documents, rows
from v4jax_train.data.rendering import Renderer, RenderSettings

TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(Tokenizer(build_demo_tokenizer(300)), RenderSettings(thinking_mode="chat"))


def line(**row: Any) -> bytes:
    return json.dumps(row).encode()


def test_each_kind_of_row_is_read() -> None:
    assert rows.parse(line(text="t")) == rows.TextRow(text="t")
    completion = rows.CompletionRow(prompt="", completion="c")
    assert rows.parse(line(prompt="", completion="c")) == completion
    row = rows.parse(line(messages=TALK, tools=None, reasoning_effort="max", drop_thinking=False))
    assert row == rows.ChatRow(messages=TALK, reasoning_effort="max", drop_thinking=False)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, None),
        ({"thinking_mode": None}, None),
        ({"thinking_mode": "thinking"}, "thinking"),
        ({"enable_thinking": False}, "chat"),
        ({"enable_thinking": True, "thinking_mode": "thinking"}, "thinking"),
    ],
)
def test_the_thinking_mode_has_two_spellings(fields: dict[str, Any], mode: str | None) -> None:
    row = rows.parse(line(messages=TALK, **fields))
    assert isinstance(row, rows.ChatRow)
    assert row.thinking_mode == mode


def test_fields_that_no_kind_defines_are_ignored() -> None:
    assert rows.parse(line(text="t", id=3, source="s")) == rows.TextRow(text="t")
    row = rows.parse(line(messages=TALK, prompt="p", prompt_id="x"))
    assert row == rows.ChatRow(messages=TALK)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "The line is not JSON in UTF-8 (Expecting property name"),
        (b'{"text": "\xff"}', "The line is not JSON in UTF-8 ('utf-8' codec"),
        (b"[" * 100_000, "The line is not JSON in UTF-8 (maximum recursion"),
        (b"[1]", "The line is list; a row must be an object."),
        (line(id=1), "The row has none of messages, prompt and completion, text, only ['id']."),
        (line(prompt="p"), "The row has none of messages, prompt and completion, text, only"),
        (line(text="t", messages=TALK), "The row has messages, text; a row must be of one kind."),
        (line(text=1), "text is int; give a string."),
        (line(text=""), "text is empty; there is nothing to train."),
        (line(prompt=["p"], completion="c"), "prompt is list; give a string."),
        (line(prompt="p", completion=""), "completion is empty"),
        (line(messages={}), "messages is dict; give a list"),
        (line(messages=[]), "messages is empty or null"),
        (line(messages=TALK, tools="f"), "tools is str; give a list, or leave it out."),
        (line(messages=TALK, tool=[]), "tool is not a field of rows; did you mean 'tools'?"),
        (line(messages=TALK, thinking_mode="on"), "thinking_mode is 'on'; use one of chat, think"),
        (line(messages=TALK, enable_thinking="yes"), "enable_thinking is str; give a bool"),
        (
            line(messages=TALK, enable_thinking=True, thinking_mode="chat"),
            "enable_thinking contradicts thinking_mode 'chat'",
        ),
        (line(messages=TALK, drop_thinking=1), "drop_thinking is int; give a bool"),
        (line(messages=[{**TALK[1], "train": 1}]), "messages[0].train is int; give true or"),
        (line(messages=[{**TALK[0], "train": True}]), "messages[0].train is true in a message"),
    ],
)
def test_invalid_rows_are_rejected_by_field(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        rows.parse(content)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three valid and seven invalid rows, with blank lines between them."""
    file = tmp_path / "rows.jsonl"
    invalid = line(messages=[TALK[0], {"role": "assistant", "content": 3}])
    valid = [line(text="t"), line(messages=TALK), line(prompt="p", completion="c")]
    file.write_bytes(
        b"\n".join([valid[0], b"", invalid, valid[1], b"  ", valid[2], *[invalid] * 6])
    )
    return file


def test_an_invalid_row_is_named_by_file_line_and_field_and_the_others_counted(
    mixed: Path, renderer: Renderer
) -> None:
    message = f"{mixed}:3: messages[1].content is int; give a string or a list of text parts."
    with pytest.raises(ValueError, match=re.escape(f"{message} (Invalid: 7 of 10 rows.)")):
        documents.load(mixed, renderer)


def test_invalid_rows_are_skipped_on_request_and_reported(mixed: Path, renderer: Renderer) -> None:
    loaded = documents.load(mixed, renderer, skip_wrong=True)
    assert len(loaded) == 3
    assert [loaded.where(i) for i in range(3)] == [f"{mixed}:{i}" for i in (1, 4, 6)]
    report = loaded.report
    assert (report.rows, report.wrong, len(report.first_wrong)) == (10, 7, 5)
    assert [text.split(": ")[0] for text in report.first_wrong] == [
        f"{mixed}:{i}" for i in (3, 7, 8, 9, 10)
    ]
    assert report.tokens == loaded.lengths_D.sum() == len(loaded.ids_S)
    assert report.trained == loaded.trained_S.sum()


def test_documents_are_stored_as_rendered(mixed: Path, renderer: Renderer) -> None:
    loaded = documents.load(mixed, renderer, skip_wrong=True)
    parsed = [rows.TextRow(text="t"), rows.ChatRow(messages=TALK)]
    parsed.append(rows.CompletionRow(prompt="p", completion="c"))
    for i, row in enumerate(parsed):
        expected = renderer.render(row)
        assert loaded[i].ids_N.tolist() == expected.ids_N.tolist()
        assert loaded[i].trained_N.tolist() == expected.trained_N.tolist()


def test_a_file_without_a_valid_row_is_rejected(tmp_path: Path, renderer: Renderer) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"rows\.jsonl: there is no such file"):
        documents.load(file, renderer)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: the file has no rows"):
        documents.load(file, renderer)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*Invalid: 1 of 1 rows"):
        documents.load(file, renderer, skip_wrong=True)
