"""Checkpoints behind URLs: read in ranges from a server or a bucket, or refused in a sentence."""

import contextlib
import http.server
import itertools
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest

import v4jax
from tests import checkpoints
from v4jax.adapters import merge, updates
from v4jax.checkpoints import convert, hub, remote, safetensors_file
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.commands import inspect
from v4jax.model import sharding

BF16 = jax.numpy.dtype("bfloat16")


class Server(http.server.ThreadingHTTPServer):
    """Serves a directory, with or without byte ranges.

    Attributes:
      ranges: whether it answers with the range that is requested, or always with the entire file.
      cuts: connections to cut halfway, for each file and range.
      status: status to answer requests for weights with, if not 0.
      sent: bytes sent of all safetensors files and chunks.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.directory = directory
        self.ranges, self.cuts, self.status, self.sent = True, 0, 0, 0
        self.asked: Counter[Any] = Counter()
        self.url = f"http://localhost:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        file = server.directory / self.path[1:]
        is_weights = file.suffix == ".safetensors"
        if not file.is_file() or (server.status and is_weights):
            self.send_error(server.status if file.is_file() else 404)
            return
        asked, size = self.headers.get("Range") or "", file.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if server.ranges else None
        with file.open("rb") as opened:
            opened.seek(int(span[1]) if span else 0)
            part = opened.read(int(span[2]) + 1 - int(span[1]) if span else -1)
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        key = self.path, asked
        server.asked[key] += 1
        if is_weights and span and server.asked[key] <= server.cuts:
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        if is_weights or "weights" in file.parts:
            server.sent += len(part)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[Server]:
    with Server(directory) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "released"
    cfg = checkpoints.tiny(layers=checkpoints.tiny().layers[1:3], num_nextn_predict_layers=0)
    checkpoints.write_release(folder, cfg, 1, fill="bytes")
    checkpoints.write_other_files(folder)
    return folder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)


def load(path: Any, mesh: Any = None) -> list[bytes]:
    checkpoint = open_checkpoint(hub.resolve(path))
    model, _ = checkpoint.load(BF16, keep_quantised=True, mesh=mesh, progress=None)
    return [np.asarray(array).tobytes() for array in jax.tree.leaves(model)]


def put_in_bucket(directory: Path, bucket: str) -> str:
    """Copy a directory to a bucket in memory; its URL."""
    files = fsspec.filesystem("memory")
    files.put(str(directory), f"/{bucket}", recursive=True)
    return f"memory://{bucket}"


def test_a_model_on_a_server_equals_the_local_one(released: Path, tmp_path: Path) -> None:
    convert.convert(released, tmp_path / "native")
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    for directory, pattern in ((released, "*.safetensors"), (tmp_path / "native", "weights/*/*")):
        with serve(directory) as server:
            assert load(server.url, mesh) == load(directory, mesh)
            total = sum(file.stat().st_size for file in directory.glob(pattern))
            assert server.sent < 1.01 * total


def test_v4jax_loads_a_url(released: Path) -> None:
    url = put_in_bucket(released, "bucket/whole")
    model, local = (v4jax.load(path, keep_quantised=True) for path in (url, released))
    assert (model.config, model.tokenizer is None) == (local.config, local.tokenizer is None)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(model.weights)] == load(released)


def test_cut_connections_are_repeated_but_not_for_ever(released: Path) -> None:
    with serve(released) as server:
        server.cuts = 2
        assert load(server.url) == load(released)
        server.asked.clear()
        server.cuts = 100
        with pytest.raises(CheckpointError, match=r"http://localhost:\d+/model-.*attempt 4 of 4"):
            load(server.url)
        assert max(server.asked.values()) <= 4 + 4  # the size, then the header


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"ranges": False}, r"safetensors: the server does not serve byte ranges; download"),
        ({"status": 403}, r"safetensors: could not be read \(403.*attempt 1 of 4"),
        ({"status": 404}, r"safetensors: does not exist, but the checkpoint needs it"),
    ],
    ids=str,
)
def test_a_server_that_cannot_serve_is_explained(
    released: Path, fault: dict[str, Any], message: str
) -> None:
    with serve(released) as server:
        vars(server).update(fault)
        with pytest.raises(CheckpointError, match=message):
            load(server.url)


def test_a_server_that_does_not_answer_is_explained() -> None:
    with Server(Path()) as server:
        url = server.url
    with pytest.raises(CheckpointError, match=r"config.json: could not be read \(Cannot connect"):
        load(url)


def test_a_bucket_is_converted_with_its_small_files(released: Path, tmp_path: Path) -> None:
    url = put_in_bucket(released, "bucket/model")
    assert load(url) == load(released)
    convert.convert(url, tmp_path / "remote")
    convert.convert(released, tmp_path / "local")
    contents = lambda folder: {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert inspect.find(url).config == inspect.find(released).config
    native_url = put_in_bucket(tmp_path / "local", "bucket/native")
    assert load(native_url) == load(released)
    with pytest.raises(CheckpointError, match="memory://bucket/native: is already a native"):
        convert.convert(native_url, tmp_path / "again")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (lambda _: load("memory://nothing/here"), "memory://nothing/here: is not a"),
    "unknown": (lambda _: load("gopher://a/b"), "gopher://a/b: Protocol not known.*gs://"),
    "revision": (lambda _: hub.resolve("memory://b", revision="x"), "leave revision 'x' out"),
    "export": (lambda out: convert.export("memory://b", out), "to export is read from a directory"),
    "adapter": (lambda _: updates.resolve("s3://b/a"), "an adapter is read from a directory"),
    "merge": (
        lambda out: merge.merge("gs://b", hub.TINY, out, weights="keep"),
        "a release to merge with is read from a directory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_from_a_url_is_refused(tmp_path: Path, case: str) -> None:
    act, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        act(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_and_directories_need_none(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert load(released)
    with pytest.raises(CheckpointError, match=r"gs://b: .*pip install 'v4jax\[bucket\]'"):
        load("gs://b")


@pytest.mark.parametrize("gap", [0, 3, 10**6])
def test_a_box_is_read_whatever_is_read_around_it(tmp_path: Path, gap: int) -> None:
    values = np.arange(2 * 6 * 5, dtype=np.int16).reshape(2, 6, 5)
    path = tmp_path / "f"
    info = safetensors_file.TensorInfo("I16", values.shape)
    safetensors_file.write_safetensors(path, {"w": info}, lambda _: values)
    opened = safetensors_file.open_safetensors(path)
    opened.file.gap = gap
    spans = lambda size: [slice(a, b) for a in range(size) for b in range(a, size + 1)]
    for box in itertools.product(*map(spans, values.shape)):
        np.testing.assert_array_equal(opened.read_box("w", box), values[box])
