"""Rows of training data: one JSON object a line, of one of three kinds.

{"messages": [...]} is a conversation in the form of `v4jax.chat.encode_chat`, where an assistant
message may have `train`. Beside it may stand `tools`, `thinking_mode` ("chat" or "thinking") or
`enable_thinking` (a boolean), `reasoning_effort` and `drop_thinking`.
{"prompt": "...", "completion": "..."} is a text to continue and what follows it.
{"text": "..."} is a document.
Fields that no kind defines are ignored, unless they look like a misspelt one.
"""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from v4jax import chat

_CHAT = ("messages", "tools", "thinking_mode", "enable_thinking")
_CHAT += ("reasoning_effort", "drop_thinking")
_FIELDS = (*_CHAT, "prompt", "completion", "text")
_ALIKE = 0.85  # "tool" and "tools" are alike, "prompt_id" and "prompt" are not


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A conversation; what is None is left to the settings.

    Attributes:
      messages: as in the file; the encoder checks all of them but `train`.
      tools: of the whole conversation.
      thinking_mode: "chat" or "thinking".
      reasoning_effort: of the encoder's revision.
      drop_thinking: whether earlier turns lose their reasoning.
    """

    messages: list[Any]
    tools: list[Any] = dataclasses.field(default_factory=list)
    thinking_mode: str | None = None
    reasoning_effort: str | None = None
    drop_thinking: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRow:
    """A text and what follows it; only the second is trained."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRow:
    """A document, trained from beginning to end."""

    text: str


Row = ChatRow | CompletionRow | TextRow


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1.

    Raises:
      ValueError: there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; give a file of one JSON object a line.")
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def parse(line: bytes) -> Row:
    """The row on a line.

    Raises:
      ValueError: the line is no row; one sentence that begins with the field.
    """
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The line is not JSON in UTF-8 ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"The line is {_kind(row)}; a row is an object.")
    _refuse_misspelt(row)
    kinds = {
        "messages": "messages" in row,
        "prompt and completion": "prompt" in row and "completion" in row,
        "text": "text" in row,
    }
    match [name for name, there in kinds.items() if there]:
        case ["messages"]:
            return _chat(row)
        case ["text"]:
            return TextRow(text=_string(row, "text"))
        case ["prompt and completion"]:
            prompt, completion = _string(row, "prompt", empty=True), _string(row, "completion")
            return CompletionRow(prompt=prompt, completion=completion)
        case []:
            raise ValueError(f"The row has none of {', '.join(kinds)} but {sorted(row)}.")
        case several:
            raise ValueError(f"The row has {', '.join(several)}; a row is of one kind.")


def _chat(row: Mapping[str, Any]) -> ChatRow:
    messages = _typed(row, "messages", list)
    if not messages:
        raise ValueError("messages is empty or null; give at least one message.")
    for i, message in enumerate(messages):
        if isinstance(message, Mapping):
            _check_train(message, f"messages[{i}].train")
    return ChatRow(
        messages=messages,
        tools=_typed(row, "tools", list) or [],
        thinking_mode=_thinking_mode(row),
        reasoning_effort=_typed(row, "reasoning_effort", str),
        drop_thinking=_typed(row, "drop_thinking", bool),
    )


def _check_train(message: Mapping[str, Any], where: str) -> None:
    flag = message.get("train")
    if not isinstance(flag, bool | None):
        raise ValueError(f"{where} is {_kind(flag)}; give true or false, or leave it out.")
    if flag and message.get("role") != "assistant":
        raise ValueError(f"{where} is true in a message that no assistant writes; leave it out.")


def _thinking_mode(row: Mapping[str, Any]) -> str | None:
    """The mode, from either of its two spellings."""
    mode, enable = _typed(row, "thinking_mode", str), _typed(row, "enable_thinking", bool)
    if mode not in (None, *chat.THINKING_MODES):
        raise ValueError(f"thinking_mode is '{mode}'; use one of {', '.join(chat.THINKING_MODES)}.")
    if enable is None:
        return mode
    enabled = "thinking" if enable else "chat"
    if mode not in (None, enabled):
        raise ValueError(f"enable_thinking contradicts thinking_mode '{mode}'; leave one out.")
    return enabled


def _refuse_misspelt(row: Mapping[str, Any]) -> None:
    for field in row:
        if meant := _meant(field):
            raise ValueError(f"{field} is no field of a row; did you mean '{meant}'?")


@functools.cache
def _meant(field: str) -> str | None:
    """The field that this looks like, unless it is one."""
    near = difflib.get_close_matches(field, _FIELDS, n=1, cutoff=_ALIKE)
    return near[0] if near and field not in _FIELDS else None


def _string(row: Mapping[str, Any], field: str, *, empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is {_kind(value)}; give a string.")
    if not value and not empty:
        raise ValueError(f"{field} is empty; there is nothing to train.")
    return value


def _typed(row: Mapping[str, Any], field: str, kind: type) -> Any:
    value = row.get(field)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{field} is {_kind(value)}; give a {kind.__name__}, or leave it out.")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
