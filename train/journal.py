"""The journal of a run: JSON lines in `metrics.jsonl`, and a clock of where its time went."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4jax.checkpoints.disk import write_file

FILE, BOARD = "metrics.jsonl", "tensorboard"


class Journal:
    """The journal of one run. With several processes only the first writes it."""

    def __init__(
        self, directory: Path, *, after: int = 0, write: bool = True, tensorboard: bool = False
    ) -> None:
        """Open the file, and drop lines of an interrupted run about steps past `after`.

        Args:
          directory: directory of the run.
          after: last step to keep.
          write: False: the journal does nothing.
          tensorboard: also write numbers in TensorBoard's format, to the directory `tensorboard`.

        Raises:
          ModuleNotFoundError: tensorboardX is missing.
        """
        self._file = self._board = None
        self.lost = 0.0  # seconds of the dropped steps
        if not write:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / BOARD), purge_step=after + 1)
        self._path = directory / FILE
        lines = []
        for line, values in _lines(self._path):
            if values["step"] <= after:
                lines.append(line)
            elif values["kind"] == "step":
                self.lost += values.get("seconds") or 0.0
        write_file(self._path, "".join(f"{line}\n" for line in lines).encode())
        # Unbuffered: data that did not fit on the disk must not be written again later.
        self._file = self._path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line; values that JSON cannot represent, such as NaN, become null."""
        if self._file is not None:
            line = {"kind": kind, "step": step, **{k: _plain(v) for k, v in values.items()}}
            self._append(f"{json.dumps(line, allow_nan=False)}\n".encode())
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file."""
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()


def read(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The values of the lines of one kind.

    Raises:
      ValueError: there is no journal, or it has an invalid line.
    """
    path = directory / FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give the directory of a run.")
    return [values for _, values in _lines(path) if values["kind"] == kind]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """A file's complete lines with their values; a killed run may leave a partial last line."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [
        (line.decode(errors="replace"), _parse(line, f"{path}:{number}"))
        for number, line in enumerate(lines, 1)
        if line
    ]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        if isinstance(values["kind"], str) and isinstance(values["step"], int):
            return values
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{where}: is not a line of metrics; remove it.")


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | list | dict | int | None):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


class Clock:
    """A run's time by activity; goodput is the fraction spent on steps."""

    def __init__(self) -> None:
        self._began, self._time = time.perf_counter(), time.time()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Count the time inside the context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    @property
    def goodput(self) -> float:
        """Fraction of the time since the start that was spent on steps."""
        return self.seconds.get("step", 0.0) / max(time.perf_counter() - self._began, 1e-9)

    def report(self) -> dict[str, Any]:
        """When the clock was started, the time now, and the seconds by activity."""
        ended = self._time + time.perf_counter() - self._began
        seconds = {what: round(value, 3) for what, value in self.seconds.items()}
        return {"began": round(self._time, 3), "ended": round(ended, 3), "seconds": seconds}
