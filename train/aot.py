"""Training steps lowered for devices that are not attached, with abstract weights.

See `v4jax.aot` for the requirements on the environment.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4jax import aot
from v4jax.adapters.lora_settings import Lora
from v4jax.model import params, sharding
from v4jax.model.sharding import AnyMesh
from v4jax.model.transformer import Model

from . import step, trainable
from .trainable import Parts


def lower(
    settings: step.Settings,
    rule: optax.GradientTransformation,
    mesh: Mesh,
    **sizes: Any,
) -> jax.stages.Lowered:
    """Trace and lower a step for the mesh's devices.

    Args:
      settings: settings of the step; an adapter's base has the release's formats.
      rule: the optimiser.
      mesh: mesh of real devices, or of a topology.
      sizes: keyword arguments of `arguments`.

    Returns:
      The lowered step; `memory_analysis` of its compiled form reports the bytes per device.

    Raises:
      ValueError: the mesh does not divide the weights or a part of the batch.
    """
    state, frozen, local, limit = arguments(settings, rule, mesh, **sizes)
    with jax.set_mesh(mesh):
        return step.make(settings, rule, like=state).lower(state, frozen, local, limit)


def arguments(
    settings: step.Settings,
    rule: optax.GradientTransformation,
    mesh: AnyMesh,
    *,
    batch: int,
    seq_len: int,
    parts: int = 1,
    dtype: Any = jnp.bfloat16,
) -> tuple[step.State, Any, dict[str, Any], Any]:
    """A step's arguments as abstract arrays, sharded as in training.

    Args:
      settings: as for `lower`.
      rule: the optimiser.
      mesh: mesh of real devices, or of a topology.
      batch: packs per step.
      seq_len: tokens per pack.
      parts: number of parts the batch is split into.
      dtype: dtype of fully trained weights, and of frozen ones that are not quantised.

    Raises:
      ValueError: the mesh does not divide the weights or a part of the batch.
    """
    sharding.check_rows(batch // parts, mesh)
    split = _abstract_parts(settings, mesh, dtype)
    state = _sharded(jax.eval_shape(lambda: step.begin(_zeros(split), rule, 0)), split, mesh)
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.RULES["batch"], None))
    replicated = NamedSharding(mesh, PartitionSpec())
    shape = (parts, batch // parts, seq_len)
    local = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=rows)
        for name, kind in (("tokens", jnp.int32), ("trained", jnp.bool), ("document", jnp.int32))
    }
    limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    return state, split.frozen, local, limit


def _abstract_parts(settings: step.Settings, mesh: AnyMesh, dtype: Any) -> Parts:
    cfg, what = settings.cfg, settings.what
    declared, adapts = Model(cfg), isinstance(what, Lora)
    model = params.abstract(declared, dtype, cfg.expert_dtype if adapts else None)
    model = jax.tree.map(aot.placed, model, sharding.shardings(declared, mesh, model))
    if not adapts:
        return trainable.split(model, cfg, what, jax.random.key(0))
    factors = jax.eval_shape(lambda: trainable.split(model, cfg, what, jax.random.key(0)).trained)
    places = sharding.shardings(trainable.declare(cfg, what), mesh, factors)
    return Parts(jax.tree.map(aot.placed, factors, places), {}, model)


def _zeros(split: Parts) -> Parts:
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    return Parts(zeros(split.trained), zeros(split.balanced), None)


def _sharded(state: step.State, split: Parts, mesh: AnyMesh) -> step.State:
    """The state with shardings: moments are sharded like their weights, the rest is replicated."""
    weights = jax.tree_util.tree_leaves_with_path((split.trained, split.balanced))
    keys = lambda path: tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
    place_of = {keys(path): leaf.sharding for path, leaf in weights}
    shape_of = {keys(path): leaf.shape for path, leaf in weights}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, struct: Any) -> jax.ShapeDtypeStruct:
        suffixes = [keys(path)[i:] for i in range(len(keys(path)))]
        name = next((suffix for suffix in suffixes if shape_of.get(suffix) == struct.shape), None)
        return aot.placed(struct, replicated if name is None else place_of[name])

    return jax.tree_util.tree_map_with_path(place, state)
