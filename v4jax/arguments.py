"""What users' calls take, checked where they come in: a wrong argument is told in a sentence.

A `Kind` reads one argument, and `checked` puts kinds on a function's names. Neither NumPy nor JAX
is imported here: their scalars and arrays are known by `ndim`, `item` and `tolist`.
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
    """A call does not take such an argument.

    A ValueError, as every mistake of a user is here, and the TypeError that Python itself raises
    for wrong names and types.
    """


class Wrong(Exception):
    """What is wrong with a value, in words that follow its name; without words, the kind's own."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Attributes:
      takes: what it must be.
      read: from a value to what the function gets; raises `Wrong`.
      verb: before `takes`, in the sentence for the user.
    """

    takes: str
    read: Callable[[Any], Any]
    verb: str = "it must be"

    def __call__(self, name: str, value: Any) -> Any:
        """What the function gets.

        Raises:
          ArgumentError: the value is not of this kind.
        """
        try:
            return self.read(value)
        except Wrong as wrong:
            told = str(wrong) or f" is {shown(value)}; {self.verb} {self.takes}."
        raise ArgumentError(name + told)


def checked(**kinds: Kind) -> Callable[[_F], _F]:
    """Decorates a function, or a class for its `__init__`, whose arguments are of these kinds.

    Kinds of names that are not in the signature are of its further keywords.
    """

    def decorate(function: Any) -> Any:
        if isinstance(function, type):
            function.__init__ = decorate(function.__init__)
            return function
        called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        signature = inspect.signature(function)
        of_kind = lambda kind: [p.name for p in signature.parameters.values() if p.kind is kind]
        further = of_kind(inspect.Parameter.VAR_KEYWORD)
        known = [n for n in {**signature.parameters, **kinds} if n not in ("self", "cls", *further)]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                check_name(called, name, known)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                takes = ", ".join(known)
                raise ArgumentError(f"{called}: {error}; it takes {takes}.") from None
            for values in (bound.arguments, *(bound.arguments.get(n, {}) for n in further)):
                values |= {
                    name: kinds[name](name, values[name]) for name in kinds if name in values
                }
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def renamed(old: str, new: str) -> Callable[[_F], _F]:
    """Decorates a function that still reads an argument's old name, with a FutureWarning."""

    def decorate(function: Any) -> Any:
        called = function.__qualname__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise ArgumentError(f"{called} got {new} and {old}, its old name; pass {new}.")
                notice = f"{called}: the argument {old} is now called {new}."
                warnings.warn(notice, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def check_name(called: str, name: str, known: Sequence[str]) -> None:
    """Refuse an argument's name that is not known.

    Raises:
      ArgumentError: with the names that there are, and one that may be meant.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? It" if near else "it"
        raise ArgumentError(f"{called} has no argument '{name}'; {hint} takes {', '.join(known)}.")


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python does not write numbers of more than 4300 digits.
        return super().repr_int(x, level) if x.bit_length() < 2048 else "a very large number"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, float | complex | bool | bytes | type | os.PathLike) or x is None:
            return super().repr_instance(x, level)
        if isinstance(shape := getattr(x, "shape", None), tuple):
            return f"an array of shape {shape} and dtype {getattr(x, 'dtype', 'unknown')}"
        return f"an object of type {type(x).__name__}"


def shown(value: Any) -> str:
    """A value in a sentence: short, and of an array its shape and dtype."""
    return _Shown().repr(scalar(value))


def one_of(value: Any, names: Collection[str | None]) -> bool:
    """Whether it is one of these strings, whatever it is."""
    return isinstance(value, str) and value in names


def scalar(value: Any) -> Any:
    """The plain value of a scalar of NumPy or JAX, or of an array without dims; others as is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def items(value: Any) -> list[Any] | None:
    """The items of a sequence or an array; None for anything else, text and bytes included."""
    if isinstance(value, str | bytes | bytearray | memoryview | type):
        return None
    if hasattr(value, "tolist") and getattr(value, "ndim", 1):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) else None


def that(takes: str, allowed: Callable[[Any], bool]) -> Kind:
    """What is allowed, as it is."""

    def read(value: Any) -> Any:
        if not allowed(value):
            raise Wrong
        return value

    return Kind(takes, read)


def instance(takes: str, cls: type) -> Kind:
    """Objects of a class."""
    return that(takes, lambda value: isinstance(value, cls))


def optional(kind: Kind) -> Kind:
    """None, or of the kind."""
    return Kind(f"None or {kind.takes}", lambda value: None if value is None else kind.read(value))


def whole(least: int, most: float | int = math.inf, takes: str = "") -> Kind:
    """Whole numbers of Python, NumPy or JAX."""

    def read(value: Any) -> int:
        value = scalar(value)
        if not _is_whole(value) or not least <= value <= most:
            raise Wrong
        return int(value)

    return Kind(takes or f"a whole number, {least} or more", read)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(takes: str, allowed: Callable[[float], bool]) -> Kind:
    """Numbers of Python, NumPy or JAX, as floats; `allowed` is false for NaN."""

    def read(value: Any) -> float:
        value = scalar(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Wrong
        try:
            value = float(value)
        except OverflowError:
            raise Wrong from None
        if not allowed(value):
            raise Wrong
        return value

    return Kind(takes, read)


def choice(*names: str) -> Kind:
    """One of these strings."""
    read = that("", lambda value: one_of(value, names)).read
    return Kind(f"one of {', '.join(names)}", read, verb="use")


def dtype(*names: str) -> Kind:
    """One of these dtypes, by name or as NumPy and JAX have them; read as its name."""
    named = choice(*names)

    def read(value: Any) -> str:
        import numpy as np

        return named.read(np.dtype(value).name if isinstance(value, type | np.dtype) else value)

    return dataclasses.replace(named, read=read)


def sequence(takes: str, *, least: int = 0, of: type = object) -> Kind:
    """At least so many items, all of a class; read as a list."""

    def read(value: Any) -> list[Any]:
        listed = items(value)
        if listed is None or len(listed) < least or not all(isinstance(x, of) for x in listed):
            raise Wrong
        return listed

    return Kind(takes, read)


def _flag(value: Any) -> bool:
    if not isinstance(value := scalar(value), bool):
        raise Wrong
    return value


def _is_path(value: Any) -> bool:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        return False
    try:
        os.lstat(os.path.expanduser(text))
    except (OSError, ValueError) as error:
        # What is not there may be made, or be a name on the Hub; what cannot be is no path.
        return not isinstance(error, ValueError) and error.errno != errno.ENAMETOOLONG
    return True


FLAG = Kind("True or False", _flag)
TEXT = that("a string", lambda value: isinstance(value, str))
PATH = that("a path", _is_path)
DIRECTORY = Kind(PATH.takes, lambda value: Path(PATH.read(value)))
FUNCTION = that("a function", callable)


# What conversions take alike.
FILES = {
    "source": PATH,
    "target": PATH,
    "revision": optional(TEXT),
    "progress": optional(FUNCTION),
}


def _token_ids(value: Any) -> list[int]:
    if (listed := items(value)) is None:
        raise Wrong
    if all(type(item) is int for item in listed):
        return listed
    ids = [scalar(item) for item in listed]
    for at, item in enumerate(ids):
        if not _is_whole(item):
            if items(item) is not None:
                raise Wrong(" has rows of token ids; pass one row, and call once for each.")
            raise Wrong(f"[{at}] is {shown(item)}; token ids are whole numbers.")
    return ids


def _vocabulary_ids(value: Any) -> list[int]:
    ids = _token_ids(value)
    for at, item in enumerate(ids):
        if not 0 <= item < 2**32:
            raise Wrong(f"[{at}] is {shown(item)}; token ids are from 0 to {2**32 - 1}.")
    return ids


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    chat = "it must be text or token ids. Of a chat's messages v4jax.encode_chat makes the text."
    if isinstance(value, Mapping):
        raise Wrong(f" is a dictionary; {chat}")
    first = next(iter(items(value) or ()), None)
    if isinstance(first, Mapping):
        raise Wrong(f" is a list of dictionaries; {chat}")
    if isinstance(first, str):
        raise Wrong(" is a list of texts; pass one text, and call once for each.")
    return _token_ids(value)


def _token_rows(value: Any) -> list[list[int]]:
    takes = " must be token ids [batch, length], neither 0"
    rows = items(value) or []
    if not rows or any(items(row) is None for row in rows) or not items(rows[0]):
        raise Wrong(f"{takes}; got {shown(value)}.")
    read: list[list[int]] = []
    for at, row in enumerate(rows):
        try:
            read.append(_token_ids(row))
        except Wrong as wrong:
            raise Wrong(f"[{at}]{wrong}") from None
        if len(read[at]) != len(read[0]):
            raise Wrong(
                f"{takes}; row 0 has {len(read[0])} and row {at} has {len(read[at])}: pass rows of "
                "one length together, and call once for each length."
            )
    return read


TOKEN_IDS = Kind("a list of token ids", _vocabulary_ids)
TOKEN_ROWS = Kind("token ids [batch, length]", _token_rows)
PROMPT = Kind("text or a list of token ids", _prompt)
