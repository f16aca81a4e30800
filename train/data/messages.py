"""Messages of training data: common spellings, normalised to the keys of `v4jax.text.chat`.

Keys that V4's encoding does not use are rejected by name: if they were ignored, the message would
be trained as if it did not have them.
"""

import difflib
from collections.abc import Container, Mapping
from typing import Any

from v4jax.text.chat import END_THINK, TEXT_PARTS, THINK

REASONING = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("train", "training", "trainable", "loss", "loss_mask", "loss_weight", "weight")
# Types of content parts that are an assistant's reasoning, and the key of their text.
_REASONING_PARTS = {"thinking": "thinking", "reasoning": "text", "reasoning_text": "text"}
_SECTIONS = ("tools", "response_format", "task")
# Keys allowed in a message of each role besides `role`, `content` and the flags.
_KEYS = {
    "system": _SECTIONS,
    "developer": _SECTIONS,
    "user": ("task",),
    "assistant": ("reasoning_content", "tool_calls", "wo_eos", "task"),
    "tool": ("tool_call_id",),
    "latest_reminder": ("task",),
}
# Keys that only describe the origin of a row or message.
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
    **dict.fromkeys(("mask", "masked"), "use 'train': true or false."),
}
# Keys that API responses and caching add to a part.
_PART_NOTES = ("annotations", "cache_control", "citations", "logprobs", "signature")


def is_note(key: str) -> bool:
    """Whether a key only describes where a row or message is from."""
    return key in _NOTES or (key.endswith("_id") and key != "tool_call_id")


def is_empty(value: Any) -> bool:
    """Whether a value is empty, like those that fill up a table."""
    return value in (None, "", [], {})


def read(message: Any, where: str, ignored: Container[str] = ()) -> Any:
    """Normalise a message to the keys of `v4jax.text.chat`, and `train` if it has such a flag.

    Args:
      message: the message in the file. The encoder rejects what is not a message at all.
      where: location of the message in the row.
      ignored: keys to drop first.

    Raises:
      ValueError: a key or value is not allowed; the error begins with its location.
    """
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in _KEYS:
        return message
    rest = {k: v for k, v in message.items() if v is not None and k not in ignored}
    trained = _flag(rest, role, where)
    content, thoughts = _content(rest.pop("content", None), role, f"{where}.content")
    normalised = {"role": rest.pop("role"), "content": content}
    if role == "assistant":
        thoughts += [_text(rest.pop(key), f"{where}.{key}") for key in REASONING if key in rest]
        normalised |= _reasoning(thoughts, where)
    normalised |= {key: rest.pop(key) for key in _KEYS[role] if key in rest}
    if role == "tool" or rest.get("type") == "message":
        rest.pop("name" if role == "tool" else "type", None)
    _reject_rest(rest, role, where)
    if role == "assistant" and content is None and not normalised.get("tool_calls"):
        raise ValueError(f"{where} has neither content nor tool_calls; there is nothing to train.")
    if not isinstance(normalised.get("wo_eos", False), bool):
        raise ValueError(f"{where}.wo_eos is {normalised['wo_eos']!r}; give true or false.")
    return normalised if trained is None else normalised | {"train": trained}


def _flag(rest: dict[str, Any], role: str, where: str) -> bool | None:
    """The message's flag for being trained, in any of the spellings; None without one."""
    flags = {key: rest.pop(key) for key in FLAGS if key in rest}
    for key, value in flags.items():
        is_flag = isinstance(value, bool) or (key != "train" and value in (0, 1))
        if not is_flag:
            allowed = "true or false" if key == "train" else "0 or 1, true or false"
            kind = type(value).__name__ if key == "train" else repr(value)
            raise ValueError(f"{where}.{key} is {kind}; give {allowed}, or leave it out.")
        if value and role != "assistant":
            shown = str(value).lower()
            raise ValueError(
                f"{where}.{key} is {shown} in a message not by the assistant; leave it out."
            )
    if len(set(map(bool, flags.values()))) > 1:
        listed = " and ".join(f"{key} {value!r}" for key, value in flags.items())
        raise ValueError(f"{where} has {listed}, which contradict each other; keep one.")
    return next(map(bool, flags.values()), None)


def _content(content: Any, role: str, where: str) -> tuple[Any, list[str]]:
    """Split content into the answer and the reasoning."""
    if isinstance(content, list):
        return _parts(content, role, where)
    if role != "assistant" or not isinstance(content, str):
        return content, []
    thoughts = []
    if content.lstrip().startswith(THINK) and END_THINK in content:
        before, _, content = content.partition(END_THINK)
        thoughts.append(before.lstrip().removeprefix(THINK).strip("\n"))
        content = content.lstrip("\n")
    _reject_marks(content, where)
    return content, thoughts


def _parts(content: list[Any], role: str, where: str) -> tuple[list[Any], list[str]]:
    answer: list[Any] = []
    thoughts: list[str] = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping):
            answer.append(part)
            continue
        kind: Any = part.get("type")
        place = f"{where}[{i}]"
        is_reasoning = role == "assistant" and isinstance(kind, str) and kind in _REASONING_PARTS
        if not is_reasoning and kind not in TEXT_PARTS:
            known = ", ".join(TEXT_PARTS)
            raise ValueError(f"{place}.type is {kind!r}; it must be a type of text: {known}.")
        field = _REASONING_PARTS[kind] if is_reasoning else "text"
        text = _text(part.get(field), f"{place}.{field}")
        rest = {k: v for k, v in part.items() if k not in (*_PART_NOTES, "type", field)}
        _reject_rest(rest, "part", place)
        if is_reasoning and answer:
            raise ValueError(f"{place} is reasoning after text; V4 reasons before it answers.")
        if role == "assistant":
            _reject_marks(text, f"{place}.{field}")
        if is_reasoning:
            thoughts.append(text)
        else:
            answer.append({"type": "text", "text": text})
    return answer, ["\n\n".join(thoughts)] if thoughts else []


def _reasoning(thoughts: list[str], where: str) -> dict[str, str]:
    distinct = set(filter(None, thoughts))
    if len(distinct) > 1:
        raise ValueError(f"{where} has reasoning in two places that differ; keep one.")
    for text in distinct:
        _reject_marks(text, f"{where}.reasoning_content")
    return {"reasoning_content": thoughts[0] or max(thoughts)} if thoughts else {}


def _reject_marks(text: str, where: str) -> None:
    for mark in (THINK, END_THINK):
        if mark in text:
            raise ValueError(
                f"{where} has {mark}, which would start or end reasoning there; give the reasoning"
                " as reasoning_content, without marks."
            )


def _reject_rest(rest: Mapping[str, Any], kind: str, where: str) -> None:
    known = (*_KEYS.get(kind, ()), "content", *FLAGS, *(REASONING if kind == "assistant" else ()))
    for key, value in rest.items():
        if not (is_note(key) or is_empty(value)):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            remedy = f"did you mean '{near[0]}'?" if near else _REMEDIES.get(key, IGNORE)
            owner = "content parts" if kind == "part" else f"{kind} messages"
            raise ValueError(f"{where}.{key} is not a field of {owner}; {remedy}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing or null" if value is None else type(value).__name__
        raise ValueError(f"{where} is {kind}; give a string.")
    return value
