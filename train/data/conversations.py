"""Conversion of ShareGPT conversations to messages."""

import json
from collections.abc import Mapping
from typing import Any

from v4jax.text.files import unique_keys

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}
_CALL = "function_call"


def from_sharegpt(turns: list[Any]) -> list[Any]:
    """Convert turns with `from` and `value` to messages; other turns are returned unchanged.

    Raises:
      ValueError: an unknown speaker, or an invalid call.
    """
    return [
        _message(turn, f"conversations[{i}]")
        if isinstance(turn, Mapping) and "from" in turn
        else turn
        for i, turn in enumerate(turns)
    ]


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    rest = dict(turn)
    speaker, value = rest.pop("from"), rest.pop("value", None)
    for key in ("role", "content", "tool_calls"):
        if rest.get(key) is not None:
            raise ValueError(f"{where}.{key} duplicates from and value; keep one of the forms.")
    if speaker == _CALL:
        return rest | {"role": "assistant", "content": None, "tool_calls": _calls(value, where)}
    if not isinstance(speaker, str) or speaker not in _ROLES:
        known = ", ".join((*_ROLES, _CALL))
        raise ValueError(f"{where}.from is {speaker!r}; it must be one of {known}.")
    return rest | {"role": _ROLES[speaker], "content": value}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls in a turn's JSON text: an object with name and arguments, or a list of them."""
    try:
        value = json.loads(value, object_pairs_hook=unique_keys)
    except (TypeError, ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    is_call = lambda call: isinstance(call, dict) and call.keys() == {"name", "arguments"}
    if not (calls and all(map(is_call, calls))):
        raise ValueError(
            f"{where}.value is not a call; give the JSON text of an object with name and arguments."
        )
    return [{"type": "function", "function": call} for call in calls]
