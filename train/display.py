"""A run on a terminal: one line that changes; elsewhere a line every few seconds."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_SECONDS = 10.0
_BARS, _WIDTH = "".join(map(chr, range(0x2581, 0x2589))), 24  # from one eighth of a block to all


def line(metrics: dict[str, Any]) -> str:
    """The metrics of a step in one line."""
    parts = [f"step {metrics['step']}/{metrics['steps']}", f"loss {metrics['loss']:.4f}"]
    if "mtp_loss" in metrics:
        parts.append(f"mtp {metrics['mtp_loss']:.4f}")
    parts += [
        f"gradient {metrics['gradient_norm']:.3g}",
        f"rate {metrics['rate']:.2e}",
        f"{metrics['tokens_per_second_per_device']:,.0f} tokens/s/device",
    ]
    if metrics["mfu"] is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if metrics["skipped"]:
        parts.append("NOT APPLIED: the loss or the gradient was wrong")
    return ", ".join(parts)


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

    def show(metrics: dict[str, Any]) -> None:
        nonlocal last
        if jax.process_index():
            return
        if terminal:
            losses.extend([] if metrics["skipped"] else [metrics["loss"]])
            text = f"{curve(losses)} {line(metrics)}"
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if now - last >= _SECONDS or metrics["step"] == metrics["steps"] or metrics["skipped"]:
            print(line(metrics), file=sys.stderr, flush=True)
            last = now

    try:
        yield show
    finally:
        if terminal:
            print(file=sys.stderr)
