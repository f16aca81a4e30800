"""A small model trained from scratch, on text that comes with every CPython.

The text is the language reference, as `help()` shows it, and the docstrings of the standard library
(Python Software Foundation License, version 2).
"""

import ast
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers

from v4jax import presets
from v4jax.adapters import merge
from v4jax.adapters.runs import RECIPE
from v4jax.checkpoints import random_release
from v4jax.text import chat
from v4jax.text.files import read_text

from . import loop, recipe

PROMPTS = ("The assignment statement", "Return a list of", "This module provides")
_LEAST = 120  # minimum characters of a docstring
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_HELD_OUT = 20  # one in this many rows is held out
_CHATS = 3  # one in this many modules becomes chats, one for each name

Row = dict[str, Any]


def rows() -> list[Row]:
    """The text as rows of training data, in a fixed order."""
    from pydoc_data.topics import topics

    rows: list[Row] = [{"text": text} for text in topics.values()]
    for number, (module, docstrings) in enumerate(_modules()):
        if number % _CHATS:
            rows.append({"text": "\n\n".join(docstrings.values())})
        else:
            rows += [_chat(f"{module}.{name}", text) for name, text in docstrings.items()]
    return rows


def _chat(subject: str, answer: str) -> Row:
    question = {"role": "user", "content": f"What is {subject}?"}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def _modules() -> Iterator[tuple[str, dict[str, str]]]:
    """Modules of the standard library, with their docstrings by the name of what they document."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if _LEFT_OUT & set(path.parts):
            continue
        try:
            tree = ast.parse(read_text(file))
        except (OSError, SyntaxError, ValueError):
            continue
        docstrings = dict(_docstrings(tree))
        if docstrings:
            yield path.stem, docstrings


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _LEAST:
                yield getattr(node, "name", "this"), text


def tokenizer(texts: list[str], size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer trained on the texts, with V4's special tokens first."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = [
        tokenizers.AddedToken(token, normalized=False, special=True)
        for token in chat.SPECIAL_TOKENS
    ]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def train(
    out: Path, overrides: dict[str, str], *, show: Callable[[Row], None]
) -> tuple[Path, loop.Outcome]:
    """Train the preset 'tiny' and write it as a release; continues an interrupted run.

    Args:
      out: directory to create for the text, the untrained model, the run, and the release `model`.
      overrides: overrides of the recipe `train_tiny.toml`, as for `recipe.read`.
      show: called with the metrics of each step.

    Returns:
      The release's directory, which exists unless a signal ended the run, and how the run ended.

    Raises:
      ValueError: the directory has other contents.
    """
    run, release = out / "run", out / "model"
    if (run / RECIPE).is_file():
        outcome = loop.resume(run, show=show)
    else:
        settings = read(out, run, overrides)
        prepare(out)
        outcome = loop.begin(settings, show=show)
    if outcome.why != "signal" and not release.exists():
        merge.merge(out / "untrained", run, release, weights="keep")
    return release, outcome


def prepare(out: Path) -> None:
    """Write the text and the untrained model.

    Raises:
      ValueError: the directory is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and has no run in it; choose another directory.")
    out.mkdir(parents=True, exist_ok=True)
    all_rows = rows()
    held_out = all_rows[::_HELD_OUT]
    trained = [row for number, row in enumerate(all_rows) if number % _HELD_OUT]
    for name, part in (("held_out", held_out), ("train", trained)):
        lines = (json.dumps(row) + "\n" for row in part)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    cfg = presets.get("tiny")
    texts = [row["text"] if "text" in row else row["messages"][1]["content"] for row in all_rows]
    random_release.make_checkpoint(
        out / "untrained", cfg, 0, tokenizer=tokenizer(texts, cfg.vocab_size)
    )


def read(prepared: Path, run: Path, overrides: Mapping[str, str] | None = None) -> recipe.Recipe:
    """The recipe of a run on the files that `prepare` wrote."""
    settings = {
        "model.path": repr(str(prepared / "untrained")),
        "data.files": repr([str(prepared / "train.jsonl")]),
        "evaluation.files": repr([str(prepared / "held_out.jsonl")]),
        "evaluation.prompts": repr(list(PROMPTS)),
        "out": repr(str(run)),
    }
    with resources.as_file(resources.files("v4jax_configs") / "train_tiny.toml") as file:
        return recipe.read(file, settings | dict(overrides or {}))
