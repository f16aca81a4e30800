"""Find the marks of tool calls in model output of which more may come.

A space in a mark stands for any number of blanks, or none: the model writes some before `>`.
"""

import json
import re
from typing import Literal

from v4jax.text.chat import DSML

OPEN_CALLS, CLOSE_CALLS = f"<{DSML}tool_calls >", f"</{DSML}tool_calls >"
OPEN_INVOKE, CLOSE_INVOKE = f'<{DSML}invoke name = "', f"</{DSML}invoke >"
OPEN_PARAMETER, CLOSE_PARAMETER = f'<{DSML}parameter name = "', f"</{DSML}parameter >"
# Ends of the opening tags of a call and of a parameter.
NAMED = '" >'
STRING, JSON = '" string = "true" >', '" string = "false" >'
BLANK = " \t\r\n"
_BLANKS = frozenset(BLANK)


def _end(mark: str, text: str, at: int) -> int | Literal["absent", "cut"]:
    """End of the mark that begins at `at`; "cut" if the text ends before that is certain."""
    for char in mark:
        if char == " ":
            while text[at : at + 1] in _BLANKS:
                at += 1
        elif at == len(text):
            return "cut"
        elif text[at] != char:
            return "absent"
        else:
            at += 1
    return at


def find(text: str, *marks: str) -> tuple[int, str, int]:
    """The first mark in the text: its start, which mark it is, and its end.

    The mark is "" if the end of the text cuts it off, or if there is none. All marks must begin
    with "<" and have no other "<".
    """
    at = text.find("<")
    while at >= 0:
        for mark in marks:
            end = _end(mark, text, at)
            if end == "cut":
                return at, "", at
            if end != "absent":
                return at, mark, end
        at = text.find("<", at + 1)
    return len(text), "", len(text)


def head(text: str, *marks: str) -> tuple[str | None, int]:
    """The mark that the text begins with, "" if none, and its end; None if more may form one."""
    ends = {mark: _end(mark, text, 0) for mark in marks}
    for mark, end in ends.items():
        if isinstance(end, int):
            return mark, end
    return (None if "cut" in ends.values() else ""), 0


def attribute(
    text: str, at: int, ends: tuple[str, ...], *, barred: tuple[str, ...]
) -> tuple[str, str, int] | None:
    """The text from `at` to the first of `ends`, which of them it is, and its end.

    Returns:
      That; ("", "", at) if one of `barred` comes first; None if neither has come yet.
    """
    for place in re.finditer("|".join(map(re.escape, ('"', *barred))), text[at:]):
        if place[0] in barred:
            return "", "", at
        here = at + place.start()
        for mark in ends:
            end = _end(mark, text, here)
            if end == "cut":
                return None
            if end != "absent":
                return text[at:here], mark, end
    return None


def is_json(text: str) -> bool:
    """Whether a text is a JSON value that can be written as JSON again: no NaN, no overflow."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True
