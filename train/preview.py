"""What a run would train on, before any device is used."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from v4jax.tokenizer import Tokenizer

from . import packing, preparation
from .documents import Documents
from .recipe import Recipe
from .rendering import Document

_SHOWN = 3
_TRAINED, _SEEN = "bold green", "dim"


@dataclasses.dataclass(frozen=True)
class Facts:
    """Numbers of one file.

    Attributes:
      rows, wrong: of the file.
      tokens, trained: of an epoch, before packing.
      shortest, median, longest: tokens of a document.
      packs: of an epoch.
      efficiency: share of the packs' positions that hold a token.
      too_long, dropped: documents longer than a pack, and tokens that are lost by that.
    """

    rows: int
    wrong: int
    tokens: int
    trained: int
    shortest: int
    median: int
    longest: int
    packs: int
    efficiency: float
    too_long: int
    dropped: int


def facts(documents: Documents, settings: packing.PackSettings) -> Facts:
    """The numbers of a file under settings of packing."""
    plan = packing.plan(documents.lengths_D, settings, where=documents.where)
    ordered_D = sorted(documents.lengths_D.tolist())
    return Facts(
        rows=documents.report.rows,
        wrong=documents.report.wrong,
        tokens=documents.report.tokens,
        trained=documents.report.trained,
        shortest=ordered_D[0],
        median=ordered_D[len(ordered_D) // 2],
        longest=ordered_D[-1],
        packs=len(plan),
        efficiency=plan.efficiency,
        too_long=plan.too_long,
        dropped=plan.dropped,
    )


def coloured(document: Document, tokenizer: Tokenizer) -> Text:
    """The document's text, its trained tokens in another colour."""
    text = Text()
    ids, marks = document.ids_N.tolist(), document.trained_N.tolist()
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or marks[end] != marks[begin]:
            part = b"".join(tokenizer.token_bytes(token) for token in ids[begin:end])
            text.append(part.decode("utf-8", "replace"), _TRAINED if marks[begin] else _SEEN)
            begin = end
    return text


def show(recipe: Recipe, console: Console, *, samples: int = _SHOWN) -> None:
    """Print samples of each file and what its epochs amount to.

    Raises:
      ValueError: no model, no data, or rows that are wrong.
    """
    tokenizer = preparation.text_tokenizer(recipe)
    if not recipe.data.files:
        raise ValueError("There is no data; give --data, or data.files in the recipe.")
    found = preparation.read_data(recipe, tokenizer, recipe.data.files)
    for documents in found:
        for sentence in documents.report.first_wrong:
            console.print(Text(sentence, "red"))
        for number in range(min(samples, len(documents))):
            console.rule(documents.where(number))
            console.print(coloured(documents[number], tokenizer))
    _print_facts(recipe, found, console)


def _print_facts(recipe: Recipe, found: Sequence[Documents], console: Console) -> None:
    table = Table("file", "rows", "wrong", "tokens", "trained", "lengths", "packs", "filled")
    settings = recipe.data.pack(recipe.steps.seed)
    batch = recipe.steps.batch
    for documents in found:
        one = facts(documents, settings)
        table.add_row(
            documents.path,
            f"{one.rows:,}",
            f"{one.wrong:,}",
            f"{one.tokens:,}",
            f"{one.trained:,} ({one.trained / one.tokens:.0%})",
            f"{one.shortest:,} / {one.median:,} / {one.longest:,}",
            f"{one.packs:,} x {settings.seq_len:,}",
            f"{one.efficiency:.1%}",
        )
        if one.too_long:
            lost = f"{one.too_long:,} documents are longer than a pack; {one.dropped:,} tokens lost"
            console.print(Text(f"{documents.path}: {lost}.", "yellow"))
        steps = -(-one.packs // batch)
        console.print(f"{documents.path}: an epoch is {steps:,} steps of {batch} packs.")
    console.print(table)
