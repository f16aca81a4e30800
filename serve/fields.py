"""Tables of fields: they read a request's JSON body, and describe it as a JSON schema.

A field that is null counts as missing, and unknown fields are ignored. Errors say which field is
wrong and why.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from starlette.requests import Request

from v4jax import arguments
from v4jax.arguments import ArgumentError, Kind, shown

from .errors import ApiError

MAX_DEPTH = 64  # levels of nested lists and objects
_LARGE = 2**16  # bytes of a body
# How many times what is allowed is received of a body, so that its client reads why it is refused.
_IGNORED = 4
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field may be.

    Attributes:
      expected: what a value must be, for error messages.
      read: converts a value, after its place in the body, to what the server receives.
      schema: JSON schema of the values.
      default: what the server receives if the field is missing.
      is_required: whether it may not be missing.
    """

    expected: str
    read: Callable[[str, Any], Any]
    schema: dict[str, Any]
    default: Any = None
    is_required: bool = False


class Fields:
    """The fields of an object, as attributes.

    `raw` is the object itself.
    """

    def __init__(self, place: str, raw: dict[str, Any], values: dict[str, Any]) -> None:
        self._place, self.raw, self._values = place, raw, values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Reject the request because of a field."""
        _refuse(_inside(self._place, name), problem)


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _refuse(place: str, problem: str) -> NoReturn:
    raise ApiError(422, f"{place or 'The body'} {problem}")


def required(field: Field) -> Field:
    """The field, which may not be missing."""
    return dataclasses.replace(field, is_required=True)


def default(field: Field, value: Any) -> Field:
    """The field, with a value for when it is missing."""
    return dataclasses.replace(field, default=value)


def leaf(kind: Kind, **schema: Any) -> Field:
    """A field whose values have no fields of their own."""

    def read(place: str, value: Any) -> Any:
        try:
            return kind(place, value)
        except ArgumentError as error:
            raise ApiError(422, str(error)) from None

    return Field(kind.expected, read, schema)


TEXT = leaf(arguments.TEXT, type="string")
FLAG = leaf(arguments.FLAG, type="boolean")
OBJECT = leaf(arguments.instance("an object", dict), type="object")
TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
TOKEN_IDS = leaf(arguments.TOKEN_IDS, type="array", items=TOKEN)


def integer(least: int, most: int | None = None) -> Field:
    """Integers of a range."""
    if most is None:
        return leaf(arguments.integer(least), type="integer", minimum=least)
    expected = f"an integer from {least} to {most}" if most > least else str(least)
    kind = arguments.integer(least, most, expected)
    return leaf(kind, type="integer", minimum=least, maximum=most)


def choice(*names: str) -> Field:
    """One of these strings."""
    return leaf(arguments.choice(*names), enum=[*names])


def unsupported(reason: str) -> Field:
    """A field that may only have a value that asks for nothing."""

    def read(place: str, value: Any) -> None:
        if value:
            _refuse(place, f"is not supported{reason}")

    return Field("nothing", read, {"enum": [False, 0, "", [], {}]})


def sequence(item: Field, *, least: int = 0, most: int | None = None) -> Field:
    """A list; an empty tuple if it is missing."""
    expected = "a list of one or more items" if least else "a list"

    def read(place: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            _refuse(place, f"is {shown(value)}; it must be {expected}.")
        if most is not None and len(value) > most:
            _refuse(place, f"has {len(value)} items; at most {most} are allowed.")
        return [item.read(f"{place}[{i}]", value) for i, value in enumerate(value)]

    limits = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return Field(expected, read, {"type": "array", "items": item.schema, **limits}, ())


def text_or(other: Field, text: Field = TEXT) -> Field:
    """A string, or a list or object."""
    expected = f"{text.expected} or {other.expected}"

    def read(place: str, value: Any) -> Any:
        if not isinstance(value, str | list | dict):
            _refuse(place, f"is {shown(value)}; it must be {expected}.")
        return (text if isinstance(value, str) else other).read(place, value)

    return Field(expected, read, {"anyOf": [text.schema, other.schema]})


def table(**fields: Field) -> Field:
    """An object with these fields; if none is required, a missing one is an empty one."""

    def read(place: str, value: Any) -> Fields:
        if not isinstance(value, dict):
            _refuse(place, f"is {shown(value)}; it must be an object.")
        values = {}
        for name, field in fields.items():
            given, inner = value.get(name), _inside(place, name)
            if given is None and field.is_required:
                _refuse(inner, f"is missing; it must be {field.expected}.")
            values[name] = field.default if given is None else field.read(inner, given)
        return Fields(place, value, values)

    needed = [name for name, field in fields.items() if field.is_required]
    properties = {
        name: field.schema if field.is_required else {"anyOf": [field.schema, {"type": "null"}]}
        for name, field in fields.items()
    }
    schema = {"type": "object", "properties": properties, "required": needed}
    return Field("an object", read, schema, None if needed else read("", {}))


def tagged(
    tag: str,
    tables: Mapping[str, Mapping[str, Field]],
    *,
    absent: str | None = None,
    hint: str = "",
) -> Field:
    """An object one of whose fields tells which others it has.

    Args:
      tag: name of that field.
      tables: the other fields, for each of its values.
      absent: its value where it is missing; None if it is required.
      hint: what to do about another value, for the error message.
    """

    def mark(name: str) -> Field:
        field = leaf(arguments.choice(name), const=name)
        return default(field, name) if name == absent else required(field)

    known = {name: table(**{tag: mark(name)}, **fields) for name, fields in tables.items()}
    instead = hint or f"use one of {', '.join(tables)}"
    head = table(**{tag: TEXT if absent else required(TEXT)})

    def read(place: str, value: Any) -> Fields:
        name = getattr(head.read(place, value), tag) or absent
        if name not in known:
            _refuse(_inside(place, tag), f"is {shown(name)}; {instead}.")
        return known[name].read(place, value)

    return Field("an object", read, {"anyOf": [field.schema for field in known.values()]})


async def read_body(http: Request, fields: Field) -> Fields:
    """A request's JSON body, which is an object with these fields."""
    max_bytes = http.app.state.service.limits.body_bytes
    body, size = bytearray(), 0
    is_long = int(http.headers.get("content-length", 0)) > max_bytes
    async for chunk in http.stream():
        size += len(chunk)
        is_long = is_long or size > max_bytes
        if not is_long:
            body += chunk
        elif size > _IGNORED * max_bytes:
            break
    if is_long:
        raise ApiError(413, f"The body is longer than {max_bytes} bytes.")
    read = lambda: fields.read("", _parse(body))
    # What takes long must not hold up the streams of others.
    return await asyncio.to_thread(read) if len(body) > _LARGE else read()


def _parse(body: bytearray) -> Any:
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
        _check_depth(value)
        # An escape may stand for half a surrogate pair, which no answer can repeat.
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8: {error.reason} at {error.start}.") from None
    except UnicodeEncodeError:
        raise ApiError(400, "The body has half a surrogate pair, which is no character.") from None
    except (ValueError, RecursionError) as error:
        problem = _TOO_DEEP if isinstance(error, RecursionError) else error
        raise ApiError(400, f"Failed to parse the request body as JSON: {problem}") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [i for n in nested for i in (n.values() if isinstance(n, dict) else n)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
