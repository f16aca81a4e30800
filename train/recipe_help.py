"""Types, defaults and meanings of a recipe's fields, read from the classes that define them.

A field's meaning is its entry under `Attributes:` in the docstring of its class, or of a class in
its `described_by`.
"""

import dataclasses
import inspect
import json
import re
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

_ENTRY = re.compile(r"  (\w+): (.+)")


class Field(NamedTuple):
    """One field of a table, with its type and default as `--help` shows them."""

    name: str
    type: str
    default: str
    meaning: str


def tables(recipe: Any) -> dict[str, Any]:
    """The dataclass of each of the recipe's tables, by the table's name."""
    hints = get_type_hints(recipe).items()
    kinds = [(name, kind) for name, hint in hints for kind in (hint, *get_args(hint))]
    return {name: kind for name, kind in kinds if dataclasses.is_dataclass(kind)}


def summary(kind: Any) -> str:
    """The first line of a class's docstring."""
    return (kind.__doc__ or "").partition("\n")[0]


def fields(kind: Any) -> list[Field]:
    """A table's fields, in order."""
    hints = get_type_hints(kind)
    meanings: dict[str, str] = {}
    for source in (*getattr(kind, "described_by", ()), kind):
        meanings |= attributes(source)
    return [
        Field(x.name, type_name(hints[x.name]), default(x.default), meanings.get(x.name, ""))
        for x in dataclasses.fields(kind)
    ]


def attributes(kind: Any) -> dict[str, str]:
    """The entries under `Attributes:` in a class's docstring, each on one line."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    entries: dict[str, str] = {}
    name = ""
    for line in section.partition("\n\n")[0].splitlines():
        if entry := _ENTRY.fullmatch(line):
            name, entries[entry[1]] = entry[1], entry[2]
        else:
            entries[name] += f" {line.strip()}"
    return entries


def type_name(hint: Any) -> str:
    """The values that a type allows, e.g. `int`, `true|false`, `{skip,stop}` or `[str,...]`."""
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    if get_origin(hint) is tuple:
        return "[str,...]"
    if kinds := [kind for kind in get_args(hint) if kind is not type(None)]:
        return "|".join(map(type_name, kinds))
    return "true|false" if hint is bool else hint.__name__


def default(value: Any) -> str:
    """A default value as in TOML; `unset` for None."""
    return "unset" if value is None else json.dumps(value)
