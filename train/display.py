"""A run on a terminal: one line that changes; elsewhere a line every few seconds."""

import contextlib
import datetime
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_SECONDS = 10.0
_BARS = "".join(map(chr, range(0x2581, 0x2589)))  # from one eighth of a block to all
_LEAST, _WIDTH = 8, 24


def parts(metrics: dict[str, Any], left: float | None = None) -> list[str]:
    """The metrics of a step, what matters most first.

    Args:
      metrics: as `loop` tells them.
      left: seconds to the end of the run, where that is known.
    """
    found = [f"step {metrics['step']}/{metrics['steps']}"]
    if metrics["skipped"]:
        found.append("NOT APPLIED: the loss or the gradient was wrong")
    if left is not None:
        found.append(f"{datetime.timedelta(seconds=round(left))} left")
    found.append(f"loss {metrics['loss']:.4f}")
    if "mtp_loss" in metrics:
        found.append(f"mtp {metrics['mtp_loss']:.4f}")
    found += [
        f"{metrics['tokens_per_second_per_device']:,.0f} tokens/s/device",
        f"gradient {metrics['gradient_norm']:.3g}",
        f"rate {metrics['rate']:.2e}",
    ]
    if metrics["mfu"] is not None:
        found.append(f"MFU {metrics['mfu']:.1%}")
    return found


def fitted(found: Sequence[str], losses: Sequence[float], columns: int) -> str:
    """Losses as bars, and as many of the parts as fit beside them on a line of a terminal."""
    # Some terminals begin a new line when the last column is filled.
    room = max(columns - 1, 0)
    heads = (", ".join(found[:count]) for count in range(len(found), 0, -1))
    text = next((head for head in heads if len(head) < room - _LEAST), found[0][:room])
    width = min(_WIDTH, room - len(text) - 1)
    return f"{curve(losses, width)} {text}" if losses and width >= _LEAST else text


class Remaining:
    """How long a run will take, by the time that its steps took since the first that was told."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds(self, metrics: dict[str, Any]) -> float | None:
        """From this step to the last; None of the first."""
        now = time.monotonic()
        if self._first is None:
            self._first = metrics["step"], now
            return None
        step, began = self._first
        return (now - began) / (metrics["step"] - step) * (metrics["steps"] - metrics["step"])


def curve(values: Sequence[float], width: int = _WIDTH) -> str:
    """Numbers as a row of bars, the smallest the lowest."""
    if not values:
        return ""
    width = min(width, len(values))
    cut = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in cut]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


@contextlib.contextmanager
def live() -> Iterator[Callable[[dict[str, Any]], None]]:
    """What `loop` tells its metrics to; the first process shows them on standard error."""
    import jax

    terminal = sys.stderr.isatty()
    last = 0.0
    losses: list[float] = []
    remaining = Remaining()

    def show(metrics: dict[str, Any]) -> None:
        nonlocal last
        if jax.process_index():
            return
        found = parts(metrics, remaining.seconds(metrics))
        if terminal:
            losses.extend([] if metrics["skipped"] else [metrics["loss"]])
            text = fitted(found, losses, _columns())
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if now - last >= _SECONDS or metrics["step"] == metrics["steps"] or metrics["skipped"]:
            print(", ".join(found), file=sys.stderr, flush=True)
            last = now

    try:
        yield show
    finally:
        if terminal:
            print(file=sys.stderr)


def _columns() -> int:
    """Of the terminal that standard error is, which standard output need not be."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return columns or shutil.get_terminal_size().columns
