"""Steps of training lowered for devices that are not here, with abstract weights.

See `v4jax.aot` for what the environment must have.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4jax import aot
from v4jax.adapters.lora import Lora
from v4jax.model import params, sharding
from v4jax.model.transformer import Model

from . import step, trainable
from .trainable import Parts


def lower(
    settings: step.Settings,
    rule: optax.GradientTransformation,
    mesh: Mesh,
    *,
    batch: int,
    seq_len: int,
    parts: int = 1,
    dtype: Any = jnp.bfloat16,
) -> jax.stages.Lowered:
    """Trace and lower a step for the mesh's devices.

    Args:
      settings: of the step; a base under an adapter is held in the release's formats.
      rule: the optimiser.
      mesh: of real devices, or of a topology.
      batch: packs of a step.
      seq_len: tokens of a pack.
      parts: into which the batch is cut.
      dtype: of weights that are trained in full, and of frozen ones that are not quantised.

    Returns:
      What `.compile()` makes a program of; its `memory_analysis` tells the bytes per device.

    Raises:
      ValueError: the mesh does not divide the weights or a part of the batch.
    """
    sharding.check_rows(batch // parts, mesh)
    taken = _taken_apart(settings, mesh, dtype)
    state = _spread(jax.eval_shape(lambda: step.begin(_zeros(taken), rule, 0)), taken, mesh)
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.RULES["batch"], None))
    whole = NamedSharding(mesh, PartitionSpec())
    shape = (parts, batch // parts, seq_len)
    local = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=rows)
        for name, kind in (("tokens", jnp.int32), ("trained", jnp.bool), ("document", jnp.int32))
    }
    limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    with jax.set_mesh(mesh):
        return step.make(settings, rule, like=state).lower(state, taken.frozen, local, limit)


def _taken_apart(settings: step.Settings, mesh: Mesh, dtype: Any) -> Parts:
    cfg, what = settings.cfg, settings.what
    declared, adapts = Model(cfg), isinstance(what, Lora)
    model = params.abstract(declared, dtype, cfg.expert_dtype if adapts else None)
    model = jax.tree.map(aot.placed, model, sharding.shardings(declared, mesh, model))
    if not adapts:
        return trainable.split(model, cfg, what, jax.random.key(0))
    factors = jax.eval_shape(lambda: trainable.split(model, cfg, what, jax.random.key(0)).trained)
    places = sharding.shardings(trainable.declare(cfg, what), mesh, factors)
    return Parts(jax.tree.map(aot.placed, factors, places), {}, model)


def _zeros(taken: Parts) -> Parts:
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    return Parts(zeros(taken.trained), zeros(taken.balanced), None)


def _spread(state: step.State, taken: Parts, mesh: Mesh) -> step.State:
    """An optimiser's moments lie as the weights that they are of; the rest is on all devices."""
    weights = jax.tree_util.tree_leaves_with_path((taken.trained, taken.balanced))
    keys = lambda path: tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
    place_of = {keys(path): leaf.sharding for path, leaf in weights}
    shape_of = {keys(path): leaf.shape for path, leaf in weights}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, struct: Any) -> jax.ShapeDtypeStruct:
        ends = [keys(path)[i:] for i in range(len(keys(path)))]
        name = next((end for end in ends if shape_of.get(end) == struct.shape), None)
        return aot.placed(struct, whole if name is None else place_of[name])

    return jax.tree_util.tree_map_with_path(place, state)
