"""Where a run's time went, over all its starts."""

from pathlib import Path
from typing import Any

from . import journal
from .journal import Clock, Journal

_KIND = "time"
# Parts of the time, and what they are called. The rest is small, or the time between two starts.
_PARTS = {
    "step": "steps",
    "load": "loading",
    "compile": "compilation",
    "data": "data",
    "checkpoint": "saving and restoring",
    "evaluation": "evaluation",
    "lost": "steps done again",
}


def write(run: Journal, step: int, clock: Clock) -> None:
    """Add where the time since this start of a run went, up to a step."""
    run.write(_KIND, step, start=clock.report())


def read(directory: Path) -> dict[str, float]:
    """A run's seconds by part, `other` among them; empty if none are known.

    What happened after the state that a run continued from is part of `lost`, as far as steps
    had ended, and of `other`.
    """
    lines: list[dict[str, Any]] = [line["start"] for line in journal.read(directory, _KIND)]
    starts = {line["began"]: line for line in lines}
    if not starts:
        return {}
    total = max(line["ended"] for line in lines) - min(starts)
    seconds: dict[str, float] = {
        part: sum(line["seconds"].get(part, 0.0) for line in starts.values()) for part in _PARTS
    }
    return seconds | {"other": max(total - sum(seconds.values()), 0.0)}


def text(seconds: dict[str, float]) -> str:
    """The parts as a sentence, the steps first."""
    total = sum(seconds.values())
    share = lambda part: f"{seconds[part] / total:.1%}"
    others = sorted(seconds.keys() - {"step"}, key=lambda part: -seconds[part])
    rest = [f"{_PARTS.get(part, part)} {share(part)}" for part in others if seconds[part] > 0]
    return f"Goodput {share('step')} of {total:,.0f} s; {', '.join(rest)}."
