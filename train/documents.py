"""A file of rows becomes documents in memory, with a report on the rows that are wrong.

Letters: N tokens of a document, D documents, S tokens of all of them one after the other.
"""

import dataclasses
import os

import numpy as np
from jaxtyping import Bool, Int, Int32

from . import rows
from .rendering import Document, Renderer

_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was found in a file.

    Attributes:
      rows: lines that are not blank.
      wrong: rows that are not used.
      first_wrong: sentences about the first of these, with file, line and field.
      tokens: of the rows that are used.
      trained: those of them that are trained.
    """

    rows: int
    wrong: int
    first_wrong: tuple[str, ...]
    tokens: int
    trained: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """The documents of one file.

    Attributes:
      path: of the file.
      ids_S: tokens of all documents.
      trained_S: which of them are trained.
      ends_D: where each document ends in them.
      lines_D: the line that each document comes from.
      report: on the whole file.
    """

    path: str
    ids_S: Int32[np.ndarray, " S"]
    trained_S: Bool[np.ndarray, " S"]
    ends_D: Int[np.ndarray, " D"]
    lines_D: Int[np.ndarray, " D"]
    report: LoadReport

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
        return f"{self.path}:{self.lines_D[index]}"


def load(
    path: str | os.PathLike[str], renderer: Renderer, *, skip_wrong: bool = False
) -> Documents:
    """Read and render a file of rows.

    Args:
      path: of the file; `rows` tells its form.
      renderer: makes tokens of the rows.
      skip_wrong: leave out rows that are wrong, and report them, where at least one is right.

    Raises:
      ValueError: rows are wrong (the first is named with its line and field, the others counted),
        or the file has none.
    """
    documents: list[Document] = []
    numbers: list[int] = []
    problems: list[str] = []
    count = wrong = 0
    for number, line in rows.lines(path):
        count += 1
        try:
            documents.append(renderer.render(rows.parse(line)))
            numbers.append(number)
        except ValueError as error:
            wrong += 1
            if len(problems) < _SHOWN:
                problems.append(f"{path}:{number}: {error}")
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
        report=LoadReport(
            rows=count,
            wrong=wrong,
            first_wrong=tuple(problems),
            tokens=len(trained_S),
            trained=int(trained_S.sum()),
        ),
    )
