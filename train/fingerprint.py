"""The data that a run began with, so that it does not go on with other data unawares."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from v4jax.checkpoints.disk import write_file

from .data.documents import Documents

FILE = "data.json"


def of(documents: Documents) -> str:
    """A digest of a file's documents: of their tokens, and of which are trained."""
    digest = hashlib.sha256()
    for array in (documents.ids_S, documents.trained_S, documents.ends_D.astype(np.int64)):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write(directory: Path, data: Sequence[Documents]) -> None:
    """Keep the fingerprints of a run's files with it."""
    files = [{"file": one.path, "sha256": of(one)} for one in data]
    write_file(directory / FILE, (json.dumps(files, indent=1) + "\n").encode())


def check(directory: Path, data: Sequence[Documents]) -> None:
    """Refuse files that do not give what they gave when their fingerprints were written.

    Raises:
      ValueError: which file does not.
    """
    path = directory / FILE
    remedy = "--changed-data goes on with the data as it is now"
    if not path.is_file():
        warnings.warn(
            f"{directory}: has no {FILE}, so whether its data has changed is not known.",
            stacklevel=2,
        )
        return
    try:
        kept = [str(one["sha256"]) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({error!r:.100}); {remedy}.") from None
    if len(kept) != len(data):
        raise ValueError(f"{path}: is of {len(kept)} files, the recipe of {len(data)}; {remedy}.")
    for one, fingerprint in zip(data, kept, strict=True):
        if of(one) != fingerprint:
            raise ValueError(
                f"{one.path}: has changed since the run began: its rows, or how they become"
                f" tokens, are others. Bring the old ones back; or {remedy}."
            )
