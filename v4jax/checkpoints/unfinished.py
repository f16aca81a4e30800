"""Directories and files that appear when complete; directories resume where a run stopped.

`target` is made as `target.unfinished/result`, beside a journal of the parts that are done. Nothing
that looks finished exists before the last step, which is a rename.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from v4jax.checkpoints.disk import CheckpointError, sync_directory

_SUFFIX = ".unfinished"
_JOURNAL, _RESULT = "journal.jsonl", "result"
# A part is on the disk before its line is written, so a lost line costs only doing it again.
_SYNC_EVERY = 64


class Work:
    """A directory in the making.

    Attributes:
      directory: write here; `finish` renames it to the target.
      done: the names given to `add`, by this run or those before it.
    """

    def __init__(self, target: Path, journal: IO[bytes], done: set[str]) -> None:
        self.directory = scratch(target) / _RESULT
        self.done = done
        self._target, self._journal = target, journal

    def add(self, name: str) -> None:
        """Note that a part is finished and on the disk."""
        self._journal.write(json.dumps(name).encode() + b"\n")
        self._journal.flush()
        self.done.add(name)
        if len(self.done) % _SYNC_EVERY == 0:
            os.fsync(self._journal.fileno())

    def finish(self) -> None:
        """Make the directory appear under its name."""
        # It takes files as well.
        for path in (self.directory, *self.directory.iterdir()):
            sync_directory(path)
        self.directory.replace(self._target)
        sync_directory(self._target.parent)
        _remove(scratch(self._target))


def scratch(target: Path) -> Path:
    """Where all that belongs to an unfinished `target` lies."""
    return target.with_name(target.name + _SUFFIX)


def check_target(target: Path, *sources: Path) -> None:
    """Raise unless a directory can be made under the name, outside of all that it is made from.

    Raises:
      CheckpointError: there is something under the name already, or it would lie in a source.
    """
    _clear(target)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists; choose another place, or remove it first.")
    real = Path(os.path.realpath(target))
    for source in sources:
        # The same folder may have several names, by links and by mounts.
        if any(folder.exists() and folder.samefile(source) for folder in (real, *real.parents)):
            raise CheckpointError(f"{target}: lies in {source}; choose a place outside of it.")


def refuse_unfinished(directory: Path) -> None:
    """Raise if the directory is what an interrupted run left."""
    _clear(directory)
    for folder in (directory, directory.parent):
        if folder.name.endswith(_SUFFIX) and (folder / _JOURNAL).is_file():
            raise CheckpointError(
                f"{directory}: is unfinished; run the command that was making "
                f"{folder.name.removesuffix(_SUFFIX)} again to complete it."
            )


def _clear(target: Path) -> None:
    """Remove what is left of a run that was killed when the directory had appeared already."""
    folder = scratch(Path(os.path.abspath(target)))
    journal = folder / _JOURNAL
    if not journal.is_file() or (folder / _RESULT).exists() or not target.is_dir():
        return
    # It may be someone else's to remove, or not be in our power.
    with contextlib.suppress(CheckpointError, OSError), journal.open("a+b") as file:
        lock(file, folder)
        if any(target.iterdir()):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a scratch directory; its journal last, which tells whose it is."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _JOURNAL:
            path.unlink()
    shutil.rmtree(folder)


@contextlib.contextmanager
def begin(target: Path, what: str, identity: str) -> Iterator[Work]:
    """Start making `target`, or go on where an interrupted run of the same kind stopped.

    Where such a run had no part done, all is begun anew.

    Args:
      target: an absolute path, to be made; an empty directory may be there.
      what: the command, for messages and so that commands do not take up each other's work.
      identity: a digest of everything that the result depends on.

    Raises:
      CheckpointError: the target exists, another process is at work on it, or what is there was
        begun from other files or with other settings.
    """
    check_target(target)
    folder = scratch(target)
    journal = folder / _JOURNAL
    if folder.exists() and not journal.is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is in the way and not from {what}; move it elsewhere.")
    folder.mkdir(parents=True, exist_ok=True)
    with journal.open("a+b") as file:
        lock(file, folder)
        done = _resume(file, folder, {"v4jax": what, "identity": identity})
        work = Work(target, file, done)
        if not done and work.directory.exists():
            shutil.rmtree(work.directory)
        work.directory.mkdir(exist_ok=True)
        try:
            yield work
        except BaseException:
            if not work.done:
                _remove(folder)
            raise


def lock(file: IO[bytes], folder: Path) -> None:
    """Refuse to work in a folder where another process has locked the file; it ends with that.

    Raises:
      CheckpointError: another process is at work.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{folder}: another process is at work there; wait for it."
        ) from error


def _resume(file: IO[bytes], folder: Path, header: dict[str, Any]) -> set[str]:
    file.seek(0)
    # A line that was cut off has no end; what it was about is done again.
    lines = [line for line in file if line.endswith(b"\n")]
    if len(lines) < 2:
        file.truncate(0)
        file.write(json.dumps(header).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        sync_directory(folder)
        return set()
    file.truncate(sum(map(len, lines)))
    try:
        found, *done = map(json.loads, lines)
    except ValueError as error:
        raise CheckpointError(f"{folder / _JOURNAL}: is damaged; remove {folder}.") from error
    if found != header:
        raise CheckpointError(
            f"{folder}: was begun from other files or with other settings. Give the same source "
            "and options to go on there, or remove it to start anew."
        )
    return set(done)
