"""`v4jax.load`: any kind of checkpoint to a model that is ready to run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from v4jax import hub, huggingface, native, numerics
from v4jax.generate import Engine
from v4jax.language_model import LanguageModel
from v4jax.safetensors_file import CheckpointError
from v4jax.tokenizer import Tokenizer

_DTYPES = ("bfloat16", "float32")


def load(
    path: str | Path,
    dtype: str,
    numerics_name: numerics.Name,
    *,
    keep: bool,
    mesh: Mesh | None,
    progress: Callable[[str, int, int], None] | None,
) -> LanguageModel:
    """See `v4jax.load`."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}.")
    rounding = numerics.get(numerics_name)
    directory = hub.resolve(path)
    read: Any = native.load if native.is_native(directory) else huggingface.load
    model, cfg = read(directory, dtype=jnp.dtype(dtype), keep=keep, mesh=mesh, progress=progress)
    text = tokenizer(directory)
    if text is not None and text.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{directory / 'tokenizer.json'}: {text.vocab_size} tokens, but the model's vocabulary "
            f"has {cfg.vocab_size}. Take the tokenizer of this checkpoint."
        )
    return LanguageModel(Engine(model, cfg, rounding, jnp.dtype(dtype)), text)


def tokenizer(directory: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, if it has one."""
    file = directory / "tokenizer.json"
    return Tokenizer.load(file) if file.exists() else None
