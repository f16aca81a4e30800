"""A file of rows becomes documents in memory, with a report on the rows that are wrong.

Letters: N tokens of a document, D documents, S tokens of all of them one after the other.
"""

import collections
import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32

from v4jax.text.files import visible

from . import row_files, rows
from .rendering import Document, Renderer
from .rows import RowSettings

_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was found in a file.

    Attributes:
      rows: lines that are not blank, or entries of a list.
      wrong: rows that are not used.
      first_wrong: sentences about the first of these, with file, line and field.
      tokens: of the rows that are used.
      trained: those of them that are trained.
      container: what holds the rows.
      kinds: how many of the used rows are of each kind.
      unspoken: messages whose reasoning is not written, though the rows have it.
    """

    rows: int
    wrong: int
    first_wrong: tuple[str, ...]
    tokens: int
    trained: int
    container: str = "JSON lines"
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    unspoken: int = 0

    @property
    def form(self) -> str:
        """What holds the rows, and of which kinds they are."""
        kinds = ", ".join(f"{count:,} of {kind}" for kind, count in self.kinds.items())
        return f"{self.container}, {kinds}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """The documents of one file.

    Attributes:
      path: of the file.
      ids_S: tokens of all documents.
      trained_S: which of them are trained.
      ends_D: where each document ends in them.
      lines_D: the number of the row that each document comes from.
      report: on the whole file.
      is_list: the file is one JSON list, so that the numbers are of its entries.
    """

    path: str
    ids_S: Int32[np.ndarray, " S"]
    trained_S: Bool[np.ndarray, " S"]
    ends_D: Int[np.ndarray, " D"]
    lines_D: Int[np.ndarray, " D"]
    report: LoadReport
    is_list: bool = False

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.ends_D)

    @property
    def lengths_D(self) -> Int[np.ndarray, " D"]:
        """Tokens of each document."""
        return np.diff(self.ends_D, prepend=0)

    def __getitem__(self, index: int) -> Document:
        """One document; its arrays are views."""
        part = slice(self.ends_D[index - 1] if index else 0, self.ends_D[index])
        return Document(self.ids_S[part], self.trained_S[part])

    def where(self, index: int) -> str:
        """File and line of a document."""
        return row_files.place(self.path, int(self.lines_D[index]), is_list=self.is_list)


def load(
    path: str | Path,
    renderer: Renderer,
    *,
    skip_wrong: bool = False,
    settings: RowSettings | None = None,
) -> Documents:
    """Read and render a file of rows.

    Args:
      path: of the file; `row_files` and `rows` tell its form.
      renderer: makes tokens of the rows.
      skip_wrong: leave out rows that are wrong, and report them, where at least one is right.
      settings: how rows are read.

    Raises:
      ValueError: rows are wrong (the first is named with its line and field, the others counted),
        or the file has none.
    """
    settings = settings or RowSettings()
    file = row_files.find(path)
    documents: list[Document] = []
    numbers: list[int] = []
    problems: list[str] = []
    kinds: collections.Counter[str] = collections.Counter()
    count = wrong = 0
    for number, row_text in file.rows():
        count += 1
        try:
            kind, row = rows.read(row_text, settings)
            documents.append(renderer.render(row))
            numbers.append(number)
            kinds[kind] += 1
        except ValueError as error:
            wrong += 1
            if len(problems) < _SHOWN:
                problems.append(visible(f"{file.where(number)}: {error}"))
    if wrong and not (skip_wrong and documents):
        raise ValueError(f"{problems[0]} (Wrong: {wrong:,} of {count:,} rows.)")
    if not documents:
        raise ValueError(f"{path}: the file has no rows; give one JSON object a line.")
    trained_S = np.concatenate([document.trained_N for document in documents])
    return Documents(
        path=str(path),
        ids_S=np.concatenate([document.ids_N for document in documents]),
        trained_S=trained_S,
        ends_D=np.cumsum([len(document.ids_N) for document in documents]),
        lines_D=np.array(numbers),
        is_list=file.is_list,
        report=LoadReport(
            rows=count,
            wrong=wrong,
            first_wrong=tuple(problems),
            tokens=len(trained_S),
            trained=int(trained_S.sum()),
            container=file.container,
            kinds=dict(kinds),
            unspoken=sum(document.unspoken for document in documents),
        ),
    )
