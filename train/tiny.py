"""A small model trained from nothing, on text that every machine with CPython has.

The text is CPython's own: its language reference, as `help()` shows it, and the docstrings of its
standard library (Python Software Foundation License, version 2).
"""

import ast
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers

from v4jax.adapters import merge
from v4jax.adapters.runs import RECIPE
from v4jax.checkpoints import random_release
from v4jax.presets import preset
from v4jax.text import chat
from v4jax.text.files import read_text

from . import loop, recipe

PROMPTS = ("The assignment statement", "Return a list of", "This module provides")
_LEAST = 120  # characters of a docstring: shorter ones say little
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_HELD_OUT = 20  # one row of so many is not trained on
_CHATS = 3  # one module of so many is asked for in chats, name by name

Row = dict[str, Any]


def rows() -> list[Row]:
    """The text as rows of training data, in a fixed order."""
    from pydoc_data.topics import topics

    found: list[Row] = [{"text": text} for text in topics.values()]
    for number, (module, described) in enumerate(_modules()):
        if number % _CHATS:
            found.append({"text": "\n\n".join(described.values())})
        else:
            found += [_chat(f"{module}.{name}", text) for name, text in described.items()]
    return found


def _chat(question: str, answer: str) -> Row:
    asked = {"role": "user", "content": f"What is {question}?"}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


def _modules() -> Iterator[tuple[str, dict[str, str]]]:
    """Modules of the standard library, and the docstrings in each by the name they are of."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if _LEFT_OUT & set(path.parts):
            continue
        try:
            tree = ast.parse(read_text(file))
        except (OSError, SyntaxError, ValueError):
            continue
        described = dict(_docstrings(tree))
        if described:
            yield path.stem, described


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _LEAST:
                yield getattr(node, "name", "this"), text


def tokenizer(texts: list[str], size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of the texts, V4's special tokens first."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
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
    made.train_from_iterator(texts, trainer)
    return made


def train(
    out: Path, overrides: dict[str, str], *, show: Callable[[Row], None]
) -> tuple[Path, loop.Outcome]:
    """Train the preset 'tiny' and write it as a release; goes on with a run that was interrupted.

    Args:
      out: a directory to be made: the text, the model before training, the run, and `model`.
      overrides: of the recipe `train_tiny.toml`, as `recipe.read` takes them.
      show: told the metrics of each step.

    Returns:
      The release's directory, which is there unless a signal ended the run, and how that ended.

    Raises:
      ValueError: the directory has something else in it.
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
    """Write the text and the model before training.

    Raises:
      ValueError: the directory has something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and has no run in it; choose another directory.")
    out.mkdir(parents=True, exist_ok=True)
    found = rows()
    held_out = found[::_HELD_OUT]
    trained = [row for number, row in enumerate(found) if number % _HELD_OUT]
    for name, kept in (("held_out", held_out), ("train", trained)):
        lines = (json.dumps(row) + "\n" for row in kept)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    cfg = preset("tiny")
    texts = [row["text"] if "text" in row else row["messages"][1]["content"] for row in found]
    random_release.make_checkpoint(
        out / "untrained", cfg, 0, tokenizer=tokenizer(texts, cfg.vocab_size)
    )


def read(prepared: Path, run: Path, overrides: Mapping[str, str] | None = None) -> recipe.Recipe:
    """The recipe of a run on what `prepare` has written."""
    given = {
        "model.path": repr(str(prepared / "untrained")),
        "data.files": repr([str(prepared / "train.jsonl")]),
        "evaluation.files": repr([str(prepared / "held_out.jsonl")]),
        "evaluation.prompts": repr(list(PROMPTS)),
        "out": repr(str(run)),
    }
    with resources.as_file(resources.files("v4jax_configs") / "train_tiny.toml") as file:
        return recipe.read(file, given | dict(overrides or {}))
