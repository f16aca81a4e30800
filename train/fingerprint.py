"""Fingerprints of a run's data, so that it does not continue with other data unnoticed."""

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
    """A digest of a file's documents: their tokens, and which of these are trained."""
    digest = hashlib.sha256()
    for array in (documents.ids_S, documents.trained_S, documents.ends_D.astype(np.int64)):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write(directory: Path, data: Sequence[Documents]) -> None:
    """Write the fingerprints of a run's files to its directory."""
    files = [{"file": documents.path, "sha256": of(documents)} for documents in data]
    write_file(directory / FILE, (json.dumps(files, indent=1) + "\n").encode())


def check(directory: Path, data: Sequence[Documents]) -> None:
    """Reject files whose documents have changed since their fingerprints were written.

    Raises:
      ValueError: names the file that has changed.
    """
    path = directory / FILE
    remedy = "use --changed-data to continue with the data as it is now"
    if not path.is_file():
        warnings.warn(
            f"{directory}: has no {FILE}, so whether its data has changed is unknown.", stacklevel=2
        )
        return
    try:
        digests = [str(file["sha256"]) for file in json.loads(path.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({error!r:.100}); {remedy}.") from None
    if len(digests) != len(data):
        raise ValueError(
            f"{path}: has {len(digests)} files, but the recipe has {len(data)}; {remedy}."
        )
    for documents, digest in zip(data, digests, strict=True):
        if of(documents) != digest:
            raise ValueError(
                f"{documents.path}: has changed since the run began: its rows, or how they become"
                f" tokens, are different. Restore the old file, or {remedy}."
            )
