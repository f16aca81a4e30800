"""Random chats, split and cut off anywhere. `python -m tests.test_chat_parser_fuzz N` reads N."""

import json
import random
import sys

from tests.test_chat_parser import CLOSE, OPEN, invoke, parameter
from v4jax.text.chat import DSML, END_THINK, EOS
from v4jax.text.chat_parser import ChatParser, collect

WORDS = ("a", "\n\n", "<", "</", "</think", '"', "}", "\u65e5\u672c", "\U0001f30d", "| DSML |", " ")
VALUES = ("3", "[1, 2]", '{"k": "<v>"}', "null", "True", "[1,", "1e999")


def text(draw: random.Random) -> str:
    return "".join(draw.choices(WORDS, k=draw.randrange(6)))


def calls(draw: random.Random) -> str:
    """A block of calls, in which some values are not the JSON that they should be."""
    invokes = []
    for _ in range(draw.randrange(1, 4)):
        strings = [parameter(f"s{i}", text(draw)) for i in range(draw.randrange(3))]
        values = [
            parameter(f"j{i}", draw.choice(VALUES), is_string=False)
            for i in range(draw.randrange(3))
        ]
        invokes.append(invoke("f", *strings, *values))
    return OPEN + "\n".join(invokes) + CLOSE


def chat(draw: random.Random) -> str:
    """An answer; its calls may be inside of reasoning that was never closed."""
    reasoning = text(draw) + draw.choice((END_THINK, END_THINK, ""))
    return reasoning + text(draw) + draw.choice((calls(draw), "")) + draw.choice((EOS, ""))


def check(draw: random.Random) -> None:
    """One chat, in pieces up to a random end: no marks are left, and arguments are an object."""
    whole = chat(draw)
    end = draw.randrange(len(whole) + 1) if draw.random() < 0.7 else len(whole)
    parser, events, at = ChatParser("thinking"), [], 0
    while at < end:
        size = draw.choice((1, 2, 3, 8, 40))
        events += parser.feed(whole[at : min(at + size, end)])
        at += size
    message = collect([*events, *parser.finish()])
    arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
    seen = (message["content"], message["reasoning_content"], *arguments)
    assert not any(DSML in part or EOS in part for part in seen), (whole, end)
    assert all(isinstance(json.loads(part), dict) for part in arguments), (whole, end)


def test_marks_never_reach_content_or_arguments() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        check(draw)


if __name__ == "__main__":
    draw = random.Random()
    for _ in range(int(sys.argv[1])):
        check(draw)
