"""Progress of a run: on a terminal one changing line, elsewhere a line every few seconds."""

import contextlib
import datetime
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_SECONDS = 10.0
_BARS = "".join(map(chr, range(0x2581, 0x2589)))  # from one eighth of a block to a full one
_LEAST, _WIDTH = 8, 24  # columns of the curve of losses


def parts(metrics: dict[str, Any], left: float | None = None) -> list[str]:
    """The metrics of a step as texts, most important first.

    Args:
      metrics: metrics from `loop`.
      left: seconds to the end of the run; None: unknown.
    """
    texts = [f"step {metrics['step']}/{metrics['steps']}"]
    if metrics["skipped"]:
        texts.append("NOT APPLIED: bad loss or gradient")
    if left is not None:
        texts.append(f"{datetime.timedelta(seconds=round(left))} left")
    texts.append(f"loss {metrics['loss']:.4f}")
    if "mtp_loss" in metrics:
        texts.append(f"mtp {metrics['mtp_loss']:.4f}")
    texts += [
        f"{metrics['tokens_per_second_per_device']:,.0f} tokens/s/device",
        f"gradient {metrics['gradient_norm']:.3g}",
        f"rate {metrics['rate']:.2e}",
    ]
    if metrics["mfu"] is not None:
        texts.append(f"MFU {metrics['mfu']:.1%}")
    return texts


def fitted(texts: Sequence[str], losses: Sequence[float], columns: int) -> str:
    """Losses as bars, and as many of the texts as fit next to them on a line of a terminal."""
    # Some terminals start a new line when the last column is filled.
    room = max(columns - 1, 0)
    heads = (", ".join(texts[:count]) for count in range(len(texts), 0, -1))
    text = next((head for head in heads if len(head) < room - _LEAST), texts[0][:room])
    width = min(_WIDTH, room - len(text) - 1)
    return f"{curve(losses, width)} {text}" if losses and width >= _LEAST else text


class Remaining:
    """The remaining time of a run, estimated from the speed since the first step shown."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds(self, metrics: dict[str, Any]) -> float | None:
        """Seconds from this step to the last; None for the first step shown."""
        now = time.monotonic()
        if self._first is None:
            self._first = metrics["step"], now
            return None
        step, began = self._first
        return (now - began) / (metrics["step"] - step) * (metrics["steps"] - metrics["step"])


def curve(values: Sequence[float], width: int = _WIDTH) -> str:
    """Numbers as a row of bars, the lowest for the smallest."""
    if not values:
        return ""
    width = min(width, len(values))
    bins = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in bins]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


@contextlib.contextmanager
def live() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function for `loop` to call with metrics; the first process shows them on stderr."""
    import jax

    terminal = sys.stderr.isatty()
    last = 0.0
    losses: list[float] = []
    remaining = Remaining()

    def show(metrics: dict[str, Any]) -> None:
        nonlocal last
        if jax.process_index():
            return
        texts = parts(metrics, remaining.seconds(metrics))
        if terminal:
            losses.extend([] if metrics["skipped"] else [metrics["loss"]])
            text = fitted(texts, losses, _columns())
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if now - last >= _SECONDS or metrics["step"] == metrics["steps"] or metrics["skipped"]:
            print(", ".join(texts), file=sys.stderr, flush=True)
            last = now

    try:
        yield show
    finally:
        if terminal:
            print(file=sys.stderr)


def _columns() -> int:
    """The width of the terminal on standard error; standard output may be another one."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return columns or shutil.get_terminal_size().columns
