"""Checkpoints behind a URL: in a bucket (gs://, s3://), or on a server (https://).

The small files are copied to this machine, to a directory that says where the weights are; these
are read in place, as byte ranges. fsspec and its file systems do the transfer.
"""

import atexit
import functools
import itertools
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from v4jax.checkpoints import disk
from v4jax.checkpoints.byte_files import ByteFile, Incomplete, LocalFile
from v4jax.checkpoints.disk import CheckpointError

Result = TypeVar("Result")
# In a directory of small files: the URL of the rest.
_MARKER = ".v4jax-remote.json"
# The small files of a checkpoint that the library reads, native or not.
NAMES = (
    *("config.json", "model.safetensors.index.json", "v4jax.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
# A request takes as long as this many bytes.
_REQUEST_BYTES = 2**20
_ATTEMPTS, _FIRST_WAIT = 4, 0.25  # seconds before the second attempt, doubled for each other
_BUSY = (408, 429)  # statuses of HTTP that may pass, unlike others below 500
_INSTALL = "Install what it needs with pip install 'v4jax[bucket]'."


class _Path(PurePosixPath):
    """A URL as a path, for messages; pathlib drops one of its slashes."""

    def __str__(self) -> str:
        return re.sub(r"^([\w+.-]+:)/", r"\1//", super().__str__())


class RemoteFile:
    """A file in one of fsspec's file systems."""

    gap = _REQUEST_BYTES

    def __init__(self, files: Any, name: str, path: PurePath) -> None:
        self._files, self._name, self.path = files, name, path

    def size(self) -> int:
        return self._attempt(self._size)

    def _size(self) -> int:
        """The size; reads the last byte, as some servers send the entire file for any range."""
        with self._files.open(self._name, "rb", cache_type="none") as file:
            try:
                size = file.seek(0, 2)
                file.seek(max(size - 1, 0))
                file.read(1)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path}: the server does not serve byte ranges; download the checkpoint, "
                    "and give its directory."
                ) from error
            return size

    def modified(self) -> int:
        return 0

    def content(self) -> bytes:
        """All bytes of a small file."""
        return self._attempt(lambda: self._files.cat_file(self._name))

    def exists(self) -> bool:
        try:
            self.size()
        except Incomplete:
            return False
        return True

    def read_into(self, offsets: Sequence[int], parts: Sequence[memoryview]) -> None:
        for offset, part in zip(offsets, parts, strict=True):
            part[:] = self._attempt(functools.partial(self._range, offset, len(part)))

    def _range(self, offset: int, size: int) -> bytes:
        content = self._files.cat_file(self._name, start=offset, end=offset + size)
        if len(content) != size:
            raise OSError(f"{size:,} bytes were requested and {len(content):,} came")
        return content

    def _attempt(self, act: Callable[[], Result]) -> Result:
        """The result of `act`, which is repeated if a connection is lost or the server is busy.

        Raises:
          CheckpointError: it cannot be read; the message says why.
        """
        for attempt in itertools.count(1):
            try:
                return act()
            except CheckpointError:
                raise
            except Exception as error:  # the file systems have errors of their own
                if _is_missing(error):
                    message = f"{self.path}: does not exist, but the checkpoint needs it."
                    raise Incomplete(message) from error
                if attempt == _ATTEMPTS or _is_final(error):
                    raise CheckpointError(
                        f"{self.path}: could not be read ({_describe(error)}; attempt {attempt} of "
                        f"{_ATTEMPTS}). Check the network and your access, then try again."
                    ) from error
            time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
        raise AssertionError("the loop does not end")


def _is_missing(error: Exception) -> bool:
    # fsspec also says so of a server that it cannot reach; the cause is then one of aiohttp's.
    cause = error.__cause__
    unreachable = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    is_known = not unreachable or getattr(cause, "status", None) == 404
    return isinstance(error, FileNotFoundError) and is_known


def _is_final(error: Exception) -> bool:
    status = getattr(error.__cause__ or error, "status", 0)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _BUSY
    return refused or isinstance(error, PermissionError | ImportError | NotImplementedError)


def _describe(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    text = " ".join(str(cause or error).split())
    return f"{text:.200}" or type(cause or error).__name__


class Folder:
    """The files of a checkpoint: those of a directory, or of the URL that it stands for."""

    def __init__(self, directory: Path) -> None:
        marker = directory / _MARKER
        self._directory = directory
        self._remote = _Remote(disk.read_json(marker)["url"]) if marker.is_file() else None

    @property
    def is_local(self) -> bool:
        return self._remote is None

    @property
    def path(self) -> PurePath:
        """The directory or the URL, for messages."""
        return self._directory if self._remote is None else self._remote.path

    def file(self, name: str) -> ByteFile:
        if self._remote is None:
            return LocalFile(self._directory / name)
        return self._remote.file(name)

    def exists(self, name: str) -> bool:
        if self._remote is None:
            return (self._directory / name).is_file()
        return self._remote.file(name).exists()


class _Remote:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        self.path = _Path(url)
        try:
            import fsspec

            self._files, self._root = fsspec.url_to_fs(url)
        except ImportError as error:
            raise CheckpointError(f"{url}: {_describe(error)}. {_INSTALL}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{url}: {_describe(error)}. Give a URL such as gs://, s3:// or https://."
            ) from error

    def list(self) -> list[str]:
        root = f"{self._root.rstrip('/')}/"
        return [name.removeprefix(root) for name in self._files.find(root)]

    def file(self, name: str) -> RemoteFile:
        return RemoteFile(self._files, f"{self._root.rstrip('/')}/{name}", self.path / name)


def listing(url: str) -> list[str]:
    """All files of a folder behind a URL; those of `NAMES` if the server does not list them."""
    remote = _Remote(url)
    try:
        names = remote.list()
    except Exception:  # the file systems have errors of their own
        names = []
    return names or list(NAMES)


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return re.match(r"[a-zA-Z][\w+.-]+://", str(path)) is not None


def refuse(path: str | Path, what: str) -> None:
    """Raise if a path is a URL, of something that is only read from directories."""
    if is_url(path):
        raise CheckpointError(
            f"{path}: {what} is read from a directory or the Hub; copy it to a disk first."
        )


def resolve(url: str, revision: str | None = None, names: Collection[str] = NAMES) -> Path:
    """A directory with the checkpoint's small files, which `Folder` links to the rest.

    It is removed when the process ends.

    Args:
      url: folder of a checkpoint.
      revision: must be None, as only the Hub has revisions.
      names: the files to copy, as far as they exist.

    Raises:
      CheckpointError: there is no checkpoint, it cannot be read, or a package is missing.
    """
    if revision is not None:
        raise CheckpointError(
            f"{url}: has no revisions; leave revision {revision!r} out, or give a Hub id."
        )
    remote = _Remote(url)
    directory = Path(tempfile.mkdtemp(prefix="v4jax-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in names:
        try:
            content = remote.file(name).content()
        except Incomplete:
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    if not (directory / NAMES[0]).is_file():
        raise CheckpointError(
            f"{url}: is not a checkpoint, or is not public: it has no {NAMES[0]}. Give the URL of "
            "the folder that holds one."
        )
    disk.write_json(directory / _MARKER, {"url": url})
    return directory
