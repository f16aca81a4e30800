"""Files of training data: JSON lines or one JSON list, optionally compressed with gzip."""

import codecs
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from v4jax.text.files import decode, unique_keys

_GZIP = b"\x1f\x8b"
_BY_PANDAS = "convert it to JSON lines: pandas.read_{}(FILE).to_json('rows.jsonl', "
_BY_PANDAS += "orient='records', lines=True)"
# The first bytes of unsupported files.
_OTHERS = {
    b"PAR1": f"is a Parquet file; {_BY_PANDAS.format('parquet')}",
    b"ARROW1": f"is an Arrow file; {_BY_PANDAS.format('feather')}",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it, or use gzip",
    b"\xfd7zXZ": "is compressed with xz; decompress it, or use gzip",
    b"BZh": "is compressed with bzip2; decompress it, or use gzip",
    b"PK\x03\x04": "is a zip archive; extract it",
}
_TABLES = (".csv", ".tsv")


def weighted(name: str) -> tuple[str, float]:
    """Split a file name from its weight, 1 by default: 'chats.jsonl:2'.

    Raises:
      ValueError: the weight is not a finite number above 0.
    """
    path, colon, text = name.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        return name, 1.0
    if not colon:
        return name, 1.0
    if not (path and 0.0 < weight < float("inf")):
        raise ValueError(f"files has {name}; a weight must be a number above 0.")
    return path, weight


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file with numbered rows: lines from 1, entries of a list from 0.

    Attributes:
      path: path of the file.
      is_list: whether the file is one JSON list.
      is_packed: whether it is compressed with gzip.
    """

    path: str
    is_list: bool
    is_packed: bool

    @property
    def container(self) -> str:
        """The form of the file."""
        return ("a JSON list" if self.is_list else "JSON lines") + ", gzip" * self.is_packed

    def where(self, number: int) -> str:
        """The place of a row."""
        return place(self.path, number, is_list=self.is_list)

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """The number and the JSON text of each row; blank lines are skipped.

        Raises:
          ValueError: the file is damaged, or starts like a list and is not one.
        """
        with _open(self.path, self.is_packed) as file:
            try:
                yield from _entries(file) if self.is_list else _lines(file)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{self.path}: is damaged ({error}).") from None
            except _NotAList as error:
                raise ValueError(f"{self.path}: is not a JSON list of rows ({error}).") from None


class _NotAList(ValueError):
    """A file starts like a JSON list and is not one."""


def place(path: str, number: int, *, is_list: bool) -> str:
    """The location of a row: `file.jsonl:3` is a line, `file.json[3]` an entry of a list."""
    return f"{path}[{number}]" if is_list else f"{path}:{number}"


def find(path: str | Path) -> RowFile:
    """Determine a file's form from its start.

    Raises:
      ValueError: there is no such file, or its form is not supported; says how to convert it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give a file of one JSON object a line.")
    with path.open("rb") as file:
        head = file.read(8)
    for magic, problem in _OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: {problem}.")
    if path.suffix in _TABLES:
        raise ValueError(f"{path}: is a table; {_BY_PANDAS.format('csv')}.")
    is_packed = head.startswith(_GZIP)
    with _open(path, is_packed) as file:
        try:
            first = _stripped(next(_lines(file), (0, b""))[1])
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: is damaged ({error}).") from None
    if first == b"{":
        raise ValueError(
            f"{path}: its first row spans several lines; put each row on one line, as 'jq -c .'"
            " does, or all rows in one list."
        )
    return RowFile(str(path), first.startswith(b"["), is_packed)


def _open(path: str | Path, is_packed: bool) -> io.BufferedIOBase:
    return gzip.open(path) if is_packed else open(path, "rb")


def _lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(file, 1) if _stripped(line))


def _stripped(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).strip()


def _entries(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    try:
        entries = json.loads(decode(file.read()), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _NotAList(error) from None
    yield from ((number, json.dumps(entry).encode()) for number, entry in enumerate(entries))
