"""Documents in memory, read from a file of rows, with a report on invalid rows.

Axis letters: N tokens of a document, D documents, S tokens of all documents, concatenated.
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
    """Statistics of a file.

    Attributes:
      rows: number of nonblank lines, or entries of a list.
      wrong: number of invalid rows, which are not used.
      first_wrong: sentences about the first of these, with file, line and field.
      tokens: number of tokens in the used rows.
      trained: number of these that are trained.
      container: the form of the file, e.g. 'JSON lines'.
      kinds: number of used rows of each kind.
      unspoken: number of messages whose reasoning is in the rows but not in the tokens.
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
        """The form of the file, and the kinds of its rows."""
        kinds = ", ".join(f"{count:,} of {kind}" for kind, count in self.kinds.items())
        return f"{self.container}, {kinds}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """The documents of one file.

    Attributes:
      path: path of the file.
      ids_S: token ids of all documents.
      trained_S: whether each token is trained.
      ends_D: where each document ends in `ids_S`.
      lines_D: number of the row of each document.
      report: statistics of the file.
      is_list: whether the file is one JSON list, whose entries are numbered.
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
      path: path of the file; see `row_files` and `rows` for its format.
      renderer: turns rows into tokens.
      skip_wrong: leave out and report invalid rows, if at least one row is valid.
      settings: how rows are read.

    Raises:
      ValueError: rows are invalid (names the line and field of the first and counts the others),
        or the file has no rows.
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
        raise ValueError(f"{problems[0]} (Invalid: {wrong:,} of {count:,} rows.)")
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
