"""Steps lowered for devices that are not here, with abstract weights: nothing is allocated.

Importing libtpu's compiler needs `TPU_SKIP_MDS_QUERY=1` in the environment before JAX starts, and
`JAX_PLATFORMS=cpu` where there is no TPU.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4jax import cache as caches
from v4jax import numerics, params, sharding, steps
from v4jax.config import ExpertDtype, ModelConfig
from v4jax.model import Model

Step = Literal["prefill", "decode"]


def topology_mesh(topology: str, **sizes: int) -> Mesh:
    """A mesh over a named topology, such as 'v5p:2x2x1' or 'v6e:8x8'.

    Args:
      topology: a chip and its shape, as libtpu names them.
      sizes: as `sharding.make_mesh` takes them; all devices on the expert axis by default.
    """
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = described.devices
    return sharding.make_mesh(**(sizes or {"expert": len(devices)}), devices=devices)


def lower(
    cfg: ModelConfig,
    step: Step,
    mesh: Mesh,
    *,
    batch: int,
    capacity: int,
    tokens: int = 512,
    dtype: Any = jnp.bfloat16,
    kept: ExpertDtype | None = None,
    rounding: numerics.Numerics = numerics.OFFICIAL,
) -> jax.stages.Lowered:
    """Trace and lower a step for the mesh's devices.

    Args:
      cfg: the model.
      step: 'decode' takes one token per row, 'prefill' a chunk of `tokens`.
      mesh: of real devices, or of a topology.
      batch: rows.
      capacity: tokens that the cache has room for.
      tokens: of a prefill chunk.
      dtype: of activations, cache and unquantised weights.
      kept: hold FP8 weights and experts quantised, experts in this format.
      rounding: the numerics.
    Returns:
      What `.compile()` makes a program of; its `memory_analysis` tells the bytes per device.
    """
    declared = Model(cfg)
    model = params.abstract(declared, dtype, kept)
    model = jax.tree.map(placed, model, sharding.shardings(declared, mesh, model))
    rows = sharding.partition_spec(("batch",))[0]
    by_row = lambda struct, dim: placed(struct, _rows(struct, dim, rows, mesh))
    cache = jax.eval_shape(lambda: caches.make(cfg, batch, capacity, dtype))
    cache = jax.tree.map(lambda struct: by_row(struct, 0 if struct.ndim == 1 else 1), cache)
    ints = lambda *shape: by_row(jax.ShapeDtypeStruct(shape, jnp.int32), 0)
    static = {"cfg": cfg, "numerics": rounding}
    with jax.set_mesh(mesh):
        if step == "decode":
            return steps.decode.lower(model, ints(batch), cache, **static)
        return steps.prefill.lower(model, ints(batch, tokens), cache, ints(batch), **static)


def placed(struct: Any, place: Any) -> jax.ShapeDtypeStruct:
    """The struct as one that lies in a place."""
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)


def _rows(struct: Any, dim: int, rows: Any, mesh: Mesh) -> NamedSharding:
    """Rows of the batch over the mesh, where they divide."""
    axes = [None] * struct.ndim
    ways = 1
    for name in rows:
        ways *= mesh.shape[name]
    if struct.shape[dim] % ways == 0:
        axes[dim] = rows
    return NamedSharding(mesh, PartitionSpec(*axes))
