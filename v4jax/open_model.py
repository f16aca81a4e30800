"""`v4jax.load`: any kind of checkpoint to a model that is ready to run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from v4jax.adapters import updates
from v4jax.checkpoints import config_file, hub, native, passengers, release_weights
from v4jax.checkpoints.disk import Progress
from v4jax.decoding.loop import Engine
from v4jax.language_model import LanguageModel
from v4jax.model import numerics


def load(
    path: str | Path,
    dtype: DTypeLike,
    numerics_name: numerics.Name,
    *,
    keep: bool,
    adapter: str | Path | None,
    mesh: Mesh | None,
    progress: Progress | None,
) -> LanguageModel:
    """See `v4jax.load`."""
    rounding = numerics.get(numerics_name)
    directory = hub.resolve(path)
    # Loading takes minutes: what is wrong with an adapter is told before.
    update = None
    if adapter is not None:
        update = updates.read(updates.resolve(adapter), updates.open_config(directory))
    read: Any = native.load if native.is_native(directory) else release_weights.load
    model, cfg = read(directory, dtype=jnp.dtype(dtype), keep=keep, mesh=mesh, progress=progress)
    cfg = dataclasses.replace(cfg, eos_token_ids=config_file.end_tokens(directory, cfg))
    text = passengers.tokenizer(directory, cfg.vocab_size)
    if update is not None:
        model = updates.attach(model, cfg, update, jnp.dtype(dtype))
    return LanguageModel(Engine(model, cfg, rounding, jnp.dtype(dtype)), text)
