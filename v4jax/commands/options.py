"""Options that commands share, and what their values may be."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_chat_options(group: Any) -> None:
    """Add how a prompt becomes a conversation."""
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
    """Add how long a text is and how its tokens are chosen."""
    add = group.add_argument
    number = lambda name, default, allowed, help: add(
        name,
        type=_number(*allowed),
        default=default,
        metavar="X",
        help=f"{help} (default: {default:g})",
    )
    share = "above 0, at most 1", lambda x: 0 < x <= 1
    penalty = "from -2 to 2", lambda x: -2 <= x <= 2
    add(
        "--max-tokens",
        type=whole(1),
        default=256,
        metavar="N",
        help="most new tokens (default: 256)",
    )
    stop = "end the text before this string; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=stop)
    number("--temperature", 1.0, ("of 0 or more", lambda x: 0 <= x < 1e38), "0 is greedy")
    number("--top-p", 1.0, share, "sample from the likeliest tokens of this total probability")
    add(
        "--top-k",
        type=whole(0),
        default=0,
        metavar="N",
        help="sample from the N likeliest tokens (default: 0, all)",
    )
    likely = "sample from tokens at least this likely, relative to the likeliest"
    number("--min-p", 0.0, ("from 0 to 1", lambda x: 0 <= x <= 1), likely)
    repeated = "divide logits of tokens that have occurred by this; 1 is off"
    number("--repetition-penalty", 1.0, ("above 0", lambda x: 1e-30 < x < 1e38), repeated)
    number("--presence-penalty", 0.0, penalty, "subtract this from logits of generated tokens")
    number("--frequency-penalty", 0.0, penalty, "subtract this each time one was generated")
    add("--seed", type=whole(0), metavar="N", help="the same seed gives the same text")


def add_running_options(group: Any) -> None:
    """Add how the model is loaded and run."""
    add = group.add_argument
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of weights, activations and cache (default: bfloat16)",
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
    add("--state", type=whole(1), metavar="STEP", help="state of that run, not the newest")
    add(
        *("--keep-quantised", "--keep"),
        action="store_true",
        help="hold FP8 and FP4 weights as they are: less memory",
    )


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add which revision of a Hub id is meant."""
    text = "branch, tag or commit of a Hub id (default: the main branch)"
    parser.add_argument("--revision", metavar="NAME", help=text)


def add_no_cache(parser: argparse.ArgumentParser) -> None:
    """Add whether compiled programs are kept; see `apply_no_cache`."""
    text = "compile again, and keep no compiled program (default: in the user's cache directory)"
    parser.add_argument("--no-cache", action="store_true", help=text)


def apply_no_cache(args: argparse.Namespace) -> None:
    """Turn off `v4jax.programs`, if that was asked for."""
    if args.no_cache:
        os.environ["V4JAX_CACHE"] = "off"


def run_state(run: str | Path | None, step: int | None) -> Path | str | None:
    """The path of a training run, or of its state after a step.

    Raises:
      ValueError: there is a step and no run.
    """
    if step is None:
        return run
    if run is None:
        raise ValueError("--state is of a training run; name one by --adapter.")
    from v4jax.adapters.runs import STATES

    return Path(run) / STATES / str(step)


def whole(least: int) -> Callable[[str], int]:
    """Reads whole numbers, `least` or more."""

    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of {least} or more")
        return value

    return parse


def _number(says: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {says}")
        return value

    return parse
