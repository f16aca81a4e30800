"""A preview of what a run would train on; uses no device."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from v4jax.text.files import visible
from v4jax.text.tokenizer import Tokenizer

from . import preparation
from .data.dataset import Packs
from .data.documents import Documents
from .data.packing import Packing
from .data.rendering import Document
from .recipe import Recipe

_SHOWN = 3
_TRAINED, _SEEN = "bold green", "dim"


def pieces(document: Document, number: int, packing: Packing) -> list[Document]:
    """The packed pieces of one of a file's documents; the first token of each is not trained."""
    chosen_P = np.flatnonzero(packing.document_P == number)
    parts = []
    for begin, length in sorted(
        zip(packing.begin_P[chosen_P], packing.length_P[chosen_P], strict=True)
    ):
        part = slice(begin, begin + length)
        trained_N = document.trained_N[part].copy()
        trained_N[0] = False
        parts.append(Document(document.ids_N[part], trained_N))
    return parts


def coloured(document: Document, tokenizer: Tokenizer) -> Text:
    """The document's text with trained tokens in colour and control characters escaped."""
    text = Text()
    ids, marks = document.ids_N.tolist(), document.trained_N.tolist()
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or marks[end] != marks[begin]:
            part = b"".join(tokenizer.token_bytes(token) for token in ids[begin:end])
            shown = visible(part.decode("utf-8", "replace"))
            text.append(shown, _TRAINED if marks[begin] else _SEEN)
            begin = end
    return text


def show(recipe: Recipe, console: Console, *, samples: int = _SHOWN) -> None:
    """Print samples of each file as they are packed, and statistics of its epochs.

    Raises:
      ValueError: training would reject the recipe, the model's files or the data.
    """
    if samples < 0:
        raise ValueError(f"samples is {samples}; it must be at least 0.")
    tokenizer = preparation.text_tokenizer(recipe)
    preparation.check(recipe)
    trained = preparation.read_data(recipe, tokenizer, recipe.data.files)
    packed = preparation.packs(recipe, trained)
    held_out = preparation.read_data(recipe, tokenizer, recipe.evaluation.files)
    held_out_packs = preparation.held_out_packs(recipe, held_out)
    for documents, packs in zip(trained, packed, strict=True):
        for sentence in documents.report.first_wrong:
            console.print(Text(sentence, "red"))
        for number in range(min(samples, len(documents))):
            _print_document(documents, number, packs.packing(0), tokenizer, console)
    _print_facts([*trained, *held_out], [*packed, *held_out_packs], len(trained), recipe, console)


def _print_document(
    documents: Documents, number: int, packing: Packing, tokenizer: Tokenizer, console: Console
) -> None:
    document = documents[number]
    parts = pieces(document, number, packing)
    for i, piece in enumerate(parts, 1):
        which = f" ({i} of {len(parts)})" if len(parts) > 1 else ""
        console.rule(Text(visible(documents.where(number)) + which))
        console.print(coloured(piece, tokenizer))
    if not parts:
        console.rule(Text(visible(documents.where(number))))
    if left := len(document.ids_N) - sum(len(piece.ids_N) for piece in parts):
        console.print(Text(f"{left:,} of {len(document.ids_N):,} tokens are left out.", "yellow"))


def _print_facts(
    files: Sequence[Documents],
    packed: Sequence[Packs],
    trained: int,
    recipe: Recipe,
    console: Console,
) -> None:
    """Print statistics of the files; the first `trained` are training data, the rest held out."""
    table = Table(
        Column("file", overflow="fold"),
        "rows",
        "wrong",
        "tokens",
        "trained",
        "lengths",
        "packs",
        "filled",
    )
    say = lambda text, style="": console.print(Text(visible(text), style))
    for i, (documents, packs) in enumerate(zip(files, packed, strict=True)):
        path, report, first = documents.path, documents.report, packs.packing(0)
        lengths = sorted(documents.lengths_D.tolist())
        shown = lengths[0], lengths[len(lengths) // 2], lengths[-1]
        table.add_row(
            Text(visible(path if i < trained else f"{path} (held out)")),
            f"{report.rows:,}",
            f"{report.wrong:,}",
            f"{first.tokens:,}",
            f"{first.trained:,} ({first.trained / first.tokens:.0%})",
            " / ".join(f"{length:,}" for length in shown),
            f"{len(first):,} x {recipe.data.seq_len:,}",
            f"{first.efficiency:.1%}",
        )
        say(f"{path}: {report.form}.")
        if first.too_long:
            lost = f"are longer than a pack; {first.dropped:,} tokens lost"
            say(f"{path}: {first.too_long:,} documents {lost}.", "yellow")
        for note in packs.notes(waste=i < trained):
            say(note, "yellow")
        if i < trained:
            steps = -(-len(first) // recipe.steps.batch)
            say(f"{path}: an epoch is {steps:,} steps of {recipe.steps.batch} packs.")
    console.print(table)
