"""Values that no checkpoint may contain: every command that reads them rejects them by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import checkpoints
from v4jax.checkpoints import convert, export, native, release_weights, tensor_values
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import open_safetensors
from v4jax.checkpoints.tensor_values import are_finite, check, check_ids, check_scales

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
F32 = jnp.dtype("float32")
FLOATS = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, E4M3)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_finiteness_agrees_with_numpy(dtype: np.dtype) -> None:
    bits = min(8 * dtype.itemsize, 16)
    edges = [edge + step for edge in (0x7C00, 0x7F80, 0x7FF0, 0x8000) for step in (-1, 0, 1)]
    codes = np.array([*range(0, 2**bits, 199 if bits == 16 else 1), *edges, *reversed(edges)])
    codes[-len(edges) :] |= 0x8000
    codes = codes[codes < 2**bits].astype(np.uint64) << np.uint64(8 * dtype.itemsize - bits)
    values = codes.astype(f"u{dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values)
    assert 0 < finite.sum() < len(values)
    assert [are_finite(values[i : i + 1]) for i in range(len(values))] == finite.tolist()
    assert are_finite(values[finite])
    check("w", values[finite])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_non_finite_value_is_reported_with_its_index(dtype: np.dtype) -> None:
    values = np.ones((3, 4), dtype)
    values[1, 2] = values[2, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"w has 2 values .* the first at \[11, 2\]"):
        check("w", values, start=(10,))
    assert not are_finite(values[:, ::2])
    assert are_finite(values[:, 1::2])


def test_integers_and_empty_arrays_are_finite() -> None:
    for dtype in (np.uint8, np.int8, np.int64):
        assert are_finite(np.full(3, -1).astype(dtype))
    assert are_finite(np.zeros((0, 3), np.float32))


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("byte", [247, 254, 255])
def test_an_invalid_scale_is_reported_with_its_index(as_bytes: bool, byte: int) -> None:
    scale_NK = np.full((3, 4), 246, np.uint8)
    check_scales("w.scale", scale_NK)
    scale_NK[1, 2] = scale_NK[2, 0] = byte
    scales = scale_NK if as_bytes else scale_NK.view(E8M0)
    with pytest.raises(CheckpointError, match=r"w.scale has 2 scales .* the first at \[1, 2\]"):
        check_scales("w.scale", scales)


def test_codes_are_finite_at_the_largest_scale_but_not_at_the_next() -> None:
    largest = np.float32(448)
    assert np.isfinite((largest * np.float32(2.0**119)).astype(ml_dtypes.bfloat16))
    with np.errstate(over="ignore"):
        assert not np.isfinite(largest * np.float32(2.0**120))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 2.0**120])
def test_an_invalid_float_scale_is_reported(value: float) -> None:
    check_scales("w.scale", np.array([0, 1, 2.0**119], np.float32))
    with pytest.raises(CheckpointError, match=r"w.scale has 1 scales .* the first at \[1\]"):
        check_scales("w.scale", np.array([1, value], np.float32))


def test_strided_scales_are_checked() -> None:
    check_scales("w.scale", np.full((4, 4), 127, np.uint8).view(E8M0)[:, ::2])


@pytest.mark.parametrize("wrong", [-1, 4, 2**32, -(2**63)])
def test_an_expert_id_out_of_range_is_reported(wrong: int) -> None:
    ids = np.array([[0, 1], [2, 3]])
    check_ids("t", ids, 4)
    ids[1, 0] = wrong
    with pytest.raises(CheckpointError, match=r"t has 1 ids outside 0 to 3.* \[1, 0\]"):
        check_ids("t", ids, 4)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("release") / "source"
    return checkpoints.write_release(directory, checkpoints.tiny_dspark(), 0, shards=1)


def poke(directory: Path, name: str, code: bytes) -> None:
    """Overwrite the first bytes of a tensor."""
    [path] = directory.glob("*.safetensors")
    opened = open_safetensors(path)
    start = path.stat().st_size - sum(opened.info(name).nbytes for name in opened.names)
    with path.open("r+b") as file:
        file.seek(start + opened.info(name).start)
        file.write(code)


BF16_NAN, BF16_INF, F32_NAN = b"\xc0\x7f", b"\x80\xff", b"\x00\x00\xc0\x7f"
DAMAGE = {
    "an id too large": ("layers.0.ffn.gate.tid2eid", (8).to_bytes(8, "little")),
    "a gate": ("layers.2.ffn.gate.weight", BF16_NAN),
    "a bias": ("layers.2.ffn.gate.bias", F32_NAN),
    "a norm": ("layers.1.attn_norm.weight", BF16_INF),
    "the embedding": ("embed.weight", BF16_NAN),
    "a sink": ("layers.0.attn.attn_sink", F32_NAN),
    "a scale of hyper-connections": ("layers.0.hc_attn_scale", F32_NAN),
    "an FP8 code": ("layers.3.attn.wkv.weight", b"\x7f"),
    "a negative FP8 code": ("layers.3.attn.wq_a.weight", b"\xff"),
    "a scale of FP8": ("layers.3.attn.wkv.scale", b"\xff"),
    "a scale of FP4": ("layers.3.ffn.experts.5.w2.scale", b"\xff"),
    "a drafter's norm": ("mtp.0.main_norm.weight", BF16_NAN),
    "a scale too large": ("layers.3.ffn.experts.5.w1.scale", b"\xfe"),
}


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    return shutil.copytree(released, tmp_path / "source")


def test_only_damaged_tensors_are_rejected_when_read(copy: Path) -> None:
    for name, code in DAMAGE.values():
        poke(copy, name, code)
    tensors, *_ = release_weights.open_release(copy)
    damaged = {name for name, _ in DAMAGE.values()}
    assert len(damaged) == len(DAMAGE)
    for name, tensor in tensors.tensors.items():
        if name not in damaged:
            tensor.read()
    for name in damaged:
        for rows in (slice(0, 1), None):
            with pytest.raises(
                CheckpointError, match=f"safetensors: '{name}' has 1 .* first at .0"
            ):
                tensors[name].read(rows)


@pytest.mark.parametrize(
    ("case", "run"),
    [
        (
            "an id too large",
            lambda source, _: release_weights.load(source, dtype=F32, keep_quantised=True),
        ),
        (
            "an FP8 code",
            lambda source, _: release_weights.load(source, dtype=F32, keep_quantised=False),
        ),
        ("a norm", lambda source, target: convert.convert(source, target)),
        ("a scale of FP4", lambda source, target: convert.convert(source, target)),
        ("a drafter's norm", lambda source, target: convert.convert(source, target)),
    ],
)
def test_a_release_with_an_invalid_value_is_neither_loaded_nor_converted(
    copy: Path, tmp_path: Path, case: str, run: Callable[[Path, Path], Any]
) -> None:
    name, code = DAMAGE[case]
    poke(copy, name, code)
    with pytest.raises(CheckpointError, match=f"safetensors: '{name}' has 1 "):
        run(copy, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.fixture(scope="module")
def converted(released: Path) -> Path:
    convert.convert(released, released.parent / "native")
    return released.parent / "native"


NATIVE_DAMAGE = {
    "stacks.0.blocks.0.router.expert_ids_VA": (8).to_bytes(4, "little"),
    "stacks.0.blocks.0.attention_norm_D": BF16_NAN,
    "stacks.0.blocks.0.attention.kv_KD.codes": b"\x7f",
    "stacks.0.blocks.0.attention.kv_KD.scale": b"\xff",
    "norm_D": BF16_INF,
}


def test_a_native_checkpoint_with_invalid_values_is_neither_loaded_nor_exported(
    converted: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(converted, tmp_path / "native")
    for array, code in NATIVE_DAMAGE.items():
        folder = damaged / native.WEIGHTS / array
        chunk = min(file for file in folder.iterdir() if not file.name.startswith("."))
        chunk.write_bytes(code + chunk.read_bytes()[len(code) :])
    opened = native.Native(damaged)
    for array in NATIVE_DAMAGE:
        with pytest.raises(CheckpointError, match=rf"{array} has 1 (values|scales|ids)"):
            opened.read(array, ())
    for keep_quantised in (True, False):
        with pytest.raises(CheckpointError, match="has 1 "):
            native.load(damaged, dtype=F32, keep_quantised=keep_quantised)
    with pytest.raises(CheckpointError, match="has 1 "):
        export.export(damaged, tmp_path / "exported")


def test_a_tensor_read_twice_is_checked_once(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, *_ = release_weights.open_release(released)
    tensors["norm.weight"].read()
    monkeypatch.setattr(tensor_values, "check", lambda *_, **__: pytest.fail("checked again"))
    tensors["norm.weight"].read()
