"""Users' files: ShareGPT, Alpaca, JSON lists, gzip; errors say how to convert others."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer
from v4jax_train.data import documents, rows
from v4jax_train.data.documents import Documents
from v4jax_train.data.rendering import Renderer, RenderSettings
from v4jax_train.data.rows import ChatRow, RowSettings

TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
RENDERER = Renderer(Tokenizer(build_demo_tokenizer(300)), RenderSettings(thinking_mode="chat"))


def parse(row: dict[str, Any], **fields: Any) -> Any:
    return rows.parse(json.dumps(row).encode(), RowSettings(**fields))


def load(file: Path, content: bytes, **fields: Any) -> Documents:
    file.write_bytes(content)
    return documents.load(file, RENDERER, **fields)


def test_sharegpt_conversations_are_read() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "o"},
        {"from": "gpt", "value": "a", "weight": 0},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f"}}
    assert parse({"id": 1, "conversations": turns, "tools": json.dumps([tool])}) == ChatRow(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "o"},
            {"role": "assistant", "content": "a", "train": False},
        ],
        tools=[tool],
    )
    assert parse({"conversations": TALK, "system": "s"}) == ChatRow(messages=TALK, system="s")


def test_alpaca_instructions_are_read() -> None:
    row = {"instruction": "do", "input": "this", "output": "a"}
    question = {"role": "user", "content": "do\n\nthis"}
    assert parse(row) == ChatRow(messages=[question, TALK[1]])
    for empty in ("", None):
        assert parse(row | {"input": empty}).messages[0]["content"] == "do"
    # Alpaca's own file repeats the row as a text.
    with pytest.raises(ValueError, match=r"The row has text, instruction and output.*'alpaca'"):
        parse(row | {"text": "t"})
    assert parse(row | {"text": "t"}, format="alpaca") == ChatRow(messages=[question, TALK[1]])
    assert parse(row | {"text": "t"}, format="text") == rows.TextRow(text="t")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            "conversations[0].from is 'bing'; it",
        ),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "conversations[0].from is ['x']"),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "conversations[0].value is not a call",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "x", "content": "y"}]},
            "conversations[0].content duplicates from and value",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "x", "mood": 1}]},
            "conversations[0].mood is no",
        ),
        ({"conversations": []}, "conversations is empty or null"),
        (
            {"conversation": TALK},
            "conversation is not a field of rows; did you mean 'conversations'?",
        ),
        ({"instruction": "i", "output": ["o"]}, "output is list; give a string."),
        ({"instruction": "i", "output": ""}, "output is empty; there is nothing to train."),
        (
            {"instruction": "i", "output": "o", "history": [["a", "b"]]},
            "history is not a field of alpaca rows",
        ),
        ({"question": "q", "answer": "a"}, "The row has none of messages, prompt and completion"),
        (
            {"messages": TALK, "conversations": TALK},
            "The row has messages, conversations; a row must be of one kind",
        ),
        ({"messages": TALK, "system": "s", "tools": "[1"}, "tools is str; give a list"),
    ],
)
def test_ambiguous_and_unknown_fields_are_rejected(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        parse(row)


def test_a_row_has_one_system_text() -> None:
    row = parse({"messages": [{"role": "system", "content": "s"}, *TALK], "system": "t"})
    with pytest.raises(ValueError, match=r"system is given by the row and by messages\[0\]"):
        RENDERER.render(row)
    ids = RENDERER.render(parse({"messages": TALK, "system": "t"})).ids_N.tolist()
    system = {"role": "system", "content": "t"}
    assert ids == RENDERER.render(ChatRow(messages=[system, *TALK])).ids_N.tolist()


def test_every_row_must_have_the_format() -> None:
    with pytest.raises(ValueError, match="The row has no conversations, which format 'sharegpt'"):
        parse({"messages": TALK}, format="sharegpt")
    with pytest.raises(ValueError, match="format is 'csv'; it must be one of auto, messages, comp"):
        RowSettings(format="csv")


ROWS: list[dict[str, Any]] = [{"text": "one"}, {"conversations": TALK}, {"text": "two"}]
LINES = b"\n".join(json.dumps(row).encode() for row in ROWS)
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (LINES, "JSON lines"),
        (MARK + LINES, "JSON lines"),
        (MARK + LINES.replace(b"\n", b"\r\n" + MARK), "JSON lines"),
        (gzip.compress(LINES), "JSON lines, gzip"),
        (gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]), "JSON lines, gzip"),
        (json.dumps(ROWS).encode(), "a JSON list"),
        (MARK + b"\n " + json.dumps(ROWS, indent=2).encode(), "a JSON list"),
        (gzip.compress(json.dumps(ROWS).encode()), "a JSON list, gzip"),
    ],
)
def test_every_container_yields_the_same_documents(
    content: bytes, container: str, tmp_path: Path
) -> None:
    loaded = load(tmp_path / "rows", content)
    plain = load(tmp_path / "rows.jsonl", LINES)
    assert loaded.ids_S.tolist() == plain.ids_S.tolist()
    assert loaded.report.form == f"{container}, 2 of text, 1 of sharegpt"


def test_an_invalid_list_entry_is_named_by_its_index(tmp_path: Path) -> None:
    content = json.dumps([*ROWS, {"text": 3}]).encode()
    message = r"rows\.json\[3\]: text is int; give a string\. \(Invalid: 1 of 4 rows\.\)"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "rows.json", content)
    loaded = load(tmp_path / "rows.json", content, skip_wrong=True)
    assert loaded.where(1) == f"{tmp_path / 'rows.json'}[1]"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "a.parquet",
            b"PAR1rest",
            "is a Parquet file; convert it to JSON lines: pandas.read_parquet",
        ),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "is compressed with zstd; decompress it"),
        ("a.jsonl.bz2", b"BZh91", "is compressed with bzip2"),
        ("a.zip", b"PK\x03\x04", "is a zip archive"),
        ("a.csv", b"text\nhello\n", "is a table; convert it to JSON lines: pandas.read_csv"),
        ("a.json", b'{\n "text": "a"\n}', "its first row spans several lines"),
        ("a.json", b'[{"text": "a"}', "is not a JSON list of rows (Expecting"),
        ("a.json", b"[]", "the file has no rows"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "is not a JSON list of rows (Extra data"),
        ("a.json", b"[" * 10_000, "is not a JSON list of rows"),
        ("a.gz", gzip.compress(LINES, mtime=0)[:-12], "is damaged"),
        ("a.gz", b"\x1f\x8bnothing", "is damaged"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "it is in UTF-16; save it in UTF-8"),
    ],
)
def test_errors_for_other_files_say_how_to_convert_them(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        load(tmp_path / name, content)
    assert str(error.value).startswith(str(tmp_path / name))


def test_terminal_control_characters_are_escaped_in_errors(tmp_path: Path) -> None:
    for row in ({"text": "t", "\x1b[31mred": 1}, {"messages": [{"role": "\x9b2J\x07\x7f"}]}):
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as error:
            load(tmp_path / "rows.jsonl", json.dumps(row).encode())
        assert str(error.value).isprintable()
