"""Validation of the arguments of public calls, with errors that say what is wrong in a sentence.

A `Kind` validates one argument; `checked` assigns kinds to a function's arguments. NumPy and JAX
are not imported here: their scalars and arrays are recognised by `ndim`, `item` and `tolist`.
"""

import dataclasses
import difflib
import errno
import functools
import inspect
import math
import numbers
import os
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class ArgumentError(ValueError, TypeError):
    """An argument is invalid.

    A ValueError, like every user error in this package, and also the TypeError that Python itself
    raises for wrong names and types.
    """


class Invalid(Exception):
    """What is wrong with a value, to follow its name; empty for the default message of its kind."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Attributes:
      expected: what a value must be, for the error message.
      read: converts a value to what the function receives; raises `Invalid`.
      verb: the words before `expected` in the error message.
    """

    expected: str
    read: Callable[[Any], Any]
    verb: str = "it must be"

    def __call__(self, name: str, value: Any) -> Any:
        """Convert the value of the argument `name` to what the function receives.

        Raises:
          ArgumentError: the value is not of this kind.
        """
        try:
            return self.read(value)
        except Invalid as invalid:
            problem = str(invalid) or f" is {shown(value)}; {self.verb} {self.expected}."
        raise ArgumentError(name + problem)


def checked(**kinds: Kind) -> Callable[[_F], _F]:
    """Validate the arguments of the decorated function, or of the decorated class's `__init__`.

    Args:
      kinds: kind of each argument; names that are not in the signature belong to its `**kwargs`.
    """

    def decorate(function: Any) -> Any:
        if isinstance(function, type):
            function.__init__ = decorate(function.__init__)
            return function
        callee = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        signature = inspect.signature(function)
        var_keyword = [
            p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD
        ]
        hidden = ("self", "cls", *var_keyword)
        known = [name for name in {**signature.parameters, **kinds} if name not in hidden]
        ordered, least = _positional(signature)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not kwargs and least <= len(args) <= len(ordered):
                # Binding would take longer than most calls that are made for every token.
                pairs = zip(ordered, args, strict=False)
                return function(*(kinds[k](k, v) if k in kinds else v for k, v in pairs))
            for name in kwargs:
                check_name(callee, name, known)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                names = ", ".join(known)
                raise ArgumentError(f"{callee}: {error}; it takes {names}.") from None
            for values in (bound.arguments, *(bound.arguments.get(n, {}) for n in var_keyword)):
                values |= {
                    name: kinds[name](name, values[name]) for name in kinds if name in values
                }
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _positional(signature: inspect.Signature) -> tuple[list[str], int]:
    """Names of the arguments that can be given by position, and how many have to be given.

    There are none if others have to be given by name.
    """
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required):
        return [], 1
    ordered = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return ordered, len(required)


def renamed(old: str, new: str) -> Callable[[_F], _F]:
    """Accept an argument of the decorated function under its old name, with a FutureWarning."""

    def decorate(function: Any) -> Any:
        callee = function.__qualname__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise ArgumentError(f"{callee} got {new} and {old}, its old name; pass {new}.")
                notice = f"{callee}: the argument {old} is now called {new}."
                warnings.warn(notice, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def check_name(callee: str, name: str, known: Sequence[str]) -> None:
    """Reject an unknown argument name.

    Raises:
      ArgumentError: the name is unknown; the message lists all names, and a similar one first.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? It" if near else "it"
        raise ArgumentError(f"{callee} has no argument '{name}'; {hint} takes {', '.join(known)}.")


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python does not convert integers of more than 4300 digits to text.
        return super().repr_int(x, level) if x.bit_length() < 2048 else "a very large number"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, float | complex | bool | bytes | type | os.PathLike) or x is None:
            return super().repr_instance(x, level)
        if isinstance(shape := getattr(x, "shape", None), tuple):
            return f"an array of shape {shape} and dtype {getattr(x, 'dtype', 'unknown')}"
        return f"an object of type {type(x).__name__}"


def shown(value: Any) -> str:
    """A short text of a value for an error message; for an array its shape and dtype."""
    return _Shown().repr(scalar(value))


def one_of(value: Any, names: Collection[str | None]) -> bool:
    """Whether a value of any type is one of these strings."""
    return isinstance(value, str) and value in names


def scalar(value: Any) -> Any:
    """The Python value of a NumPy or JAX scalar or 0-d array; other values unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def items(value: Any) -> list[Any] | None:
    """The items of a sequence or an array; None for anything else, including text and bytes."""
    if isinstance(value, str | bytes | bytearray | memoryview | type):
        return None
    if hasattr(value, "tolist") and getattr(value, "ndim", 1):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) else None


def predicate(expected: str, allowed: Callable[[Any], bool]) -> Kind:
    """Values for which `allowed` is true, unchanged."""

    def read(value: Any) -> Any:
        if not allowed(value):
            raise Invalid
        return value

    return Kind(expected, read)


def instance(expected: str, cls: type) -> Kind:
    """Instances of a class."""
    return predicate(expected, lambda value: isinstance(value, cls))


def optional(kind: Kind) -> Kind:
    """None, or a value of the kind."""
    read = lambda value: None if value is None else kind.read(value)
    return Kind(f"None or {kind.expected}", read)


def integer(least: int, most: float | int = math.inf, expected: str = "") -> Kind:
    """Integers of Python, NumPy or JAX, as Python ints."""

    def read(value: Any) -> int:
        value = scalar(value)
        if not _is_integer(value) or not least <= value <= most:
            raise Invalid
        return int(value)

    return Kind(expected or f"an integer of {least} or more", read)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(expected: str, allowed: Callable[[float], bool]) -> Kind:
    """Real numbers of Python, NumPy or JAX, as floats; `allowed` must be false for NaN."""

    def read(value: Any) -> float:
        value = scalar(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Invalid
        try:
            value = float(value)
        except OverflowError:
            raise Invalid from None
        if not allowed(value):
            raise Invalid
        return value

    return Kind(expected, read)


def choice(*names: str) -> Kind:
    """One of these strings."""
    read = predicate("", lambda value: one_of(value, names)).read
    return Kind(f"one of {', '.join(names)}", read, verb="use")


def dtype(*names: str) -> Kind:
    """One of these dtypes, given by name or as a dtype of NumPy or JAX; read as its name."""
    named = choice(*names)

    def read(value: Any) -> str:
        import numpy as np

        return named.read(np.dtype(value).name if isinstance(value, type | np.dtype) else value)

    return dataclasses.replace(named, read=read)


def sequence(expected: str, *, least: int = 0, of: type = object) -> Kind:
    """Sequences of at least `least` instances of a class; read as a list."""

    def read(value: Any) -> list[Any]:
        listed = items(value)
        if listed is None or len(listed) < least or not all(isinstance(x, of) for x in listed):
            raise Invalid
        return listed

    return Kind(expected, read)


def _flag(value: Any) -> bool:
    if not isinstance(value := scalar(value), bool):
        raise Invalid
    return value


def _is_path(value: Any) -> bool:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        return False
    try:
        os.lstat(os.path.expanduser(text))
    except (OSError, ValueError) as error:
        # A missing path may be created later, or be a Hub id; an impossible one is not a path.
        return not isinstance(error, ValueError) and error.errno != errno.ENAMETOOLONG
    return True


FLAG = Kind("True or False", _flag)
TEXT = predicate("a string", lambda value: isinstance(value, str))
PATH = predicate("a path", _is_path)
DIRECTORY = Kind(PATH.expected, lambda value: Path(PATH.read(value)))
FUNCTION = predicate("a function", callable)


# Arguments that all conversions take.
FILES = {"source": PATH, "target": PATH, "revision": optional(TEXT), "progress": optional(FUNCTION)}


def _token_ids(value: Any) -> list[int]:
    if (listed := items(value)) is None:
        raise Invalid
    if all(type(item) is int for item in listed):
        return listed
    ids = [scalar(item) for item in listed]
    for at, item in enumerate(ids):
        if not _is_integer(item):
            if items(item) is not None:
                raise Invalid(" has rows of token ids; pass one row per call.")
            raise Invalid(f"[{at}] is {shown(item)}; token ids are integers.")
    return ids


def _vocabulary_ids(value: Any) -> list[int]:
    ids = _token_ids(value)
    for at, item in enumerate(ids):
        if not 0 <= item < 2**32:
            raise Invalid(f"[{at}] is {shown(item)}; token ids are from 0 to {2**32 - 1}.")
    return ids


class Batch(list[Any]):
    """Several prompts, where one is allowed as well."""


def _prompt(value: Any) -> str | list[Any]:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        raise Invalid(" is a dictionary; pass the messages of a chat as a list.")
    messages = items(value) or ()
    first = next(iter(messages), None)
    if isinstance(first, Mapping):
        return [*messages]
    if isinstance(first, str):
        raise Invalid(" is a list of texts; pass one text per call.")
    return _token_ids(value)


def _prompts(value: Any) -> str | list[Any]:
    rows = items(value) or ()
    first = next(iter(rows), None)
    if isinstance(value, str) or not (isinstance(first, str) or items(first) is not None):
        return _prompt(value)
    prompts = Batch()
    for at, row in enumerate(rows):
        try:
            prompts.append(_prompt(row))
        except Invalid as invalid:
            problem = str(invalid) or f" is {shown(row)}; it must be {PROMPT.expected}."
            raise Invalid(f"[{at}]{problem}") from None
    return prompts


def _token_rows(value: Any) -> list[list[int]]:
    expected = " must be non-empty token ids [batch, length]"
    rows = items(value) or []
    if not rows or any(items(row) is None for row in rows) or not items(rows[0]):
        raise Invalid(f"{expected}; got {shown(value)}.")
    ids: list[list[int]] = []
    for at, row in enumerate(rows):
        try:
            ids.append(_token_ids(row))
        except Invalid as invalid:
            raise Invalid(f"[{at}]{invalid}") from None
        if len(ids[at]) != len(ids[0]):
            raise Invalid(
                f"{expected}; row 0 has {len(ids[0])} and row {at} has {len(ids[at])}: pass rows "
                "of equal length, one call per length."
            )
    return ids


TOKEN_IDS = Kind("a list of token ids", _vocabulary_ids)
TOKEN_ROWS = Kind("token ids [batch, length]", _token_rows)
PROMPT = Kind("text or a list of token ids, or of a chat's messages", _prompt)
PROMPTS = Kind(f"{PROMPT.expected}, or a list of these", _prompts)
