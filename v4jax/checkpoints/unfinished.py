"""Directories that appear when complete, and resume where an interrupted run stopped.

`target` is built as `target.unfinished/result`, next to a journal of the parts that are done.
Nothing looks finished before the last step, which is a rename. Several processes, on hosts that see
the same files, can build one directory: each has a journal, and the first one begins and finishes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from v4jax.checkpoints.disk import CheckpointError, sync_directory
from v4jax.checkpoints.hosts import Team

_SUFFIX = ".unfinished"
_JOURNAL, _RESULT = "journal.jsonl", "result"
# A part is on disk before its line is written, so a lost line only means doing it again.
_SYNC_EVERY = 64
_ALONE = Team()


class Work:
    """An unfinished directory.

    Attributes:
      directory: the directory to write in; `finish` renames it to the target.
      done: names passed to `add`, in this run by this process, or in earlier ones.
      team: the processes that write in it.
    """

    def __init__(
        self, target: Path, journal: IO[bytes], done: set[str], team: Team = _ALONE
    ) -> None:
        self.directory = scratch(target) / _RESULT
        self.done, self.team = done, team
        self._target, self._journal = target, journal

    def add(self, name: str) -> None:
        """Record that a part is finished and on disk."""
        self._journal.write(json.dumps(name).encode() + b"\n")
        self._journal.flush()
        self.done.add(name)
        if len(self.done) % _SYNC_EVERY == 0:
            os.fsync(self._journal.fileno())

    def finish(self) -> None:
        """Make the directory appear under its name; every process of the team calls it."""
        with self.team.together():
            if self.team.index:
                self._journal.close()
        self.team.first(self._finish)

    def _finish(self) -> None:
        # sync_directory takes files as well.
        for path in (self.directory, *self.directory.iterdir()):
            sync_directory(path)
        self.directory.replace(self._target)
        sync_directory(self._target.parent)
        _remove(scratch(self._target))


def scratch(target: Path) -> Path:
    """The directory of everything that belongs to an unfinished `target`."""
    return target.with_name(target.name + _SUFFIX)


def check_target(target: Path, *sources: Path) -> None:
    """Raise unless `target` can be created, outside of all its sources.

    Raises:
      CheckpointError: the target exists and is not an empty directory, or it is inside a source.
    """
    _clear(target)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists; choose another place, or remove it first.")
    real = Path(os.path.realpath(target))
    for source in sources:
        # Links and mounts can give the same folder several names.
        if any(folder.exists() and folder.samefile(source) for folder in (real, *real.parents)):
            raise CheckpointError(f"{target}: is inside {source}; choose a place outside of it.")


def refuse_unfinished(directory: Path) -> None:
    """Raise if an interrupted run left this directory."""
    _clear(directory)
    for folder in (directory, directory.parent):
        if folder.name.endswith(_SUFFIX) and (folder / _JOURNAL).is_file():
            raise CheckpointError(
                f"{directory}: is unfinished; to complete it, rerun the command that was "
                f"writing {folder.name.removesuffix(_SUFFIX)}."
            )


def _clear(target: Path) -> None:
    """Remove what is left of a run that was killed after its directory had appeared."""
    folder = scratch(Path(os.path.abspath(target)))
    journal = folder / _JOURNAL
    if not journal.is_file() or (folder / _RESULT).exists() or not target.is_dir():
        return
    # Another process may be removing it, or we may lack permission.
    with contextlib.suppress(CheckpointError, OSError), journal.open("a+b") as file:
        lock(file, folder)
        if any(target.iterdir()):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a scratch directory; last its journal, which identifies it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _JOURNAL:
            path.unlink()
    shutil.rmtree(folder)


@contextlib.contextmanager
def begin(target: Path, what: str, identity: str, team: Team = _ALONE) -> Iterator[Work]:
    """Start writing `target`, or resume where an interrupted run of the same kind stopped.

    If that run had finished no part, everything starts again.

    Args:
      target: absolute path of the directory to create; may exist if empty.
      what: the command, for messages and so that commands do not resume each other's work.
      identity: digest of everything that the result depends on.
      team: the processes that do this together; each calls this function.

    Raises:
      CheckpointError: the target exists, another process is working on it, or the unfinished run
        had other files or settings.
    """
    with contextlib.ExitStack() as opened:
        work = None
        with team.together():
            if team.index == 0:
                work = opened.enter_context(_begin(target, what, identity, team))
        with team.together():
            if work is None:
                work = opened.enter_context(_join(target, team))
        assert work is not None
        yield work


@contextlib.contextmanager
def _begin(target: Path, what: str, identity: str, team: Team) -> Iterator[Work]:
    check_target(target)
    folder = scratch(target)
    journal = folder / _JOURNAL
    if folder.exists() and not journal.is_file() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder}: is in the way, and {what} did not create it; move it elsewhere."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with journal.open("a+b") as file:
        lock(file, folder)
        done = _resume(file, folder, {"v4jax": what, "identity": identity})
        work = Work(target, file, done, team)
        if not done and work.directory.exists():
            shutil.rmtree(work.directory)
        work.directory.mkdir(exist_ok=True)
        try:
            yield work
        except BaseException:
            if not work.done and not _others(folder):
                _remove(folder)
            raise


@contextlib.contextmanager
def _join(target: Path, team: Team) -> Iterator[Work]:
    """Take part in what the first process of a team has begun."""
    folder = scratch(target)
    lines = (folder / _JOURNAL).read_bytes().splitlines()
    with (folder / f"journal.{team.index}.jsonl").open("ab") as file:
        yield Work(target, file, set(map(json.loads, lines[1:])), team)


def _others(folder: Path) -> list[bytes]:
    """The lines of the journals of a team's other processes; a truncated one is left out."""
    journals = sorted(folder.glob("journal.*.jsonl"))
    lines = (line for journal in journals for line in journal.read_bytes().splitlines(True))
    return [line for line in lines if line.endswith(b"\n")]


def lock(file: IO[bytes], folder: Path) -> None:
    """Lock a file in a folder until it is closed, so that only one process works there.

    Raises:
      CheckpointError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{folder}: another process is working there; wait for it to finish."
        ) from error


def _resume(file: IO[bytes], folder: Path, header: dict[str, Any]) -> set[str]:
    file.seek(0)
    # A truncated last line has no newline; its part is done again.
    own = [line for line in file if line.endswith(b"\n")]
    lines = own + _others(folder)
    if len(lines) < 2:
        file.truncate(0)
        file.write(json.dumps(header).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        sync_directory(folder)
        return set()
    file.truncate(sum(map(len, own)))
    try:
        journaled, *done = map(json.loads, lines)
    except ValueError as error:
        raise CheckpointError(f"{folder / _JOURNAL}: is damaged; remove {folder}.") from error
    if journaled != header:
        raise CheckpointError(
            f"{folder}: was started from other files or with other settings. Use the same source "
            "and options to resume, or remove it to start again."
        )
    file.write(b"".join(lines[len(own) :]))
    file.flush()
    os.fsync(file.fileno())
    for journal in folder.glob("journal.*.jsonl"):
        journal.unlink()
    return set(done)
