"""The safetensors reader and writer, checked against the safetensors package where it can read."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.checkpoints import safetensors_file
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import (
    DTYPES,
    TensorInfo,
    open_safetensors,
    write_safetensors,
)

NUMPY_CANNOT = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One directory for all examples of a property; each example overwrites its files."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def random_array(info: TensorInfo, seed: int) -> np.ndarray:
    """Random bit patterns of the dtype, NaN included."""
    rng = np.random.default_rng(seed)
    if info.dtype == "BOOL":
        return rng.integers(0, 2, info.array_shape).astype(np.bool_)
    raw = rng.integers(0, 256, info.nbytes, dtype=np.uint8)
    return raw.view(DTYPES[info.dtype]).reshape(info.array_shape)


def container(header: Any, data: bytes = b"") -> bytes:
    """A file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A header entry for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter("__metadata__".__ne__)


@settings(deadline=None, max_examples=120)
@given(
    drawn=st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6),
    seed=st.integers(0, 99),
)
def test_round_trips_are_exact_and_the_package_reads_the_same(
    folder: Path, drawn: dict[str, tuple[str, tuple[int, ...]]], seed: int
):
    tensors = {
        name: TensorInfo(dtype, (*shape, 2) if dtype == "F4" else shape)
        for name, (dtype, shape) in drawn.items()
    }
    arrays = {name: random_array(info, seed) for name, info in tensors.items()}
    path = folder / "round.safetensors"
    write_safetensors(path, tensors, arrays.__getitem__, metadata={"format": "pt"})
    with open_safetensors(path) as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.names) == set(tensors)
        for name, array in arrays.items():
            read = file.read(name)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()
            assert (file.info(name).dtype, file.info(name).shape) == (
                tensors[name].dtype,
                tensors[name].shape,
            )
    for name, theirs in safetensors.deserialize(path.read_bytes()):
        assert bytes(theirs["data"]) == arrays[name].tobytes()
        assert (theirs["dtype"], tuple(theirs["shape"])) == (
            tensors[name].dtype,
            tensors[name].shape,
        )
    with safetensors.safe_open(path, framework="numpy") as theirs:
        for name in tensors:
            if tensors[name].dtype not in NUMPY_CANNOT:
                assert theirs.get_tensor(name).tobytes() == arrays[name].tobytes()


def package_file(path: Path) -> dict[str, np.ndarray]:
    """A file written by the package, with every dtype that it can write."""
    dtypes = [d for d in DTYPES if d != "F4"]
    arrays = {f"\u00e9 {d}": random_array(TensorInfo(d, (3, 5)), i) for i, d in enumerate(dtypes)}
    arrays["scalar"] = np.array(7.0, np.float32)
    arrays["empty"] = np.zeros((0, 3), ml_dtypes.bfloat16)
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    return arrays


def test_files_written_by_the_package_are_read(tmp_path: Path):
    arrays = package_file(tmp_path / "theirs")
    file = open_safetensors(tmp_path / "theirs")
    assert set(file.names) == set(arrays)
    for name, array in arrays.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()
        assert file.info(name).nbytes == array.nbytes
        assert file.info(name).file == tmp_path / "theirs"


def test_copying_a_file_of_the_package_preserves_its_bytes(tmp_path: Path):
    package_file(tmp_path / "theirs")
    file = open_safetensors(tmp_path / "theirs")
    infos = {name: file.info(name) for name in file.names}
    write_safetensors(tmp_path / "ours", infos, file.read, metadata=file.metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_are_read_only_and_survive_closing(tmp_path: Path):
    arrays = package_file(tmp_path / "f")
    with open_safetensors(tmp_path / "f") as file:
        view = file.read("\u00e9 BF16", slice(1, 3))
    assert not view.flags.writeable
    assert view.base is not None  # a view, not a copy
    assert view.tobytes() == arrays["\u00e9 BF16"][1:3].tobytes()
    assert file.read("scalar") == 7.0  # reading again reopens the file


def test_f4_is_packed_two_to_a_byte(tmp_path: Path):
    info = TensorInfo("F4", (3, 8))
    codes = random_array(info, 0)
    write_safetensors(tmp_path / "f", {"w": info}, lambda _: codes)
    file = open_safetensors(tmp_path / "f")
    assert file.info("w").shape == (3, 8)
    assert file.info("w").nbytes == 12
    assert file.read("w").dtype == np.uint8
    np.testing.assert_array_equal(file.read("w", slice(1, 2)), codes[1:2])


def test_resident_memory_is_bounded_while_streaming(tmp_path: Path, monkeypatch: Any):
    mebibytes = 2**20
    tensors = {f"t{i}": TensorInfo("U8", (4 * mebibytes,)) for i in range(32)}
    block = np.ones(4 * mebibytes, np.uint8)
    write_safetensors(tmp_path / "f", tensors, lambda _: block)
    monkeypatch.setattr(safetensors_file, "_DROP_AFTER_BYTES", 8 * mebibytes)
    process = psutil.Process()
    with open_safetensors(tmp_path / "f") as file:
        before, peak = process.memory_info().rss, 0
        for name in file.names:
            assert int(file.read(name).max()) == 1
            peak = max(peak, process.memory_info().rss - before)
    # 128 MiB are read: 8 may stay resident, 4 are in use, the rest is the allocator's.
    assert peak < 32 * mebibytes


def test_an_unknown_name_is_reported_with_the_nearest_one(tmp_path: Path):
    package_file(tmp_path / "f")
    file = open_safetensors(tmp_path / "f")
    with pytest.raises(
        CheckpointError, match=r"f: has no tensor 'scaler'; the nearest is 'scalar'"
    ):
        file.read("scaler")


def test_a_file_that_changed_while_open_is_rejected(tmp_path: Path):
    package_file(tmp_path / "f")
    file = open_safetensors(tmp_path / "f")
    os.truncate(tmp_path / "f", 100)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        file.read("scalar")


MALFORMED = {
    "empty": (b"", "has 0 bytes"),
    "shorter than its length field": (b"\x00" * 7, "has 7 bytes"),
    "header longer than the file": (
        b"\x40" + b"\x00" * 7 + b"{}",
        "inside its header, 62 bytes early",
    ),
    "absurd header length": (b"\xff" * 16, "declares a header of 18,446,744,073,709,551,615 bytes"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not json": (container(b"{nonsense"), "not valid JSON"),
    "not an object": (container([1, 2]), "not valid JSON: it is not an object"),
    "not utf-8": (container(b'{"\xff": 1}'), "not valid JSON: 'utf-8' codec"),
    "nested without end": (container(b"[" * 100_000), "not valid JSON"),
    "duplicate tensor": (
        container(b'{"w": %b, "w": %b}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
        "the key 'w' occurs twice",
    ),
    "duplicate field": (
        container(b'{"w": {"dtype": "U8", "dtype": "I8", "shape": [], "data_offsets": [0, 1]}}'),
        "the key 'dtype' occurs twice",
    ),
    "metadata not strings": (container({"__metadata__": {"n": 1}}), "__metadata__"),
    "metadata not an object": (container({"__metadata__": "x"}), "__metadata__"),
    "entry not an object": (container({"w": 3}), "tensor 'w' lacks"),
    "no dtype": (container({"w": {"shape": [4], "data_offsets": [0, 4]}}), "tensor 'w' lacks"),
    "no shape": (container({"w": {"dtype": "U8", "data_offsets": [0, 4]}}), "tensor 'w' lacks"),
    "no offsets": (container({"w": {"dtype": "U8", "shape": [4]}}), "tensor 'w' lacks"),
    "unknown dtype": (
        container({"w": entry("F6_E2M3")}, b"1234"),
        "'w' has dtype 'F6_E2M3'; convert",
    ),
    "dtype not a string": (container({"w": entry(["U8"])}, b"1234"), r"'w' has dtype \['U8'\]"),
    "shape not a list": (container({"w": entry(shape=4)}, b"1234"), "'w' has shape 4"),
    "shape of floats": (container({"w": entry(shape=[4.0])}, b"1234"), r"'w' has shape \[4.0\]"),
    "shape of booleans": (container({"w": entry(shape=[True])}, b"1"), r"'w' has shape \[True\]"),
    "negative size": (
        container({"w": entry(shape=[-2, -2])}, b"1234"),
        r"'w' has shape \[-2, -2\]",
    ),
    "huge size": (container({"w": entry(shape=[2**70])}, b"1234"), "too large to be real"),
    "huge size times zero": (
        container({"w": entry(shape=[0, 2**70], offsets=[0, 0])}),
        "too large to be real",
    ),
    "too many dims": (
        container({"w": entry(shape=[1] * 33, offsets=[0, 1])}, b"1"),
        "'w' has shape",
    ),
    "odd F4": (container({"w": entry("F4", [2, 3], [0, 3])}, b"123"), "last dim must be even"),
    "scalar F4": (container({"w": entry("F4", [], [0, 1])}, b"1"), "last dim must be even"),
    "one offset": (container({"w": entry(offsets=[0])}, b"1234"), r"'w' has offsets \[0\]"),
    "negative offset": (container({"w": entry(offsets=[-4, 0])}, b"1234"), "'w' has offsets"),
    "offsets reversed": (container({"w": entry(offsets=[4, 0])}, b"1234"), "'w' has offsets"),
    "offset not an int": (container({"w": entry(offsets=[0, "4"])}, b"1234"), "'w' has offsets"),
    "size against shape": (
        container({"w": entry(shape=[3])}, b"1234"),
        r"'w' \(U8 \[3\]\) needs 3 bytes, but its offsets span 4",
    ),
    "overlap": (
        container({"v": entry(), "w": entry(offsets=[2, 6])}, b"123456"),
        "'w' begins at byte 2, not 4: it overlaps",
    ),
    "hole": (
        container({"v": entry(), "w": entry(offsets=[5, 9])}, b"123456789"),
        "'w' begins at byte 5, not 4: it has a gap",
    ),
    "hole at the start": (
        container({"w": entry(offsets=[1, 5])}, b"12345"),
        "'w' begins at byte 1",
    ),
    "cut off": (
        container({"v": entry(), "w": entry(offsets=[4, 8])}, b"12345"),
        "cut off: 3 of 8 bytes of tensors are missing, from 'w' on. Download it again",
    ),
    "bytes at the end": (container({"w": entry()}, b"123456"), "2 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_rejected_with_its_name_and_the_reason(tmp_path: Path, case: str):
    content, reason = MALFORMED[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{reason}"):
        open_safetensors(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["missing", "."])
def test_paths_that_are_not_files_are_rejected(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_safetensors(tmp_path / name)


def read_all(path: Path) -> None:
    """Read every tensor, or raise CheckpointError."""
    with open_safetensors(path) as file:
        for name in file.names:
            assert len(file.read(name).tobytes()) == file.info(name).nbytes


def small_file() -> bytes:
    """A valid file with tensors of several kinds."""
    tensors = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("F4", [2, 4], [24, 28]),
        "c": entry("BF16", [], [28, 30]),
        "d": entry("F8_E8M0", [0], [30, 30]),
    }
    return container(tensors, bytes(30))


SMALL = small_file()


def test_a_file_truncated_anywhere_is_rejected(tmp_path: Path):
    for length in range(len(SMALL)):
        (tmp_path / "f").write_bytes(SMALL[:length])
        with pytest.raises(CheckpointError):
            read_all(tmp_path / "f")


@settings(deadline=None, max_examples=400)
@given(edits=st.lists(st.tuples(st.integers(0, len(SMALL) - 31), st.integers(0, 255)), min_size=1))
def test_corruption_of_the_header_is_an_error_or_a_valid_read(
    folder: Path, edits: list[tuple[int, int]]
):
    content = bytearray(SMALL)
    for position, value in edits:
        content[position] = value
    if check_error_or_valid(folder, bytes(content)):
        safetensors.deserialize(bytes(content))  # raises if the package rejects it


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F6"]) | json_values,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 8), min_size=2, max_size=2) | json_values,
    },
)


@settings(deadline=None, max_examples=200)
@given(header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), json_values | entries))
def test_any_json_as_header_is_an_error_or_a_valid_read(folder: Path, header: Mapping[str, Any]):
    check_error_or_valid(folder, container(header, bytes(8)))


def check_error_or_valid(folder: Path, content: bytes) -> bool:
    (folder / "f").write_bytes(content)
    try:
        read_all(folder / "f")
    except CheckpointError:
        return False
    return True


def test_importing_the_file_layer_imports_nothing_heavy():
    script = (
        "import sys, v4jax.checkpoints.hub, v4jax.checkpoints.safetensors_directory\n"
        "heavy = {'jax', 'flax', 'torch', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "print(*heavy)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert result.stdout.strip() == b""
