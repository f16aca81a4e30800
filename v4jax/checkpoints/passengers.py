"""The files next to a checkpoint's weights: finding, checking and copying them.

Whatever creates a checkpoint from another copies them: licence, model card, encoding, tokenizer,
generation settings. Hidden files are left out, and so are weights in other formats, which may not
match the new checkpoint's.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from v4jax.checkpoints import disk, safetensors_directory
from v4jax.checkpoints.disk import CheckpointError, sync_directory
from v4jax.text.tokenizer import Tokenizer

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Weights in other formats, as patterns for the Hub.
FOREIGN = tuple(f"*{suffix}" for suffix in _SUFFIXES if suffix != ".safetensors")
# Written, not copied, by whatever creates a checkpoint.
_WRITTEN = (safetensors_directory.CONFIG, safetensors_directory.INDEX)
_OBJECTS = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    "added_tokens.json",
)
TOKENIZER = "tokenizer.json"


def tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    """The checkpoint's tokenizer, if it has one.

    Raises:
      ValueError: it is damaged, or has more tokens than the model.
    """
    file = directory / TOKENIZER
    if not file.exists():
        return None
    loaded = Tokenizer.load(file)
    if loaded.vocab_size > vocab_size:
        raise CheckpointError(
            f"{file}: has {loaded.vocab_size} tokens, but the model's vocabulary has {vocab_size}. "
            "Use this checkpoint's own tokenizer."
        )
    return loaded


def find(directory: Path, *, besides: Collection[str] = ()) -> list[PurePath]:
    """The files to copy, relative to the directory; top-level names in `besides` are skipped."""
    return [
        inside
        for inside in _files(directory)
        if inside.parts[0] not in besides
        and str(inside) not in _WRITTEN
        and not inside.name.removesuffix(".index.json").endswith(_SUFFIXES)
    ]


def is_small(name: str) -> bool:
    """Whether a file, by its path in a checkpoint, is neither hidden nor holds weights."""
    inside = PurePath(name)
    return not any(part.startswith(".") for part in inside.parts) and inside.suffix not in _SUFFIXES


def _files(directory: Path) -> Iterator[PurePath]:
    """All files that are not hidden. Links are followed, but no folder is visited twice."""
    visited = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and os.path.realpath(os.path.join(folder, name)) not in visited
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield PurePath(folder, name).relative_to(directory)


def check(directory: Path, files: Collection[PurePath], vocab_size: int) -> None:
    """Reject damaged files before anything is created from them.

    Args:
      directory: the checkpoint's directory.
      files: files from `find`.
      vocab_size: vocabulary size of the model.

    Raises:
      ValueError: a file is damaged or missing; the message names it.
    """
    for inside in files:
        file = directory / inside
        if not file.is_file():
            raise CheckpointError(f"{file}: is a broken link; fix or remove it.")
        if len(inside.parts) == 1:
            _check_format(file)
    tokenizer(directory, vocab_size)


def _check_format(file: Path) -> None:
    try:
        if file.name in _OBJECTS:
            disk.read_json(file)
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix == ".jinja":
            file.read_bytes().decode("utf-8")
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        kind = "JSON" if file.suffix == ".json" else "UTF-8 text"
        raise CheckpointError(
            f"{file}: is not {kind} ({error!s:.100}); fix it, or download the file again."
        ) from error


def copy(directory: Path, files: Collection[PurePath], target: Path) -> None:
    """Copy files to the same relative paths below the target, and flush them to disk."""
    for inside in files:
        copied = target / inside
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(safetensors_directory.locate(directory, str(inside)), copied)
        for path in (copied, copied.parent):
            sync_directory(path)
