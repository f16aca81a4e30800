"""Checkpoints in the release format, for any configuration, with random weights."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tokenizers

from v4jax import presets
from v4jax.checkpoints import tensor_names
from v4jax.checkpoints.formats import QUANTISED
from v4jax.checkpoints.safetensors_directory import write_checkpoint
from v4jax.checkpoints.safetensors_file import DTYPES, TensorInfo
from v4jax.model import config_json, params
from v4jax.model.config import DSpark, ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
Fill = Literal["normal", "bytes"]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor: its declaration and a function that creates its values."""

    info: TensorInfo
    make: Callable[[], np.ndarray]


def tiny(**changes: Any) -> ModelConfig:
    """The preset 'tiny' with changes."""
    return dataclasses.replace(presets.get("tiny"), **changes)


def tiny_dspark() -> ModelConfig:
    """The preset 'tiny' with the 0731 release's kind of drafter."""
    drafter = DSpark(block_size=5, markov_rank=8, noise_token_id=3, target_layer_ids=(2, 3, 4))
    return tiny(num_nextn_predict_layers=0, dspark=drafter)


def write_release(
    directory: Path,
    cfg: ModelConfig,
    seed: int,
    *,
    shards: int = 2,
    scales: str = "F8_E8M0",
    fill: Fill = "normal",
    dtype: str = "BF16",
) -> Path:
    """Write a checkpoint in DeepSeek's release format and return its directory.

    Args:
      directory: directory to create.
      cfg: configuration; its `quantized` and `expert_dtype` select FP8 and FP4.
      seed: seed of the values, together with each tensor's name.
      shards: number of files.
      scales: dtype of the scales of FP8 weights: F8_E8M0, or F32 as in Flash-Base.
      fill: 'normal' for weights that a model can run with; 'bytes' is faster, for large files.
      dtype: dtype of all tensors that are neither quantised nor always float32.
    """
    lazy = dict(tensors(cfg, seed, scales=scales, fill=fill, dtype=dtype))
    names = list(lazy)
    size = math.ceil(len(names) / shards)
    parts = [names[i : i + size] for i in range(0, len(names), size)]
    files = [{name: lazy[name].info for name in _in_file_order(part, lazy)} for part in parts]
    write_checkpoint(directory, config_json.to_json(cfg), files, lambda name: lazy[name].make())
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with a single token, which fits any vocabulary."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(directory / "tokenizer.json"))


def write_other_files(directory: Path) -> None:
    """Write a release's files other than weights, some of which are not copied with it."""
    write_tokenizer(directory)
    files = {
        "LICENSE": "as you like",
        "README.md": "a model\n",
        "generation_config.json": '{"temperature":   1.0}',
        "encoding/encode.py": "pass\n",
        "encoding/tests/case.json": "[1,\n",
        ".cache/lock": "",
        "pytorch_model.bin": "",
        "pytorch_model.bin.index.json": "{}",
    }
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def copied_files(directory: Path) -> dict[str, bytes]:
    """Contents of all files that are copied with a release's weights."""
    not_copied = (".cache/lock", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return {
        name: file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
        and (name := file.relative_to(directory).as_posix()) not in not_copied
        and file.suffix != ".safetensors"
    }


def _in_file_order(names: list[str], lazy: dict[str, LazyTensor]) -> list[str]:
    # The order of the safetensors package: wide dtypes first, then by name.
    return sorted(names, key=lambda name: (-DTYPES[lazy[name].info.dtype].itemsize, name))


def tensors(
    cfg: ModelConfig,
    seed: int,
    *,
    scales: str = "F8_E8M0",
    fill: Fill = "normal",
    dtype: str = "BF16",
) -> Iterator[tuple[str, LazyTensor]]:
    """All tensors of a release by name, the drafter's last."""
    for leaf, spec in params.leaves(Model(cfg)):
        for name in tensor_names.flatten(tensor_names.release_names(leaf, cfg)):
            yield from _tensor(name, _unstacked(spec), cfg, seed, scales, fill, dtype)
    if cfg.dspark is not None:
        for name, spec in _drafter(cfg, cfg.dspark):
            yield from _tensor(name, spec, cfg, seed, scales, fill, dtype)


def _unstacked(spec: ParamSpec) -> ParamSpec:
    stack = spec.stack_dims
    return dataclasses.replace(spec, shape=spec.shape[stack:], axes=spec.axes[stack:])


def _drafter(cfg: ModelConfig, dspark: DSpark) -> Iterator[tuple[str, ParamSpec]]:
    """DSpark's tensors: sliding blocks without the MTP projections, and matrices of its own."""
    blocks = dataclasses.replace(cfg, dspark=None, num_nextn_predict_layers=dspark.stages)
    for leaf, spec in params.leaves(Model(blocks)):
        if leaf.startswith("mtp.") and ".stack." in leaf:
            for name in tensor_names.flatten(tensor_names.release_names(leaf, blocks)):
                yield name, _unstacked(spec)
    D, last = cfg.hidden_size, f"mtp.{dspark.stages - 1}."
    yield "mtp.0.main_proj.weight", ParamSpec((D, 3 * D), (None, None), "fp8")
    yield "mtp.0.main_norm.weight", ParamSpec((D,), (None,))
    for matrix in ("markov_w1", "markov_w2"):
        shape = (cfg.vocab_size, dspark.markov_rank)
        yield f"{last}markov_head.{matrix}", ParamSpec(shape, (None, None))


def _tensor(
    name: str, spec: ParamSpec, cfg: ModelConfig, seed: int, scales: str, fill: Fill, dtype: str
) -> Iterator[tuple[str, LazyTensor]]:
    stored = spec.stored
    if stored == "expert":
        stored = cfg.expert_dtype if cfg.quantized and cfg.expert_dtype else "bf16"
    if stored in ("fp8", "fp4") and cfg.quantized:
        yield from _quantised(
            name, spec, stored, seed, scales if stored == "fp8" else "F8_E8M0", fill
        )
        return
    kind = {"f32": "F32", "i64": "I64"}.get(stored, dtype)
    make = lambda: _values(name, spec, seed, fill).astype(DTYPES[kind])
    yield name, LazyTensor(TensorInfo(kind, spec.shape), make)


def _quantised(
    name: str, spec: ParamSpec, stored: str, seed: int, scales: str, fill: Fill
) -> Iterator[tuple[str, LazyTensor]]:
    rows, columns = spec.shape
    block = (128, 128) if stored == "fp8" else (1, 32)
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    kind, shape = ("F8_E4M3", spec.shape) if stored == "fp8" else ("I8", (rows, columns // 2))

    def make() -> tuple[np.ndarray, np.ndarray]:
        if fill == "bytes":
            codes = _rng(name, seed).integers(0, 120, shape, np.uint8).view(DTYPES[kind])
            return codes, np.full(grid, 118, np.uint8).view(E8M0)
        values = _values(name, spec, seed, fill).astype(np.float32)
        return QUANTISED[stored].encode(values)

    # Not powers of two in float32, so that a round trip through E8M0 would be noticed.
    factor = 1.25 if scales == "F32" else 1.0
    scale = lambda: (make()[1].astype(np.float32) * np.float32(factor)).astype(DTYPES[scales])
    yield name, LazyTensor(TensorInfo(kind, shape), lambda: make()[0])
    yield tensor_names.scale_name(name), LazyTensor(TensorInfo(scales, grid), scale)


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _values(name: str, spec: ParamSpec, seed: int, fill: Fill) -> np.ndarray:
    rng = _rng(name, seed)
    if spec.init == "experts":
        noise = rng.random((spec.shape[0], int(spec.scale)), np.float32)
        return np.argsort(noise, axis=-1)[:, : spec.shape[1]]
    if fill == "bytes":
        return rng.integers(-127, 127, spec.shape, np.int8)
    noise = rng.standard_normal(spec.shape, np.float32)
    return spec.scale + 0.1 * noise if spec.init == "constant" else spec.scale * noise
