"""A small model trained from nothing, on text that is on every machine with CPython.

The text is CPython's own: its language reference, as `help()` shows it, and the docstrings of its
standard library (Python Software Foundation License, version 2).
"""

import ast
import json
import sysconfig
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers

from v4jax import chat, demo, merge
from v4jax.config import preset

from . import loop, recipe

_LEAST = 200  # characters of a docstring: shorter ones say little
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_HELD_OUT = 20  # one text of so many is not trained on


def texts() -> list[str]:
    """The text, in a fixed order."""
    from pydoc_data.topics import topics

    return [*topics.values(), *_docstrings()]


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if _LEFT_OUT & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield from (text for text in found if text and len(text) >= _LEAST)


def tokenizer(found: list[str], size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of the text, V4's special tokens first."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[
            tokenizers.AddedToken(t, normalized=False, special=True) for t in chat.SPECIAL_TOKENS
        ],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(found, trainer)
    return made


def train(out: Path, overrides: dict[str, str], *, show: Callable[[dict[str, Any]], None]) -> Path:
    """Train the preset 'tiny' and write it as a release; returns its directory.

    Args:
      out: a directory to be made: the text, the model before training, the run, and `model`.
      overrides: of the recipe `train_tiny.toml`, as `recipe.read` takes them.
      show: told the metrics of each step.

    Raises:
      ValueError: the directory has something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; choose another directory.")
    out.mkdir(parents=True, exist_ok=True)
    found = texts()
    parts = {"train": [], "held_out": []}
    for number, text in enumerate(found):
        parts["held_out" if number % _HELD_OUT == 0 else "train"].append(text)
    for name, rows in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    cfg = preset("tiny")
    demo.make_checkpoint(out / "untrained", cfg, 0, tokenizer=tokenizer(found, cfg.vocab_size))
    given = {
        "model.path": repr(str(out / "untrained")),
        "data.files": repr([str(out / "train.jsonl")]),
        "evaluation.files": repr([str(out / "held_out.jsonl")]),
        "out": repr(str(out / "run")),
    }
    with resources.as_file(resources.files("v4jax_configs") / "train_tiny.toml") as file:
        settings = recipe.read(file, given | overrides)
    loop.begin(settings, show=show)
    merge.merge(out / "untrained", out / "run", out / "model", weights="keep")
    return out / "model"
