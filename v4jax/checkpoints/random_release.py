"""Checkpoints in the release format with random weights, for any configuration.

Axis letters: V vocabulary, D hidden.
"""

import dataclasses
import math
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers

from v4jax import arguments
from v4jax.checkpoints import safetensors_directory, tensor_names
from v4jax.checkpoints.disk import write_json
from v4jax.checkpoints.formats import QUANTISED
from v4jax.checkpoints.safetensors_file import DTYPE_NAMES, TensorInfo
from v4jax.model import config_json, params
from v4jax.model.config import CONFIG, ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer

_SHARDS = 2
# Large enough that nearly all sampled tokens are words, small enough that they vary.
_HEAD_STD = 0.35


@arguments.checked(
    directory=arguments.DIRECTORY,
    cfg=CONFIG,
    seed=arguments.integer(0),
    tokenizer=arguments.optional(
        arguments.instance("a Tokenizer of the tokenizers library", tokenizers.Tokenizer)
    ),
)
def make_checkpoint(
    directory: Path, cfg: ModelConfig, seed: int, tokenizer: tokenizers.Tokenizer | None = None
) -> None:
    """Write a checkpoint in the release format with random weights; all of it is held in memory.

    Without a tokenizer, a demo one is written, and the head's rows are 0 except for entire words,
    so that the model writes words. The directory appears when it is complete.

    Args:
      directory: directory to create; may exist if empty.
      cfg: configuration; `quantized` and `expert_dtype` select FP8 and FP4. A demo tokenizer needs
        a vocabulary of 270 or more.
      seed: equal seeds give equal bytes.
      tokenizer: tokenizer to write; by default a demo one.

    Raises:
      ValueError: the directory is not empty, the vocabulary is too small, or the experts cannot be
        FP4.
    """
    words = None
    if tokenizer is None:
        tokenizer = build_demo_tokenizer(cfg.vocab_size)
        words = _words(Tokenizer(tokenizer))
    arrays = dict(_arrays(cfg, seed, words))
    infos = {n: TensorInfo(DTYPE_NAMES[array.dtype], array.shape) for n, array in arrays.items()}
    names = sorted(infos, key=lambda name: (-arrays[name].itemsize, name))
    size = math.ceil(len(names) / _SHARDS)
    shards = [{n: infos[n] for n in names[i : i + size]} for i in range(0, len(names), size)]
    with tempfile.TemporaryDirectory() as scratch:
        extras = [Path(scratch, "tokenizer.json"), Path(scratch, "generation_config.json")]
        tokenizer.save(str(extras[0]))
        write_json(extras[1], _generation_config(cfg), indent=2)
        safetensors_directory.write_checkpoint(
            directory, config_json.to_json(cfg), shards, arrays.__getitem__, extras=extras
        )


def _generation_config(cfg: ModelConfig) -> dict[str, object]:
    eos = list(cfg.eos_token_ids)
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    return {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos} | sampling


def _words(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a space and a word, and not a prefix of another such token."""
    texts = {
        i: tokenizer.token_bytes(i).decode(errors="replace") for i in range(tokenizer.vocab_size)
    }
    words = sorted((text, i) for i, text in texts.items() if text[:1] == " " and text[1:].isalpha())
    # In sorted order, a prefix is followed directly by a word that it begins.
    following = [text for text, _ in words[1:]] + [""]
    return [
        i for (text, i), after in zip(words, following, strict=True) if not after.startswith(text)
    ]


def _arrays(
    cfg: ModelConfig, seed: int, words: list[int] | None
) -> Iterator[tuple[str, np.ndarray]]:
    for leaf, spec in params.leaves(Model(cfg)):
        stack = spec.stack_dims
        spec = dataclasses.replace(spec, shape=spec.shape[stack:], axes=spec.axes[stack:])
        for name in tensor_names.flatten(tensor_names.release_names(leaf, cfg)):
            values = _values(spec, np.random.default_rng([seed, zlib.crc32(name.encode())]))
            if leaf == "head_VD" and words is not None:
                head_VD = np.zeros_like(values)
                head_VD[words] = values[words] * (_HEAD_STD / spec.scale)
                values = head_VD
            yield from _stored(name, values, spec, cfg)


def _values(spec: ParamSpec, rng: np.random.Generator) -> np.ndarray:
    match spec.init:
        case "constant":
            return np.full(spec.shape, spec.scale, np.float32)
        case "experts":
            noise = rng.random((spec.shape[0], int(spec.scale)))
            return np.argsort(noise, axis=-1)[:, : spec.shape[1]]
    return rng.standard_normal(spec.shape, np.float32) * np.float32(spec.scale)


def _stored(
    name: str, values: np.ndarray, spec: ParamSpec, cfg: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that store a weight in the release: itself, or its codes and scales."""
    match cfg.expert_dtype if spec.stored == "expert" else spec.stored:
        case "fp8" | "fp4" as stored if cfg.quantized:
            codes, scale = QUANTISED[stored].encode(values)
            yield name, codes
            yield tensor_names.scale_name(name), scale
        case "f32":
            yield name, values
        case "i64":
            yield name, values.astype(np.int64)
        case _:
            yield name, values.astype(ml_dtypes.bfloat16)
