"""Directories of training runs with chosen weights, written by the training package."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.adapters import lora
from v4jax.adapters.lora import Adapter, Lora
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.transformer import Model
from v4jax_train import runs, step
from v4jax_train.checkpoints import Checkpoints
from v4jax_train.recipe import ModelSource, Recipe, Steps
from v4jax_train.trainable import Full


def learned(cfg: ModelConfig, settings: Lora, seed: int = 0, size: float = 0.05) -> Adapter:
    """An adapter as after some training: no factor is zero."""
    adapter = lora.init(cfg, settings, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    changed = lambda x: np.asarray(x) + size * rng.standard_normal(x.shape, np.float32)
    return jax.tree.map(changed, adapter)


def write(
    directory: Path,
    model: Path,
    what: Lora | Full,
    trained: dict[str, Any],
    balanced: dict[str, Any] | None = None,
    *,
    step_number: int = 3,
    best: dict[str, Any] | None = None,
) -> Path:
    """Write a run with these weights after its last step, and `best` after its best one."""
    adapter, full = (what, None) if isinstance(what, Lora) else (None, what)
    source, length = ModelSource(path=str(model)), Steps(steps=9)
    recipe = Recipe(model=source, steps=length, adapter=adapter, full=full)
    if not (directory / runs.RECIPE).exists():
        runs.write_recipe(directory, recipe)
    on_device = lambda tree: jax.tree.map(jnp.asarray, tree)
    moments = on_device({"first": trained, "count": np.int32(step_number)})
    key = jax.random.key_data(jax.random.key(0))
    state = step.State(
        jnp.int32(step_number), on_device(trained), on_device(balanced or {}), moments, key
    )
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(step_number, state, {"step": step_number})
    if best is not None:
        checkpoints.save_best(1, (on_device(best), on_device(balanced or {})), {"step": 1})
    checkpoints.wait()
    checkpoints.close()
    return directory


def folded(cfg: ModelConfig, model: Model, settings: Lora, adapter: Adapter, dtype: Any) -> Model:
    """The model with the adapter merged, rounded to `dtype` but stored in float32."""
    # The shardings of the old weights, so that one program serves both.
    shardings = {name: value.sharding for name, value in params.leaves(model)}

    def fold(name: str, spec: params.ParamSpec, weight: Any) -> Any:
        if spec.stored == "i64":
            return weight
        if name in adapter:
            a, b = (np.asarray(adapter[name][part]) for part in "ab")
            weight = np.asarray(weight) + np.float32(settings.scale_of(name)) * (b @ a)
        weight = np.asarray(weight)
        if spec.stored != "f32":
            weight = weight.astype(dtype).astype(np.float32)
        return jax.device_put(weight, shardings[name])

    return params.map_leaves(fold, Model(cfg), model)
