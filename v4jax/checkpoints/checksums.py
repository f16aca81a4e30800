"""SHA-256 digests of a directory's files, stored next to them as `sha256sum --check` reads them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from v4jax.checkpoints import disk
from v4jax.checkpoints.disk import sync_directory

FILE = "SHA256SUMS"
_THREADS = 4  # hashing releases the GIL


def write(folder: Path) -> None:
    """Write the digest of every file, for `damage` to compare with."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(_digests(folder).items()))
    disk.write_file(folder / FILE, "".join(lines).encode())
    sync_directory(folder)


def damage(folder: Path) -> str | None:
    """The name of a file that has changed since the digests were written, or None."""
    text = (folder / FILE).read_text(encoding="utf-8", errors="replace")
    lines = [line.partition("  ") for line in text.split("\n")[:-1]]
    written = {name: digest for digest, _, name in lines}
    current = _digests(folder)
    names = sorted(written.keys() | current)
    return next((name for name in names if written.get(name) != current.get(name)), None)


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != FILE]
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = threads.map(_digest, files)
        return {
            str(file.relative_to(folder)): digest
            for file, digest in zip(files, digests, strict=True)
        }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
