"""Options that `v4jax generate` has, and what their values may be."""

import argparse
from collections.abc import Callable
from typing import Any


def add_chat_options(group: Any) -> None:
    """How a prompt becomes a conversation."""
    group.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    group.add_argument("--system", metavar="TEXT", help="a system message before it; means --chat")
    group.add_argument(
        "--thinking",
        choices=("off", "low", "high", "max"),
        default="off",
        help="reason before answering, and how hard (default: off); unless off it means --chat; "
        "checkpoints before 0731 have no low",
    )


def add_sampling_options(group: Any) -> None:
    """How tokens are chosen."""
    add = group.add_argument
    positive = _number("above 0, at most 1", lambda x: 0 < x <= 1)
    temperature = _number("0 or more", lambda x: 0 <= x < 1e38)
    add("--temperature", type=temperature, default=1.0, metavar="X", help="0 is greedy (1)")
    add("--top-p", type=positive, default=1.0, metavar="X", help="least likely tokens go (1: none)")
    add("--top-k", type=whole(0), default=0, metavar="N", help="choose among N tokens (0: all)")
    add("--seed", type=whole(0), metavar="N", help="the same seed, the same text")


def add_running_options(group: Any) -> None:
    """How the model is held and run."""
    add = group.add_argument
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of weights, activations and cache (default: bfloat16)",
    )
    add(
        "--numerics",
        choices=("official", "hf"),
        default="official",
        help="round where DeepSeek's runtime does (default) or where transformers does",
    )
    mesh = "spread the model over all devices, as in tensor=4 or expert=4,tensor=2; axes: data, "
    add("--mesh", metavar="SIZES", help=mesh + "fsdp, expert, tensor (default: the first device)")
    adapter = "a PEFT adapter, a Hub id of one, or a training run, to run it with"
    add("--adapter", metavar="DIR", help=adapter)
    add("--state", type=whole(1), metavar="STEP", help="of that run, not the newest state")
    add(
        *("--keep-quantised", "--keep"),
        action="store_true",
        help="hold FP8 and FP4 weights as they are: less memory",
    )


def whole(least: int) -> Callable[[str], int]:
    """Reads whole numbers, `least` or more."""

    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number, {least} or more")
        return value

    return parse


def _number(says: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"'{text}' is no number {says}")
        return value

    return parse
