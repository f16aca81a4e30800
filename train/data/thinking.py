"""What a row says of thinking, in the spellings of DeepSeek's API, of servers and of libraries."""

from collections.abc import Callable, Mapping
from typing import Any

from v4jax.text import chat

_TEMPLATE = "chat_template_kwargs"


def _mode(value: Any, where: str) -> str:
    mode = _of(str, value, where)
    if mode not in chat.THINKING_MODES:
        raise ValueError(f"{where} is '{mode}'; use one of {', '.join(chat.THINKING_MODES)}.")
    return mode


def _enabled(value: Any, where: str) -> str:
    return "thinking" if _of(bool, value, where) else "chat"


def _switch(value: Any, where: str) -> str:
    if not isinstance(value, Mapping):
        return _enabled(value, where)
    switches = {"enabled": "thinking", "disabled": "chat"}
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in switches:
        raise ValueError(f"{where}.type is {kind!r}; it is 'enabled' or 'disabled'.")
    for key in value:
        if key != "type":
            raise ValueError(f"{where}.{key} has no meaning in training; remove it.")
    return switches[kind]


def _of(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        name = type(value).__name__
        raise ValueError(f"{where} is {name}; give a {kind.__name__}, or leave it out.")
    return value


# What each spelling says, and how.
_SPELLINGS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "thinking_mode": ("thinking_mode", _mode),
    "enable_thinking": ("thinking_mode", _enabled),
    "thinking": ("thinking_mode", _switch),
    "reasoning_effort": ("reasoning_effort", lambda value, where: _of(str, value, where)),
    "drop_thinking": ("drop_thinking", lambda value, where: _of(bool, value, where)),
    "truncate_history_thinking": ("drop_thinking", lambda value, where: _of(bool, value, where)),
}
FIELDS = (*_SPELLINGS, _TEMPLATE)


def read(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of `thinking_mode`, `reasoning_effort` and `drop_thinking` those that the row states.

    Raises:
      ValueError: a value that is none of theirs, or two that contradict each other.
    """
    template = row.get(_TEMPLATE, {})
    for key in _of(dict, template, _TEMPLATE):
        if key not in _SPELLINGS:
            known = ", ".join(_SPELLINGS)
            raise ValueError(f"{_TEMPLATE}.{key} is no setting of V4's encoding; it has {known}.")
    said: dict[str, tuple[str, Any]] = {}
    for prefix, fields in (("", row), (f"{_TEMPLATE}.", template)):
        for spelling, (setting, read_one) in _SPELLINGS.items():
            if fields.get(spelling) is None:
                continue
            where = prefix + spelling
            value = read_one(fields[spelling], where)
            before, other = said.setdefault(setting, (where, value))
            if other != value:
                raise ValueError(f"{where} contradicts {before} '{other}'; leave one out.")
    return {setting: value for setting, (_, value) in said.items()}
