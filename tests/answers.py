"""Answers of a model, as texts to be served and as updates to be written, and wrong requests."""

from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.test_chat_parser import CLOSE, OPEN, invoke, parameter
from v4jax.engine.request import Token, Usage
from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from v4jax_serve.conversation import Delta, Update

CITY = "Z\u00fcrich"
CALL = f"{OPEN}{invoke('weather', parameter('city', CITY))}{CLOSE}"
USAGE = Usage(prompt_tokens=300, cached_tokens=256, completion_tokens=7)


def script(prompt: str) -> str:
    """Thinking and text, with a call if there are tools and no results yet."""
    call = CALL if "city" in prompt and "<tool_result>" not in prompt else ""
    return f"I think.</think>So be it.{call}"


def updates(deltas: Iterable[Sequence[Delta]], finish: str = "stop") -> list[Update]:
    """An answer after a sign of life, with these deltas in each update."""
    alive = Update((), (), 0, None, Usage(), 0)
    parts = [Update(tuple(part), (Token(1, -0.5),), 0, None, USAGE, 3) for part in deltas]
    return [alive, *parts, Update((), (), 0, finish, USAGE, 3)]


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[list[Delta]], str]:
    """Arguments of `updates`: any answer, in any parts."""
    deltas: list[Delta] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from([ReasoningDelta, ContentDelta, None]))):
        characters = 'a\n"\\\u00e9\U0001f30d'
        pieces = draw(st.lists(st.text(characters, min_size=1), min_size=1, max_size=3))
        if kind is None:
            deltas.append(ToolCallStart(calls, f"call_{calls}", "weather"))
            texts = ['{"city": ', '"Paris"', "}"] if len(pieces) == 3 else ["{}"]
            deltas += [ArgumentsDelta(calls, text) for text in texts]
            calls += 1
        else:
            deltas += [kind(text=text) for text in pieces]
    cuts = draw(st.sets(st.integers(1, max(1, len(deltas) - 1))))
    ends = [*sorted(cuts), len(deltas)]
    parts = [deltas[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    finish = draw(st.sampled_from(["stop", "length"]))
    return [part for part in parts if part], "tool_calls" if calls else finish


def bodies(*words: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of requests in which these words are fields and values, at any place."""
    names = st.sampled_from([*words, *("type", "text", "role", "content", "name", "format")])
    leaves = st.none() | st.booleans() | st.integers(-1, 2) | names
    nest = lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=3)
    values = st.recursive(leaves, nest, max_leaves=12)
    return st.dictionaries(names, values, max_size=6)
