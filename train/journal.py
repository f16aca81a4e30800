"""What a run says of itself: JSON lines in `metrics.jsonl`, and where its time went."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4jax.text_files import read_text

FILE, BOARD = "metrics.jsonl", "tensorboard"


class Journal:
    """The file of one run. Only the first process of several writes it."""

    def __init__(
        self, directory: Path, *, after: int = 0, write: bool = True, tensorboard: bool = False
    ) -> None:
        """Open the file, without what an interrupted run wrote of steps past `after`.

        Args:
          directory: of the run.
          after: the last step that is kept.
          write: False: do nothing, now and later.
          tensorboard: write numbers in TensorBoard's format too, in the directory `tensorboard`.

        Raises:
          ModuleNotFoundError: tensorboardX is missing.
        """
        self._file = self._board = None
        if not write:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / BOARD), purge_step=after + 1)
        path = directory / FILE
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= after]
        # Beside the old one, which stays whole if this is interrupted.
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        shorter.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line; what JSON cannot hold, such as NaN, is written as null."""
        if self._file is not None:
            line = {"kind": kind, "step": step, **{k: _plain(v) for k, v in values.items()}}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the file."""
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()


def read(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind.

    Raises:
      ValueError: there is no such file.
    """
    path = directory / FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give the directory of a run.")
    found = [json.loads(line) for line in _lines(path)]
    return [line for line in found if line["kind"] == kind]


def _lines(path: Path) -> list[str]:
    """The whole lines of a file: a run that was killed may leave a part of one."""
    if not path.is_file():
        return []
    return [line for line in read_text(path).split("\n")[:-1] if line]


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | list | dict | int | None):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


class Clock:
    """Seconds of a run by what they were spent on: steps are good, all else is not."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Count what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    @property
    def goodput(self) -> float:
        """Share of the time since the beginning that was spent on steps."""
        return self.seconds.get("step", 0.0) / max(time.perf_counter() - self._began, 1e-9)
