"""Messages of training data, in the spellings that are in use, as `v4jax.text.chat` has them.

What V4 does not write is refused by name: a key that is ignored would be trained as if the message
did not have it.
"""

import difflib
from collections.abc import Container, Mapping
from typing import Any

from v4jax.text.chat import END_THINK, TEXT_PARTS, THINK

REASONING = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("train", "training", "trainable", "loss", "loss_mask", "loss_weight", "weight")
# A part of an assistant's content that is its reasoning, and the key of its text.
_REASONING_PARTS = {"thinking": "thinking", "reasoning": "text", "reasoning_text": "text"}
_SECTIONS = ("tools", "response_format", "task")
# Beside `role`, `content` and the flags, what a message of a role may have.
_KEYS = {
    "system": _SECTIONS,
    "developer": _SECTIONS,
    "user": ("task",),
    "assistant": ("reasoning_content", "tool_calls", "wo_eos", "task"),
    "tool": ("tool_call_id",),
    "latest_reminder": ("task",),
}
# What only says where a row or a message is from.
_NOTES = frozenset(
    [
        *("id", "idx", "index", "uid", "uuid", "hash", "source", "dataset", "origin", "subset"),
        *("split", "category", "topic", "title", "url", "file_path", "dump", "date", "timestamp"),
        *("created", "created_at", "added", "modified", "version", "language", "lang", "license"),
        *("language_score", "author", "meta", "metadata", "token_count", "model", "model_name"),
        "finish_reason",
    ]
)
IGNORE = "remove it, or name it in data.ignore."
_REMEDIES = {
    "function_call": "give it as tool_calls.",
    **dict.fromkeys(("mask", "masked"), "say 'train': true or false."),
}
# What answers of an API and caching add to a part.
_PART_NOTES = ("annotations", "cache_control", "citations", "logprobs", "signature")


def is_note(key: str) -> bool:
    """Whether a key only says where something is from."""
    return key in _NOTES or (key.endswith("_id") and key != "tool_call_id")


def is_empty(value: Any) -> bool:
    """Whether a value says nothing, as those do that fill up a table."""
    return value in (None, "", [], {})


def read(message: Any, where: str, ignored: Container[str] = ()) -> Any:
    """A message with the keys of `v4jax.text.chat`; `train` where it says whether it is trained.

    Args:
      message: as in the file. What is no message at all is left for the encoder to refuse.
      where: its place in the row.
      ignored: keys that are taken away first.

    Raises:
      ValueError: a key or a value that has no meaning here; begins with its place.
    """
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in _KEYS:
        return message
    rest = {k: v for k, v in message.items() if v is not None and k not in ignored}
    trained = _flag(rest, role, where)
    content, thoughts = _content(rest.pop("content", None), role, f"{where}.content")
    kept = {"role": rest.pop("role"), "content": content}
    if role == "assistant":
        thoughts += [_text(rest.pop(key), f"{where}.{key}") for key in REASONING if key in rest]
        kept |= _reasoning(thoughts, where)
    kept |= {key: rest.pop(key) for key in _KEYS[role] if key in rest}
    if role == "tool" or rest.get("type") == "message":
        rest.pop("name" if role == "tool" else "type", None)
    _refuse_rest(rest, role, where)
    if role == "assistant" and content is None and not kept.get("tool_calls"):
        raise ValueError(f"{where} has neither content nor tool_calls; there is nothing to train.")
    if not isinstance(kept.get("wo_eos", False), bool):
        raise ValueError(f"{where}.wo_eos is {kept['wo_eos']!r}; give true or false.")
    return kept if trained is None else kept | {"train": trained}


def _flag(rest: dict[str, Any], role: str, where: str) -> bool | None:
    """Whether the message says that it is trained, in any of the spellings."""
    said = {key: rest.pop(key) for key in FLAGS if key in rest}
    for key, value in said.items():
        is_flag = isinstance(value, bool) or (key != "train" and value in (0, 1))
        if not is_flag:
            allowed = "true or false" if key == "train" else "0 or 1, true or false"
            kind = type(value).__name__ if key == "train" else repr(value)
            raise ValueError(f"{where}.{key} is {kind}; give {allowed}, or leave it out.")
        if value and role != "assistant":
            shown = str(value).lower()
            raise ValueError(
                f"{where}.{key} is {shown} in a message that no assistant writes; leave it out."
            )
    if len(set(map(bool, said.values()))) > 1:
        raise ValueError(f"{where} says {_listed(said)}, which contradict each other; keep one.")
    return next(map(bool, said.values()), None)


def _content(content: Any, role: str, where: str) -> tuple[Any, list[str]]:
    """The content, and the reasoning in it."""
    if isinstance(content, list):
        return _parts(content, role, where)
    if role != "assistant" or not isinstance(content, str):
        return content, []
    thoughts = []
    if content.lstrip().startswith(THINK) and END_THINK in content:
        before, _, content = content.partition(END_THINK)
        thoughts.append(before.lstrip().removeprefix(THINK).strip("\n"))
        content = content.lstrip("\n")
    _refuse_marks(content, where)
    return content, thoughts


def _parts(content: list[Any], role: str, where: str) -> tuple[list[Any], list[str]]:
    kept: list[Any] = []
    thoughts: list[str] = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping):
            kept.append(part)
            continue
        kind: Any = part.get("type")
        place = f"{where}[{i}]"
        is_reasoning = role == "assistant" and isinstance(kind, str) and kind in _REASONING_PARTS
        if not is_reasoning and kind not in TEXT_PARTS:
            known = ", ".join(TEXT_PARTS)
            raise ValueError(f"{place}.type is {kind!r}; only text is read: {known}.")
        field = _REASONING_PARTS[kind] if is_reasoning else "text"
        text = _text(part.get(field), f"{place}.{field}")
        rest = {k: v for k, v in part.items() if k not in (*_PART_NOTES, "type", field)}
        _refuse_rest(rest, "part", place)
        if is_reasoning and kept:
            raise ValueError(f"{place} is reasoning behind text; V4 reasons before it answers.")
        if role == "assistant":
            _refuse_marks(text, f"{place}.{field}")
        if is_reasoning:
            thoughts.append(text)
        else:
            kept.append({"type": "text", "text": text})
    return kept, ["\n\n".join(thoughts)] if thoughts else []


def _reasoning(thoughts: list[str], where: str) -> dict[str, str]:
    different = set(filter(None, thoughts))
    if len(different) > 1:
        raise ValueError(f"{where} has reasoning in two places, not the same; keep one.")
    for text in different:
        _refuse_marks(text, f"{where}.reasoning_content")
    return {"reasoning_content": thoughts[0] or max(thoughts)} if thoughts else {}


def _refuse_marks(text: str, where: str) -> None:
    for mark in (THINK, END_THINK):
        if mark in text:
            raise ValueError(
                f"{where} has {mark}, which would begin or end reasoning there; give the reasoning"
                " as reasoning_content, without marks."
            )


def _refuse_rest(rest: Mapping[str, Any], kind: str, where: str) -> None:
    known = (*_KEYS.get(kind, ()), "content", *FLAGS, *(REASONING if kind == "assistant" else ()))
    for key, value in rest.items():
        if not (is_note(key) or is_empty(value)):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            remedy = f"did you mean '{near[0]}'?" if near else _REMEDIES.get(key, IGNORE)
            owner = kind if kind == "part" else f"message of {kind}"
            raise ValueError(f"{where}.{key} is no field of a {owner}; {remedy}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing or null" if value is None else type(value).__name__
        raise ValueError(f"{where} is {kind}; give a string.")
    return value


def _listed(said: Mapping[str, Any]) -> str:
    return " and ".join(f"{key} {value!r}" for key, value in said.items())
