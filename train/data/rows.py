"""Rows of training data: one JSON object each, of one of five kinds.

{"messages": [...]} is a conversation in the form of `v4jax.encode_chat`; see `messages.read` for
other keys its messages may have. Next to it there may be `system`, `tools`, `thinking_mode` ("chat"
or "thinking"), `enable_thinking` or `thinking`, `reasoning_effort` and `drop_thinking`, also in
`chat_template_kwargs`.
{"conversations": [...]} is a conversation in ShareGPT's form, with `from` and `value`.
{"instruction": "...", "input": "...", "output": "..."} is a question and its answer, as in Alpaca.
{"prompt": "...", "completion": "..."} is a text to continue and its continuation.
{"text": "..."} is a document.
Null counts as missing. Fields that no kind defines are rejected, unless they only describe where a
row is from.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from v4jax.text.files import decode, unique_keys

from . import conversations, messages, thinking

# Required fields of each kind of row; `_OPTIONAL` has the others.
_NEEDED = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
FORMATS = ("auto", *_NEEDED)
_CHAT = ("system", "tools", *thinking.FIELDS)
_OPTIONAL = {
    # Datasets of conversations repeat the first question here.
    "messages": (*_CHAT, "prompt"),
    "completion": (),
    "text": (),
    "sharegpt": _CHAT,
    "alpaca": (*_CHAT, "input"),
}
_FIELDS = tuple(dict.fromkeys((*sum(_NEEDED.values(), ()), *sum(_OPTIONAL.values(), ()))))
_ALIKE = 0.85  # "tool" and "tools" are similar enough, "prompt_id" and "prompt" are not


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How rows are read.

    Attributes:
      format: kind of every row: 'messages', 'completion', 'text', 'sharegpt' or 'alpaca'; fields of
        the other kinds are then ignored. 'auto': inferred from each row's fields.
      ignore: fields of rows and messages to drop before reading.
    """

    format: str = "auto"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject an unknown format."""
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; it must be one of {', '.join(FORMATS)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A conversation; for fields that are None the settings apply.

    Attributes:
      messages: messages from `messages.read`; the encoder validates all keys but `train`.
      system: system text of the conversation.
      tools: tools of the conversation.
      thinking_mode: 'chat' or 'thinking'.
      reasoning_effort: an effort of the encoder's revision.
      drop_thinking: whether to leave out the reasoning of earlier turns.
    """

    messages: list[Any]
    system: str | None = None
    tools: list[Any] = dataclasses.field(default_factory=list)
    thinking_mode: str | None = None
    reasoning_effort: str | None = None
    drop_thinking: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRow:
    """A text and its continuation; only the continuation is trained."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRow:
    """A document, trained entirely."""

    text: str


Row = ChatRow | CompletionRow | TextRow


def parse(line: bytes, settings: RowSettings | None = None) -> Row:
    """The row in a JSON text; see `read`."""
    return read(line, settings or RowSettings())[1]


def read(line: bytes, settings: RowSettings) -> tuple[str, Row]:
    """The kind of a row in a JSON text, and the row.

    Raises:
      ValueError: the row is invalid; one sentence that begins with the field.
    """
    try:
        row = json.loads(decode(line), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The line is not JSON in UTF-8 ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"The line is {_name(row)}; a row must be an object.")
    row = {k: v for k, v in row.items() if v is not None and k not in settings.ignore}
    kind = _kind(row, settings.format)
    known = (*_NEEDED[kind], *_OPTIONAL[kind])
    for field, value in row.items():
        is_other_kind = settings.format != "auto" and field in _FIELDS
        is_ignored = is_other_kind or messages.is_note(field) or messages.is_empty(value)
        if not (field in known or is_ignored):
            raise ValueError(f"{field} is not a field of {kind} rows; {messages.IGNORE}")
    return kind, _READ[kind](row, settings)


def _kind(row: Mapping[str, Any], format: str) -> str:
    """The kind of a row: the required format, or with 'auto' the kind whose fields it has."""
    for field in row:
        if (meant := _meant(field)) and not messages.is_note(field):
            raise ValueError(f"{field} is not a field of rows; did you mean '{meant}'?")
    title = lambda kind: " and ".join(_NEEDED[kind])
    present = [kind for kind, fields in _NEEDED.items() if all(field in row for field in fields)]
    if format != "auto":
        if format in present:
            return format
        raise ValueError(f"The row has no {title(format)}, which format '{format}' requires.")
    match present:
        case [kind]:
            return kind
        case []:
            own = ", ".join(map(title, ("messages", "completion", "text")))
            foreign = " and ".join(map(title, ("sharegpt", "alpaca")))
            raise ValueError(
                f"The row has none of {own}, only {sorted(row)}. Rename its fields to those of one"
                f" kind; {foreign} are supported too."
            )
        case several:
            fields, kinds = ", ".join(map(title, several)), " or ".join(map(repr, several))
            raise ValueError(
                f"The row has {fields}; a row must be of one kind. Set data.format to {kinds}."
            )


@functools.cache
def _meant(field: str) -> str | None:
    """The field that a similar name probably means; None if it is a field itself."""
    near = difflib.get_close_matches(field, _FIELDS, n=1, cutoff=_ALIKE)
    return near[0] if near and field not in _FIELDS else None


def _chat(row: Mapping[str, Any], turns: list[Any], where: str, settings: RowSettings) -> ChatRow:
    if not turns:
        raise ValueError(f"{where} is empty or null; give at least one message.")
    read_one = functools.partial(messages.read, ignored=settings.ignore)
    return ChatRow(
        messages=[read_one(message, f"{where}[{i}]") for i, message in enumerate(turns)],
        system=_typed(row, "system", str) or None,
        tools=_tools(row),
        **thinking.read(row),
    )


def _messages(row: Mapping[str, Any], settings: RowSettings) -> ChatRow:
    return _chat(row, _typed(row, "messages", list), "messages", settings)


def _sharegpt(row: Mapping[str, Any], settings: RowSettings) -> ChatRow:
    turns = conversations.from_sharegpt(_typed(row, "conversations", list))
    return _chat(row, turns, "conversations", settings)


def _alpaca(row: Mapping[str, Any], settings: RowSettings) -> ChatRow:
    paragraphs = [_string(row, "instruction"), _typed(row, "input", str) or ""]
    question = {"role": "user", "content": "\n\n".join(filter(None, paragraphs))}
    answer = {"role": "assistant", "content": _string(row, "output")}
    return _chat(row, [question, answer], "messages", settings)


def _completion(row: Mapping[str, Any], _: RowSettings) -> CompletionRow:
    if isinstance(row["prompt"], list):
        raise ValueError("prompt is list; give a string. Messages belong in 'messages'.")
    prompt, completion = _string(row, "prompt", empty=True), _string(row, "completion")
    return CompletionRow(prompt=prompt, completion=completion)


def _text(row: Mapping[str, Any], _: RowSettings) -> TextRow:
    return TextRow(text=_string(row, "text"))


_READ: dict[str, Callable[[Mapping[str, Any], RowSettings], Row]] = {
    "messages": _messages,
    "completion": _completion,
    "text": _text,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _tools(row: Mapping[str, Any]) -> list[Any]:
    """The tools, as a list or as JSON text, which some libraries store for lists of objects."""
    try:
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else None
    except (ValueError, RecursionError):
        tools = None
    return (tools if isinstance(tools, list) else _typed(row, "tools", list)) or []


def _string(row: Mapping[str, Any], field: str, *, empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is {_name(value)}; give a string.")
    if not value and not empty:
        raise ValueError(f"{field} is empty; there is nothing to train.")
    return value


def _typed(row: Mapping[str, Any], field: str, kind: type) -> Any:
    value = row.get(field)
    return None if value is None else thinking.typed(kind, value, field)


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
