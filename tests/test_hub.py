"""The Hub source against a fake server that answers the requests of huggingface_hub.

huggingface_hub reads its settings at import, so every client is a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from v4jax.checkpoints import hub
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_directory import write_checkpoint
from v4jax.checkpoints.safetensors_file import TensorInfo

COMMIT = "c0ffee" + "0" * 34
REPO = "org/name"
ROWS = 5_000
SHARDS = [{f"t{i}": TensorInfo("F32", (ROWS, 4))} for i in range(3)]
SHARD_NAMES = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]


class Hub(ThreadingHTTPServer):
    """One repository, 'org/name'; 'org/gated' requires a login, and nothing else exists.

    Attributes:
      files: content of each file by path.
      log: (method, file, Range header) of each request for a file.
      break_once: the file whose first transfer stops one MiB early.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.log: list[tuple[str, str, str | None]] = []
        self.break_once: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[str]:
        """Names of the files sent in full."""
        return [file for method, file, span in self.log if method == "GET" and span is None]


class Handler(BaseHTTPRequestHandler):
    """The endpoints: model info, the file tree, and files with ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        if "org/gated" in path:
            return self.refuse(403, "GatedRepo")
        if REPO not in path:
            return self.refuse(404, "RepoNotFound")
        if "/nosuch" in path:
            return self.refuse(404, "RevisionNotFound")
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self.send(json.dumps([self.entry(name) for name in self.hub.files]).encode())
        if path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            return self.send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        return self.send_file(path.split("/", 5)[5])

    def entry(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def send_file(self, name: str) -> None:
        span = self.headers.get("Range")
        self.hub.log.append((self.command, name, span))
        if name not in self.hub.files:
            return self.refuse(404, "EntryNotFound")
        content = self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if span is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.send(content[start:stop], 206, headers)
        if self.command == "GET" and name == self.hub.break_once:
            self.hub.break_once = None
            self.close_connection = True
            return self.send(content, 200, headers, sent=len(content) - 2**20)
        return self.send(content, 200, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def send(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])


def tensor(name: str) -> np.ndarray:
    return np.full((ROWS, 4), int(name[1:]), np.float32)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    write_checkpoint(tmp_path / "remote", {"model_type": "deepseek_v4"}, SHARDS, tensor)
    files = {p.name: p.read_bytes() for p in (tmp_path / "remote").iterdir()}
    with Hub(files | {"inference/model.py": b"code", "README.md": b"card"}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client(home: Path, url: str, script: str, **env: str) -> Any:
    """Run `script` in a new process; return its `out`, or its CheckpointError's text."""
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from v4jax.checkpoints import hub\n"
        "from v4jax.checkpoints.safetensors_directory import Checkpoint\n"
        "from v4jax.checkpoints.disk import CheckpointError\n"
        f"def run():\n    {script.strip().replace(chr(10), chr(10) + '    ')}\n    return out\n"
        "try:\n    out = run()\n"
        "except CheckpointError as error:\n    out = str(error)\n"
        "print(json.dumps(out))\n"
    )
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    inherited |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | settings | env,
        capture_output=True,
        check=False,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


OPEN = "path = hub.resolve('org/name')\nout = [str(path), Checkpoint.open(path).total_bytes]"
BYTES = 3 * ROWS * 16


def test_a_repository_is_downloaded_once_without_code(server: Hub, tmp_path: Path):
    path, total = client(tmp_path / "home", server.url, OPEN)
    assert total == BYTES
    assert path == str(tmp_path / "home/hub/models--org--name/snapshots" / COMMIT)
    assert sorted(server.gets()) == [
        "config.json",
        *SHARD_NAMES,
        "model.safetensors.index.json",
    ]
    server.log.clear()
    assert client(tmp_path / "home", server.url, OPEN) == [path, total]
    assert not server.log


def test_revision_and_patterns_are_passed_on(server: Hub, tmp_path: Path):
    script = "out = str(hub.resolve('org/name', revision='v1', allow_patterns=['README.md']))"
    path = client(tmp_path / "home", server.url, script)
    assert os.listdir(path) == ["README.md"]
    assert (tmp_path / "home/hub/models--org--name/refs/v1").read_text() == COMMIT


def test_a_broken_transfer_is_resumed(server: Hub, tmp_path: Path):
    content = np.random.default_rng(0).bytes(12 * 2**20)
    server.files["big.safetensors"] = content
    server.break_once = "big.safetensors"
    script = "out = str(hub.resolve('org/name', allow_patterns=['big*']))"
    path = client(tmp_path / "home", server.url, script)
    assert Path(path, "big.safetensors").read_bytes() == content
    first, second = (span for method, _, span in server.log if method == "GET")
    assert first is None
    # huggingface_hub keeps what it has received in steps of 10 MiB.
    assert second == f"bytes={10 * 2**20}-"


def test_an_interrupted_download_keeps_the_files_it_has(server: Hub, tmp_path: Path):
    script = f"out = str(hub.resolve('org/name', allow_patterns=['*.json', '{SHARD_NAMES[0]}']))"
    client(tmp_path / "home", server.url, script)
    server.log.clear()
    assert client(tmp_path / "home", server.url, OPEN)[1] == BYTES
    assert sorted(server.gets()) == SHARD_NAMES[1:]


def test_offline_mode_uses_the_cache(server: Hub, tmp_path: Path):
    home = tmp_path / "home"
    online = client(home, server.url, OPEN)
    server.log.clear()
    assert client(home, server.url, OPEN, HF_HUB_OFFLINE="1") == online
    assert not server.log


def test_offline_mode_with_nothing_cached_says_so(server: Hub, tmp_path: Path):
    error = client(tmp_path / "home", server.url, OPEN, HF_HUB_OFFLINE="1")
    assert "org/name: no such directory here, and the Hub's cache lacks some or all" in error
    assert "HF_HUB_OFFLINE is set; unset it to download." in error
    assert not server.log


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (
            "'org/mispelt'",
            ("no such directory here", "no such public repository", "'hf auth login'"),
        ),
        (
            "'org/gated'",
            ("org/gated: the Hub's repository is gated", "'hf auth login' or set HF_TOKEN"),
        ),
        (
            "'org/name', revision='nosuch'",
            ("org/name: the Hub's repository has no revision 'nosuch'",),
        ),
    ],
)
def test_a_refusal_of_the_hub_is_explained(
    server: Hub, tmp_path: Path, call: str, parts: tuple[str, ...]
):
    error = client(tmp_path / "home", server.url, f"out = str(hub.resolve({call}))")
    assert all(part in error for part in parts), error
    scratch = str(tmp_path / "scratch")
    name, _, revision = call.partition(", ")
    script = f"out = hub.HubCheckpoint.open({name}, {scratch!r}, {revision}).names"
    assert client(tmp_path / "home", server.url, script) == error


def test_a_missing_network_is_explained(tmp_path: Path):
    # Nothing listens on port 9.
    error = client(tmp_path / "home", "http://127.0.0.1:9", OPEN)
    assert "org/name: no such directory here, and the Hub could not be used: " in error
    assert "refused" in error
    assert "Check network" in error


def test_an_existing_path_is_returned_unchanged(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "path", ["./org/name", "/org", "a/b/c", "flash", "../x", "~/x", "org/na me"]
)
def test_what_cannot_be_a_hub_id_is_not_looked_up(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Neither the directory nor its parent contains any of these names.
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="no such file or directory, and not a Hub id either"):
        hub.resolve(path)


STREAM = """
import os
scratch = Path({scratch!r})
per_shard = []
with hub.HubCheckpoint.open('org/name', scratch) as ckpt:
    before = [ckpt.names, ckpt.info('t1').shape, ckpt.total_bytes, ckpt.config, scratch.exists()]
    for shard in ckpt.shards():
        on_disk = [p.name for p in scratch.rglob('*.safetensors')]
        per_shard.append([shard.path.name, on_disk, float(shard.read(shard.names[0]).mean())])
    rows = ckpt.read('t0', slice(1, 3))
    after_read = [p.name for p in scratch.rglob('*.safetensors')]
    last = [rows.shape, float(rows.sum()), str(ckpt.info('t1').file)]
cached = [p.name for p in Path({home!r}).rglob('*.safetensors')]
out = [before, per_shard, after_read, last, os.listdir(scratch), cached]
"""


def test_one_shard_at_a_time_is_on_disk(server: Hub, tmp_path: Path):
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    leftover = scratch / "org--name.v4jax-shard" / SHARD_NAMES[2]
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    script = STREAM.format(scratch=str(scratch), home=str(home))
    before, per_shard, after_read, last, after, cached = client(home, server.url, script)
    assert before == [["t0", "t1", "t2"], [ROWS, 4], BYTES, {"model_type": "deepseek_v4"}, True]
    assert per_shard == [[name, [name], i] for i, name in enumerate(SHARD_NAMES)]
    assert after_read == [SHARD_NAMES[0]]
    assert last == [[2, 4], 0, f"org/name/{SHARD_NAMES[1]}"]
    assert after == cached == []
    downloaded = [name for name in server.gets() if name in SHARD_NAMES]
    assert downloaded == [*SHARD_NAMES, SHARD_NAMES[0]]


def test_cached_shards_are_read_in_place_and_kept(server: Hub, tmp_path: Path):
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    path, _ = client(home, server.url, OPEN)
    server.log.clear()
    script = (
        f"with hub.HubCheckpoint.open('org/name', {str(scratch)!r}) as ckpt:\n"
        "    out = [str(shard.path) for shard in ckpt.shards()]"
    )
    assert client(home, server.url, script) == [f"{path}/{name}" for name in SHARD_NAMES]
    assert not set(server.gets()) & set(SHARD_NAMES)
    assert not scratch.exists()
    assert sorted(os.listdir(path)) == sorted(
        ["config.json", *SHARD_NAMES, "model.safetensors.index.json"]
    )


FETCH = "out = hub.HubCheckpoint.open('org/name', {!r}).read('t1').shape"


def test_a_shard_needs_disk_space(server: Hub, tmp_path: Path):
    script = (
        "import shutil\n"
        "shutil.disk_usage = lambda _: type('Usage', (), {'free': 5})\n"
        + FETCH.format(str(tmp_path / "scratch"))
    )
    error = client(tmp_path / "home", server.url, script)
    assert "80,000 bytes are needed and 5 are free" in error


def test_a_damaged_shard_is_refused(server: Hub, tmp_path: Path):
    server.files[SHARD_NAMES[1]] = server.files[SHARD_NAMES[1]][:-8]
    error = client(tmp_path / "home", server.url, FETCH.format(str(tmp_path / "scratch")))
    assert "cut off: 8 of 80,000 bytes of tensors are missing, from 't1' on" in error


@pytest.mark.parametrize("kind", ["no index", "bad header", "unlisted tensor"])
def test_an_invalid_repository_is_refused_before_any_shard_is_downloaded(
    server: Hub, tmp_path: Path, kind: str
):
    if kind == "no index":
        del server.files["model.safetensors.index.json"]
        reason = "org/name: the Hub's repository lacks a file that a checkpoint must have"
    elif kind == "bad header":
        content = server.files[SHARD_NAMES[1]]
        server.files[SHARD_NAMES[1]] = content.replace(b"[5000,4]", b"[5000,3]")
        reason = f"org/name/{SHARD_NAMES[1]}: tensor 't1' (F32 [5000, 3]) needs 60,000 bytes"
    else:
        index = json.loads(server.files["model.safetensors.index.json"])
        index["weight_map"]["t1"] = SHARD_NAMES[0]
        server.files["model.safetensors.index.json"] = json.dumps(index).encode()
        reason = "index.json: lists tensor 't1' in model-00001-of-00003.safetensors, which does not"
    error = client(tmp_path / "home", server.url, FETCH.format(str(tmp_path / "scratch")))
    assert reason in error
    assert not set(server.gets()) & set(SHARD_NAMES)
