"""The implementation of `v4jax.load`: from any kind of checkpoint to a model ready to run."""

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from v4jax import programs
from v4jax.adapters import updates
from v4jax.checkpoints import hub
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.language_model import LanguageModel
from v4jax.model import numerics
from v4jax.waiting import Progress


def load(
    path: str | Path,
    dtype: DTypeLike,
    numerics_name: numerics.Name,
    *,
    keep_quantised: bool,
    adapter: str | Path | None,
    mesh: Mesh | None,
    revision: str | None,
    progress: Progress | None,
) -> LanguageModel:
    """See `v4jax.load`."""
    programs.keep()
    rounding = numerics.get(numerics_name)
    checkpoint = open_checkpoint(hub.resolve(path, revision=revision))
    # Loading takes minutes, so errors of the adapter are raised before it.
    update = None
    if adapter is not None:
        update = updates.read(updates.resolve(adapter), checkpoint.config)
    model, cfg = checkpoint.load(
        jnp.dtype(dtype), keep_quantised=keep_quantised, mesh=mesh, progress=progress
    )
    if update is not None:
        model = updates.attach(model, cfg, update, jnp.dtype(dtype))
    return LanguageModel(model, cfg, rounding, jnp.dtype(dtype), checkpoint.tokenizer())
