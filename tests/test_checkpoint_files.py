"""Checkpoint directories: index, shards, links, and the writer."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from v4jax.checkpoints import safetensors_directory, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_directory import Checkpoint, write_checkpoint
from v4jax.checkpoints.safetensors_file import TensorInfo, write_safetensors

CONFIG = {"model_type": "deepseek_v4", "hidden_size": 4}
SHARDS = [
    {"z": TensorInfo("F32", (2, 3)), "a": TensorInfo("BF16", (4,))},
    {"m": TensorInfo("F4", (2, 4)), "s": TensorInfo("F8_E8M0", (2, 1))},
]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def arrays() -> dict[str, np.ndarray]:
    """The tensors of `SHARDS`."""
    return {
        "z": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4).astype(ml_dtypes.bfloat16),
        "m": np.arange(4, dtype=np.uint8).reshape(2, 2),
        "s": np.full((2, 1), 127, np.uint8).view(ml_dtypes.float8_e8m0fnu),
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint with an index and two shards."""
    write_checkpoint(tmp_path / "ckpt", CONFIG, SHARDS, arrays().__getitem__)
    return tmp_path / "ckpt"


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def test_tensors_round_trip_in_shard_order(directory: Path):
    with Checkpoint.open(directory) as files:
        assert files.names == ("z", "a", "m", "s")
        assert files.config == CONFIG
        assert files.total_bytes == 24 + 8 + 4 + 2
        for name, array in arrays().items():
            read = files.read(name)
            assert (read.dtype, read.shape, read.tobytes()) == (
                array.dtype,
                array.shape,
                array.tobytes(),
            )
        assert files.info("m").shape == (2, 4)
        assert files.info("m").file == directory / SECOND
        np.testing.assert_array_equal(files.read("z", slice(1, 2)), arrays()["z"][1:2])


def test_shards_are_iterated_in_order_and_mapped_one_at_a_time(directory: Path):
    files = Checkpoint.open(directory)
    shards = [(shard, shard.read(shard.names[0]))[0] for shard in files.shards()]
    assert [shard.path.name for shard in shards] == [FIRST, SECOND]
    assert [shard._map is not None for shard in shards] == [False, True]
    files.close()
    assert shards[1]._map is None


def test_the_directory_has_the_standard_layout(directory: Path):
    assert sorted(os.listdir(directory)) == ["config.json", FIRST, SECOND, INDEX]
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"] == {"total_size": 38}
    assert index["weight_map"] == {"a": FIRST, "m": SECOND, "s": SECOND, "z": FIRST}
    assert safetensors.numpy.load_file(directory / FIRST)["z"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with safetensors.safe_open(directory / SECOND, framework="numpy") as shard:
        assert shard.metadata() == {"format": "pt"}


def write_single_file(directory: Path, value: float = 7.0) -> None:
    array = np.full((3,), value, np.float32)
    write_safetensors(
        directory / "model.safetensors", {"w": TensorInfo("F32", (3,))}, lambda _: array
    )


def test_a_single_file_is_read(tmp_path: Path):
    write_single_file(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).read("w").tolist() == [7, 7, 7]


def test_the_single_file_takes_precedence_over_an_index(directory: Path):
    write_single_file(directory)
    assert Checkpoint.open(directory).names == ("w",)


def test_an_unknown_name_raises_with_the_nearest(directory: Path):
    with pytest.raises(CheckpointError, match="ckpt: has no tensor 'zz'; the nearest is 'z'"):
        Checkpoint.open(directory).read("zz")


def write_shard(directory: Path, shard: str, infos: dict[str, TensorInfo]) -> None:
    """Rewrite a shard with these tensors."""
    write_safetensors(directory / shard, infos, arrays().__getitem__)


def set_map(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_index(directory, lambda index: change(index["weight_map"]))


def set_index(text: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / INDEX).write_bytes(text)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda d: (d / "config.json").unlink(),
        "is not a checkpoint: expected config.json",
    ),
    "no weights": (lambda d: (d / INDEX).unlink(), "is not a checkpoint: expected .*index.json"),
    "config is not JSON": (
        lambda d: (d / "config.json").write_text('{\n  "a": 1,\n  b\n}'),
        "config.json: line 3, column 3: ",
    ),
    "config is not UTF-8": (
        lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'),
        "config.json: not a JSON object in UTF-8",
    ),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json: not a JSON object",
    ),
    "index is not JSON": (set_index(b'{"weight_map": {'), r"index\.json: line 1, column 17"),
    "index has a name twice": (
        set_index(b'{"weight_map": {"a": "x", "a": "y"}}'),
        "index.json: .*'a' occurs twice",
    ),
    "no weight_map": (set_index(b"{}"), "index.json: weight_map is missing"),
    "weight_map is a list": (set_index(b'{"weight_map": []}'), "index.json: weight_map is missing"),
    "file name is a number": (
        set_map(lambda m: m.update(z=1)),
        "index.json: weight_map is missing",
    ),
    "shard is missing": (lambda d: (d / SECOND).unlink(), f"{SECOND}: does not exist.* download"),
    "shard is cut off": (
        lambda d: os.truncate(d / FIRST, (d / FIRST).stat().st_size - 3),
        f"{FIRST}: .*cut off.*again",
    ),
    "shard is above": (set_map(lambda m: m.update(z="../x")), "names the file '../x', which would"),
    "shard is absolute": (
        set_map(lambda m: m.update(z="/etc/passwd")),
        "names the file '/etc/passwd'",
    ),
    "shard on a drive": (set_map(lambda m: m.update(z="C:x")), "names the file 'C:x'"),
    "shard above, backwards": (set_map(lambda m: m.update(z="a\\..\\x")), "names the file"),
    "shard without name": (set_map(lambda m: m.update(z="")), "names the file ''"),
    "shard with a null": (set_map(lambda m: m.update(z="a\0b")), "does not exist"),
    "tensor is not in its shard": (
        set_map(lambda m: m.update(z=SECOND)),
        f"index.json: lists tensor 'z' in {SECOND}, which does not hold it",
    ),
    "tensor is nowhere": (
        set_map(lambda m: m.update(new=FIRST)),
        f"index.json: lists tensor 'new' in {FIRST}, which does not hold it",
    ),
    "tensor is not listed": (
        set_map(lambda m: m.pop("a")),
        f"index.json: does not list tensor 'a', which {FIRST} holds",
    ),
    "tensor in two shards": (
        lambda d: write_shard(d, SECOND, {**SHARDS[1], "a": SHARDS[0]["a"]}),
        f"index.json: tensor 'a' is both in {FIRST} and in {SECOND}",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_reported_with_file_and_remedy(directory: Path, case: str):
    damage, message = DAMAGE[case]
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


@pytest.mark.parametrize("name", ["nothing", "ckpt/config.json"])
def test_a_path_that_is_not_a_directory_is_rejected(directory: Path, name: str):
    with pytest.raises(CheckpointError, match=f"{name}: is not a directory"):
        Checkpoint.open(directory.parent / name)


def test_links_out_of_the_directory_are_followed(directory: Path):
    disk = directory.parent / "disk"
    disk.mkdir()
    for file in sorted(directory.iterdir()):
        file.rename(disk / file.name)
        file.symlink_to(disk / file.name)
    with Checkpoint.open(directory) as files:
        assert files.read("z")[1, 2] == 5
        assert files.info("m").file == directory / SECOND
    link = directory.parent / "link"
    link.symlink_to(directory)
    assert Checkpoint.open(link).names == ("z", "a", "m", "s")


def test_a_subdirectory_of_shards_may_be_a_link(directory: Path):
    disk = directory.parent / "disk"
    disk.mkdir()
    (directory / SECOND).rename(disk / SECOND)
    (directory / "more").symlink_to(disk)
    edit_index(
        directory,
        lambda index: index["weight_map"].update(m=f"more/{SECOND}", s=f"more/{SECOND}"),
    )
    assert Checkpoint.open(directory).read("m").tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", ["config.json", FIRST, INDEX])
def test_a_dangling_link_is_reported_with_its_target(directory: Path, name: str):
    (directory / name).unlink()
    (directory / name).symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to gone, which does not exist"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("store", ["models--o--n/blobs", "blobs/ab"])
def test_a_hub_snapshot_is_read_through_its_links(directory: Path, store: str):
    cache = directory.parent / "hub"
    blobs, snapshot = cache / store, cache / "models--o--n" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / f"{i}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{i}", snapshot))
    assert Checkpoint.open(snapshot).names == ("z", "a", "m", "s")


def test_an_exception_while_writing_leaves_no_files(tmp_path: Path):
    def read(name: str) -> np.ndarray:
        if name == "s":
            raise RuntimeError("lost")
        return arrays()[name]

    with pytest.raises(RuntimeError, match="lost"):
        write_checkpoint(tmp_path / "new", CONFIG, SHARDS, read)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_directory_does_not_look_like_a_checkpoint_and_is_replaced(tmp_path: Path):
    work = unfinished.scratch(tmp_path / "new") / "result"

    def read(name: str) -> np.ndarray:
        if name == "s":
            assert not (tmp_path / "new").exists()
            assert not (work / "left over").exists()
            with pytest.raises(CheckpointError, match="is not a checkpoint"):
                Checkpoint.open(work)
        return arrays()[name]

    work.mkdir(parents=True)
    (work / "left over").touch()
    # As left by a killed process.
    (work.parent / "journal.jsonl").write_text('{"v4jax": "write", "identity": ""}\n')
    write_checkpoint(tmp_path / "new", CONFIG, SHARDS, read)
    assert Checkpoint.open(tmp_path / "new").total_bytes == 38
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert not (tmp_path / "new" / "left over").exists()


def test_an_empty_target_is_used_and_a_nonempty_one_is_rejected(directory: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", CONFIG, SHARDS, arrays().__getitem__)
    before = sorted(os.listdir(tmp_path))
    for target in (directory, directory / "config.json"):
        with pytest.raises(CheckpointError, match="exists; choose another place"):
            write_checkpoint(target, CONFIG, SHARDS, lambda _: pytest.fail("work was done"))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_reported_before_any_work(tmp_path: Path, monkeypatch: Any):
    usage = type("Usage", (), {"free": 37})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="38 bytes are needed and 37 are free"):
        write_checkpoint(tmp_path / "new", CONFIG, SHARDS, lambda _: pytest.fail("work was done"))
    assert not list(tmp_path.iterdir())


def test_a_tensor_declared_in_two_shards_is_rejected(tmp_path: Path):
    with pytest.raises(CheckpointError, match="'a' is declared in two shards"):
        write_checkpoint(tmp_path / "new", CONFIG, [SHARDS[0]] * 2, arrays().__getitem__)


def test_the_index_is_written_last(tmp_path: Path, monkeypatch: Any):
    order: list[str] = []
    write_json = safetensors_directory.write_json

    def write(path: Path, value: Any, **settings: Any) -> None:
        order.append(path.name)
        write_json(path, value, **settings)

    monkeypatch.setattr(safetensors_directory, "write_json", write)
    read = lambda name: (order.append(name), arrays()[name])[1]
    write_checkpoint(tmp_path / "new", CONFIG, SHARDS, read)
    assert order == ["config.json", "z", "a", "m", "s", INDEX]


def test_extra_files_are_copied(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint(
        tmp_path / "new",
        CONFIG,
        SHARDS,
        arrays().__getitem__,
        extras=[tmp_path / "tokenizer.json"],
    )
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
