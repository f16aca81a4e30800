"""A row's settings of thinking, in the spellings of DeepSeek's API, servers and libraries."""

from collections.abc import Callable, Mapping
from typing import Any

from v4jax.text import chat

_TEMPLATE = "chat_template_kwargs"


def _mode(value: Any, where: str) -> str:
    mode = typed(str, value, where)
    if mode not in chat.THINKING_MODES:
        raise ValueError(f"{where} is '{mode}'; use one of {', '.join(chat.THINKING_MODES)}.")
    return mode


def _enabled(value: Any, where: str) -> str:
    return "thinking" if typed(bool, value, where) else "chat"


def _switch(value: Any, where: str) -> str:
    if not isinstance(value, Mapping):
        return _enabled(value, where)
    switches = {"enabled": "thinking", "disabled": "chat"}
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in switches:
        raise ValueError(f"{where}.type is {kind!r}; it must be 'enabled' or 'disabled'.")
    for key in value:
        if key != "type":
            raise ValueError(f"{where}.{key} has no effect in training; remove it.")
    return switches[kind]


def typed(kind: type, value: Any, where: str) -> Any:
    """The value of a field that may be left out; a ValueError if it is of another kind."""
    if not isinstance(value, kind):
        name = type(value).__name__
        raise ValueError(f"{where} is {name}; give a {kind.__name__}, or leave it out.")
    return value


# The setting that each spelling stands for, and the reader of its value.
_SPELLINGS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "thinking_mode": ("thinking_mode", _mode),
    "enable_thinking": ("thinking_mode", _enabled),
    "thinking": ("thinking_mode", _switch),
    "reasoning_effort": ("reasoning_effort", lambda value, where: typed(str, value, where)),
    "drop_thinking": ("drop_thinking", lambda value, where: typed(bool, value, where)),
    "truncate_history_thinking": ("drop_thinking", lambda value, where: typed(bool, value, where)),
}
FIELDS = (*_SPELLINGS, _TEMPLATE)


def read(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's `thinking_mode`, `reasoning_effort` and `drop_thinking`, as far as it has them.

    Raises:
      ValueError: a value is not allowed, or two contradict each other.
    """
    template = row.get(_TEMPLATE, {})
    for key in typed(dict, template, _TEMPLATE):
        if key not in _SPELLINGS:
            known = ", ".join(_SPELLINGS)
            raise ValueError(
                f"{_TEMPLATE}.{key} is not a setting of V4's encoding; it must be one of {known}."
            )
    settings: dict[str, tuple[str, Any]] = {}
    for prefix, fields in (("", row), (f"{_TEMPLATE}.", template)):
        for spelling, (setting, read_one) in _SPELLINGS.items():
            if fields.get(spelling) is None:
                continue
            where = prefix + spelling
            value = read_one(fields[spelling], where)
            first, other = settings.setdefault(setting, (where, value))
            if other != value:
                raise ValueError(f"{where} contradicts {first} '{other}'; leave one out.")
    return {setting: value for setting, (_, value) in settings.items()}
