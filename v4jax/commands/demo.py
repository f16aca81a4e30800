"""A first generation, with the model that ships with the package."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import v4jax
from v4jax.checkpoints import hub, unfinished
from v4jax.language_model import LanguageModel

PROMPT = "The assignment statement"
_SAMPLING: dict[str, Any] = {"max_tokens": 96, "temperature": 0.6, "seed": 0}


def main(directory: Path | None) -> int:
    """Load the model and generate text; with a directory, copy the model there first.

    Raises:
      ValueError: the directory has other files in it.
    """
    source = hub.TINY if directory is None else directory
    if directory is not None and not _is_tiny(directory):
        copy(directory)
    _say(f"A small model in the release format, {source}:")
    for file in sorted(source.iterdir()):
        _say(f"  {file.stat().st_size:9,} bytes  {file.name}")
    _generate(v4jax.load(source))
    _say(f'Next: v4jax generate {directory or "tiny"} -p "{PROMPT}"')
    return 0


def copy(directory: Path) -> None:
    """Copy the model to a directory, which appears when it is complete.

    Raises:
      ValueError: the directory is not empty, or is inside the model's own.
    """
    directory = directory.absolute()
    unfinished.check_target(directory, hub.TINY)
    with unfinished.begin(directory, "demo", "") as work:
        shutil.copytree(hub.TINY, work.directory, dirs_exist_ok=True)
        work.finish()


def _is_tiny(directory: Path) -> bool:
    """Whether the directory already has the model's files."""
    same = lambda file: (directory / file.name).read_bytes() == file.read_bytes()
    return all((directory / file.name).is_file() and same(file) for file in hub.TINY.iterdir())


def _generate(model: LanguageModel) -> None:
    _say("\nCompilation takes a few seconds; then the model continues this text:\n")
    _say(PROMPT, end="")
    began = time.perf_counter()
    for piece in model.stream(PROMPT, **_SAMPLING):
        _say(piece, end="")
    first = time.perf_counter() - began
    again = model.generate(PROMPT, **_SAMPLING)
    speed = f"{again.timings.tokens_per_second:.0f} tokens/s"
    _say(f"\n\nThat took {first:.1f} s including compilation; once compiled, it decodes {speed}.")


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()
