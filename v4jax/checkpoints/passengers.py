"""The files beside a checkpoint's weights: which they are, that they are whole, and their copies.

Whatever makes a checkpoint out of another takes them along: licence, model card, encoding,
tokenizer, settings of generation. Left out are hidden files, and weights in other formats, which
may not be those of the checkpoint that is made.
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
# As patterns for the Hub: weights in other formats.
FOREIGN = tuple(f"*{suffix}" for suffix in _SUFFIXES if suffix != ".safetensors")
# Written by whoever makes a checkpoint.
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
    text = Tokenizer.load(file)
    if text.vocab_size > vocab_size:
        raise CheckpointError(
            f"{file}: {text.vocab_size} tokens, but the model's vocabulary has {vocab_size}. Take "
            "the tokenizer of this checkpoint."
        )
    return text


def find(directory: Path, *, besides: Collection[str] = ()) -> list[PurePath]:
    """The passengers, relative to the directory; not those below the names `besides`."""
    return [
        inside
        for inside in _files(directory)
        if inside.parts[0] not in besides
        and str(inside) not in _WRITTEN
        and not inside.name.removesuffix(".index.json").endswith(_SUFFIXES)
    ]


def _files(directory: Path) -> Iterator[PurePath]:
    """All files that are not hidden. Links are followed, but to no folder twice."""
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
    """Refuse damaged files before anything is made of them.

    Args:
      directory: of the checkpoint.
      files: as `find` gives them.
      vocab_size: of the model.

    Raises:
      ValueError: naming the file.
    """
    for inside in files:
        file = directory / inside
        if not file.is_file():
            raise CheckpointError(f"{file}: is a link to nothing; mend or remove it.")
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
        kind = "JSON" if file.suffix == ".json" else "text in UTF-8"
        raise CheckpointError(
            f"{file}: is no {kind} ({error!s:.100}); mend it, or download the file again."
        ) from error


def copy(directory: Path, files: Collection[PurePath], target: Path) -> None:
    """Copy them to the same places below the target, and see them onto the disk."""
    for inside in files:
        place = target / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(safetensors_directory.locate(directory, str(inside)), place)
        for path in (place, place.parent):
            sync_directory(path)
