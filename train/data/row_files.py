"""Files of training data: the JSON text of each row, a line of its own or in one list, packed by
gzip or not.
"""

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
_BY_PANDAS = "make JSON lines of it: pandas.read_{}(FILE).to_json('rows.jsonl', orient='records', "
_BY_PANDAS += "lines=True)"
# What a file that we do not read begins with.
_OTHERS = {
    b"PAR1": f"is a Parquet file; {_BY_PANDAS.format('parquet')}",
    b"ARROW1": f"is an Arrow file; {_BY_PANDAS.format('feather')}",
    b"\x28\xb5\x2f\xfd": "is packed by zstd; unpack it, or pack it by gzip",
    b"\xfd7zXZ": "is packed by xz; unpack it, or pack it by gzip",
    b"BZh": "is packed by bzip2; unpack it, or pack it by gzip",
    b"PK\x03\x04": "is a zip archive; unpack it",
}
_TABLES = (".csv", ".tsv")


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file whose rows are counted: lines from 1, entries of a list from 0.

    Attributes:
      path: of the file.
      is_list: the whole file is one JSON list.
      is_packed: by gzip.
    """

    path: str
    is_list: bool
    is_packed: bool

    @property
    def container(self) -> str:
        """What holds the rows."""
        return ("a JSON list" if self.is_list else "JSON lines") + ", gzip" * self.is_packed

    def where(self, number: int) -> str:
        """The place of a row."""
        return place(self.path, number, is_list=self.is_list)

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """The number and the JSON text of each row; blank lines are none.

        Raises:
          ValueError: the file is damaged, or no list though it begins as one.
        """
        with _open(self.path, self.is_packed) as file:
            try:
                yield from _entries(file) if self.is_list else _lines(file)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{self.path}: is damaged ({error}).") from None
            except _NotAList as error:
                raise ValueError(f"{self.path}: is no JSON list of rows ({error}).") from None


class _NotAList(ValueError):
    """A file begins as a list and is none."""


def place(path: str, number: int, *, is_list: bool) -> str:
    """The place of a row: `file.jsonl:3` is a line, `file.json[3]` an entry of a list."""
    return f"{path}[{number}]" if is_list else f"{path}:{number}"


def find(path: str | Path) -> RowFile:
    """Look at how a file begins.

    Raises:
      ValueError: there is no such file, or it is of a kind that is not read; says how to convert.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give a file of one JSON object a line.")
    with path.open("rb") as file:
        head = file.read(8)
    for begins, told in _OTHERS.items():
        if head.startswith(begins):
            raise ValueError(f"{path}: {told}.")
    if path.suffix in _TABLES:
        raise ValueError(f"{path}: is a table; {_BY_PANDAS.format('csv')}.")
    is_packed = head.startswith(_GZIP)
    with _open(path, is_packed) as file:
        try:
            first = _bare(next(_lines(file), (0, b""))[1])
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: is damaged ({error}).") from None
    if first == b"{":
        raise ValueError(
            f"{path}: its first row goes over several lines; put each on one, as 'jq -c .' does, or"
            " all in one list."
        )
    return RowFile(str(path), first.startswith(b"["), is_packed)


def _open(path: str | Path, is_packed: bool) -> io.BufferedIOBase:
    return gzip.open(path) if is_packed else open(path, "rb")


def _lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(file, 1) if _bare(line))


def _bare(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).strip()


def _entries(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    try:
        entries = json.loads(decode(file.read()), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _NotAList(error) from None
    yield from ((number, json.dumps(entry).encode()) for number, entry in enumerate(entries))
