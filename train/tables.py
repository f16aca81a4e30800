"""Conversion of nested tables, as in TOML and JSON, to frozen dataclasses and back."""

import dataclasses
import difflib
import math
import types
import warnings
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_MOST: dict[Any, float] = {int: 2**31 - 1, float: 3.4028235e38}  # limits of int32 and float32
_TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_SHOWN = 100  # characters of an invalid value


def to_table(settings: Any) -> dict[str, Any]:
    """A dataclass as nested tables of plain values; None is left out."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        name: to_table(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if value is not None
    }


def from_nested(kind: Any, table: Any, where: str = "") -> Any:
    """A dataclass from its table.

    Raises:
      ValueError: a key or value does not fit the dataclass; the error prefixes its name with
        `where`.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is {_short(table)}; it must be a table.")
    hints = get_type_hints(kind)
    table = _renamed(kind, table, where)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            meant = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(hints)}."
            raise ValueError(f"{where or 'The recipe'} has no '{key}'; {meant}")
    values = {
        key: _value(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in table.items()
    }
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _renamed(kind: Any, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with old names, a field's `was` metadata, replaced by the current ones."""
    new_name = {
        old: field.name for field in dataclasses.fields(kind) if (old := field.metadata.get("was"))
    }
    for old in new_name.keys() & table:
        new = new_name[old]
        if new in table:
            raise ValueError(f"{where} has {new} and {old}, its old name; remove {old}.")
        warnings.warn(f"{where}.{old} is now called {new}.", FutureWarning, stacklevel=2)
    return {new_name.get(key, key): value for key, value in table.items()}


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value converted to the annotated type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_nested(hint, value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{where} is {_short(value)}; it must be one of {allowed}.")
        return value
    if get_origin(hint) is tuple:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(x, str) for x in parts):
            raise ValueError(f"{where} is {_short(value)}; it must be a list of strings.")
        return tuple(parts)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; it must be a finite number.")
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise ValueError(f"{where} is {_short(value)}; it must be {_TYPES[hint]}.")
    if hint in (int, float) and not abs(value) <= _MOST[hint]:
        raise ValueError(f"{where} is {_short(value)}; it must be at most {_MOST[hint]:g}.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def at_least(settings: Any, least: int | float, *names: str, above: bool = False) -> None:
    """Reject fields below `least`, equal to it with `above`, or infinite."""
    for name in names:
        value = getattr(settings, name)
        if not (value > least if above else value >= least) or value == float("inf"):
            bound = "above" if above else "at least"
            raise ValueError(f"{name} is {value}; it must be {bound} {least}.")
