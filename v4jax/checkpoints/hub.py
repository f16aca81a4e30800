"""Checkpoints from the Hugging Face Hub: entire ones, or one shard at a time.

Cache, tokens, resuming and offline mode are huggingface_hub's, which is imported on first use.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from v4jax.checkpoints import disk, remote, safetensors_directory
from v4jax.checkpoints.disk import CheckpointError, require_space
from v4jax.checkpoints.safetensors_directory import TensorFiles
from v4jax.checkpoints.safetensors_file import (
    SafetensorsFile,
    TensorInfo,
    check_entries,
    open_safetensors,
)

# A small trained model, in the release format.
TINY = Path(str(resources.files("v4jax") / "data" / "tiny"))
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Weights, configuration and tokenizer, but not code or papers.
# Native checkpoints keep their weights in weights/.
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "weights/*")
_LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"


def resolve(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
) -> Path:
    """The local directory of a checkpoint or an adapter, downloaded if needed.

    Args:
      path_or_id: anything that `local` finds; else a checkpoint's URL, for `remote.resolve`, or a
        Hub id, `organisation/name`.
      revision: branch, tag or commit on the Hub; by default the main branch.
      allow_patterns: files to download; by default weights, configuration and tokenizer.
      ignore_patterns: files to leave out of these.

    Raises:
      CheckpointError: it is not here and cannot be downloaded; the message says why.
    """
    if (path := local(path_or_id, revision)) is not None:
        return path
    repo_id = str(path_or_id)
    if remote.is_url(repo_id):
        return remote.resolve(repo_id, revision)
    if not _ID.fullmatch(repo_id):
        raise CheckpointError(
            f"{repo_id}: no such file or directory, and not a Hub id either; those look like "
            "deepseek-ai/DeepSeek-V4-Flash."
        )
    import huggingface_hub

    patterns = list(allow_patterns or _PATTERNS)
    with _explained(repo_id, revision):
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(ignore_patterns or ()),
            )
        )


def local(path_or_id: str | Path, revision: str | None = None) -> Path | None:
    """The path if it exists; else for 'tiny' the package's own checkpoint, or None.

    Raises:
      CheckpointError: there is a revision, which only the Hub's repositories have.
    """
    path = Path(os.path.expanduser(path_or_id))
    if not os.path.exists(path):  # `Path.exists` raises if a name is too long
        if str(path_or_id) != "tiny":
            return None
        path = TINY
    if revision is not None:
        raise CheckpointError(
            f"{path_or_id}: is on this machine and has no revisions; leave revision "
            f"{revision!r} out, or give a Hub id."
        )
    return path


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub, and of its dependencies, into a CheckpointError."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{repo_id}: {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return f"the Hub's repository is gated: accept the terms on its page, then {_LOG_IN}."
        case errors.RepositoryNotFoundError():
            return (
                "no such directory here, and no such public repository on the Hub. "
                f"Check the spelling; for a private repository, {_LOG_IN}."
            )
        case errors.RevisionNotFoundError():
            return f"the Hub's repository has no revision {revision!r}; its page there lists them."
        case errors.RemoteEntryNotFoundError():
            return (
                "the Hub's repository lacks a file that a checkpoint must have; see its page there."
            )
        case _ if constants.HF_HUB_OFFLINE:
            return (
                "no such directory here, and the Hub's cache lacks some or all of it. "
                "HF_HUB_OFFLINE is set; unset it to download."
            )
    detail = " ".join(str(error.__cause__ or error).split())
    return (
        f"no such directory here, and the Hub could not be used: {detail:.200}. Check network, "
        "proxy, disk and HF_ENDPOINT, then try again: finished downloads are kept."
    )


class HubCheckpoint(TensorFiles):
    """A checkpoint on the Hub; its `version` is the commit.

    `open` fetches headers only. Reading from a shard downloads it and deletes the one before it,
    whose views occupy disk space while they live: read in the order of `names`, as every change of
    shard is a download. Shards that the Hub's cache already holds are read from there and kept.
    """

    def __init__(
        self,
        repo_id: str,
        commit: str,
        folder: Path,
        config: dict[str, Any],
        shards: dict[str, dict[str, TensorInfo]],
    ) -> None:
        super().__init__(Path(repo_id), config, shards)
        self.repo_id, self._commit, self._folder = repo_id, commit, folder
        self._held: tuple[str, SafetensorsFile] | None = None

    @classmethod
    def open(
        cls, repo_id: str, scratch: str | Path, *, revision: str | None = None
    ) -> "HubCheckpoint":
        """Fetch configuration, index and headers.

        Args:
          repo_id: `organisation/name`.
          scratch: a directory with room for the largest shard.
          revision: branch, tag or commit, resolved to a commit here; by default the main branch.

        Raises:
          CheckpointError: the checkpoint cannot be fetched, or is malformed.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi()
        with _explained(repo_id, revision):
            repo = api.model_info(repo_id, revision=revision)
        commit = str(repo.sha)

        def get(name: str) -> Path:
            with _explained(repo_id, commit):
                return Path(huggingface_hub.hf_hub_download(repo_id, name, revision=commit))

        def header(name: str) -> dict[str, TensorInfo]:
            with _explained(repo_id, commit):
                parsed = api.parse_safetensors_file_metadata(repo_id, name, revision=commit)
            entries = {name: vars(entry) for name, entry in parsed.tensors.items()}
            return check_entries(Path(repo_id, name), entries)

        config = disk.read_json(get(safetensors_directory.CONFIG))
        files = {sibling.rfilename for sibling in repo.siblings or ()}
        if safetensors_directory.SINGLE in files:
            shards = {safetensors_directory.SINGLE: header(safetensors_directory.SINGLE)}
        else:
            index = get(safetensors_directory.INDEX)
            file_of = safetensors_directory.read_index(index)
            shards = {name: header(name) for name in safetensors_directory.shard_names(file_of)}
            safetensors_directory.check_index(index, file_of, shards)
        folder = Path(scratch) / f"{repo_id.replace('/', '--')}.v4jax-shard"
        return cls(repo_id, commit, folder, config, shards)

    @property
    def version(self) -> str:
        return self._commit

    def _hold(self, shard: str) -> SafetensorsFile:
        if self._held is None or self._held[0] != shard:
            self.close()
            self._held = shard, open_safetensors(self._fetch(shard))
        return self._held[1]

    def _fetch(self, shard: str) -> Path:
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(self.repo_id, shard, revision=self._commit)
        if isinstance(cached, str):
            return Path(cached)
        self._folder.mkdir(parents=True)
        require_space(self._folder, sum(info.nbytes for info in self._shards[shard].values()))
        with _explained(self.repo_id, self._commit):
            return Path(
                huggingface_hub.hf_hub_download(
                    self.repo_id, shard, revision=self._commit, local_dir=self._folder
                )
            )

    def close(self) -> None:
        """Delete the current shard, and what an interrupted run left."""
        if self._held is not None:
            self._held[1].close()
            self._held = None
        if self._folder.exists():
            shutil.rmtree(self._folder)
