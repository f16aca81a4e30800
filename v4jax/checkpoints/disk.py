"""The error of everything that reads or writes checkpoints, and helpers for small files."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from v4jax.text.files import parse_json, read_text


class CheckpointError(ValueError):
    """A checkpoint's files cannot be used; the message says which file, why, and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a CheckpointError gives the position of a syntax error."""
    try:
        return parse_json(read_text(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}. Fix it, or download "
            "the file again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON object in UTF-8: {error}.") from error


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a small file and flush it to disk; without an indent, on one line."""
    separators = (",", ":") if indent is None else None
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=indent, separators=separators)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after an error or a crash it is as it was before.

    Raises:
      OSError: the file, which the error names, cannot be written.
    """
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` when it is complete and on disk; after an error it is gone."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def require_space(folder: Path, nbytes: int) -> None:
    """Raise a CheckpointError unless the folder's disk has `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{folder}: {nbytes:,} bytes are needed and {free:,} are free; free some, or choose "
            "another disk."
        )


def sync_directory(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
