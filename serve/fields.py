"""Read a request's JSON body, field by field; errors say which field is wrong and why."""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from starlette.requests import Request

from v4jax.arguments import ArgumentError, Kind, sequence, shown

from .errors import ApiError

MAX_DEPTH = 64  # levels of nested lists and objects
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"

LIST = sequence("a list")


class Fields:
    """A JSON object that is read field by field. A null is the same as a missing field."""

    def __init__(self, value: Any, where: str = "") -> None:
        """Wrap an object.

        Args:
          value: the object.
          where: its place in the body, for error messages; "" for the body itself.
        """
        self.where = where
        if not isinstance(value, dict):
            raise ApiError(422, f"{where or 'The body'} is {shown(value)}; it must be an object.")
        self.values: dict[str, Any] = value

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def path(self, name: str) -> str:
        """The place of a field in the body."""
        return f"{self.where}.{name}" if self.where else name

    def read(self, name: str, kind: Kind, default: Any = None) -> Any:
        """A field of this kind, or the default if it is missing."""
        value = self.values.get(name)
        if value is None:
            return default
        try:
            return kind(self.path(name), value)
        except ArgumentError as error:
            raise ApiError(422, str(error)) from None

    def require(self, name: str, kind: Kind) -> Any:
        """A field of this kind that must be there."""
        if name not in self:
            self.refuse(name, f"is missing; it must be {kind.expected}.")
        return self.read(name, kind)

    def object(self, name: str) -> "Fields":
        """A field that is an object; an empty object if it is missing."""
        value = self.values.get(name)
        return Fields({} if value is None else value, self.path(name))

    def objects(self, name: str) -> Iterator["Fields"]:
        """The objects of a field that is a list of them; none if it is missing."""
        for i, value in enumerate(self.read(name, LIST, [])):
            yield Fields(value, f"{self.path(name)}[{i}]")

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Reject the request because of a field."""
        raise ApiError(422, f"{self.path(name)} {problem}")


async def read_body(http: Request, max_bytes: int) -> Fields:
    """The JSON object in a request's body."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, f"The body is longer than {max_bytes} bytes.")
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
    return Fields(value)


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
