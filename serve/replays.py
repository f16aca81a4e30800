"""The tokens that the model sampled for its tool calls, to be replayed when they come back.

Written again from the parsed call, the same call can have other tokens (blanks, escapes, the order
of keys), and the prefix cache would miss from there on.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TOKENS = 8 * 2**20  # of all turns together


@dataclasses.dataclass(frozen=True)
class Turn:
    """An assistant's turn as it was sampled.

    Attributes:
      message: the message that clients got.
      reasoning: tokens of its thinking, `</think>` included.
      answer: tokens of its content and calls, the end of the sentence included.
    """

    message: Mapping[str, Any]
    reasoning: Sequence[int]
    answer: Sequence[int]


class Replays:
    """Turns by the id of their first call; the least recently used are dropped."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._turns: collections.OrderedDict[str, Turn] = collections.OrderedDict()
        self._tokens, self._max_tokens = 0, max_tokens

    def keep(self, turn: Turn) -> None:
        """Remember a turn that has calls."""
        self._turns[turn.message["tool_calls"][0]["id"]] = turn
        self._tokens += _size(turn)
        while self._tokens > self._max_tokens:
            _, oldest = self._turns.popitem(last=False)
            self._tokens -= _size(oldest)

    def find(self, message: Mapping[str, Any]) -> Turn | None:
        """The turn that a client sends back, if nothing in it was changed.

        Reasoning that the client does not send back counts as unchanged.
        """
        calls = message.get("tool_calls") or [{}]
        turn = self._turns.get(calls[0].get("id", ""))
        if turn is None or _same_calls(turn.message["tool_calls"], calls) is False:
            return None
        reasoning = message.get("reasoning_content") or turn.message["reasoning_content"]
        same_text = (message.get("content") or "") == turn.message["content"]
        if not same_text or reasoning != turn.message["reasoning_content"]:
            return None
        self._turns.move_to_end(calls[0]["id"])
        return turn


def _size(turn: Turn) -> int:
    return len(turn.reasoning) + len(turn.answer)


def _same_calls(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    def parts(call: Any) -> Any:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        return call.get("id"), function["name"], arguments

    try:
        return [*map(parts, ours)] == [*map(parts, theirs)]
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
