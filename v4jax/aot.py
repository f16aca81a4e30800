"""Lowering of steps for absent devices, with abstract weights: nothing is allocated.

The compiler of libtpu needs `TPU_SKIP_MDS_QUERY=1` in the environment before JAX starts, and
`JAX_PLATFORMS=cpu` on machines without a TPU.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from v4jax.decoding import sampling, steps
from v4jax.decoding.sampling import SamplingParams, SamplingState
from v4jax.model import cache as caches
from v4jax.model import numerics, params, sharding
from v4jax.model.config import ExpertDtype, ModelConfig
from v4jax.model.transformer import Model

Step = Literal["prefill", "decode", "begin", "advance"]


def topology_mesh(topology: str, **sizes: int) -> Mesh:
    """A mesh over a named topology, such as 'v5p:2x2x1' or 'v6e:8x8'.

    Args:
      topology: name of a chip and a shape, as in libtpu.
      sizes: sizes of the axes, see `sharding.make_mesh`; by default all devices are on the expert
        axis.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(**(sizes or {"expert": len(devices)}), devices=devices)


def lower(
    cfg: ModelConfig,
    step: Step,
    mesh: Mesh,
    *,
    rounding: numerics.Numerics = numerics.OFFICIAL,
    **sizes: Any,
) -> jax.stages.Lowered:
    """Trace and lower a step for the devices of a mesh.

    Args:
      cfg: configuration of the model.
      step: name of the step; see `arguments`.
      mesh: mesh of real devices or of a topology.
      rounding: the numerics.
      sizes: keyword arguments of `arguments`.

    Returns:
      The lowered step; `.compile().memory_analysis()` returns the bytes per device.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    inputs = arguments(cfg, step, mesh, **sizes)
    with jax.set_mesh(mesh):
        # `begin` only samples, so it has no numerics.
        static = {} if step == "begin" else {"numerics": rounding}
        return getattr(steps, step).lower(*inputs, cfg=cfg, **static)


def arguments(
    cfg: ModelConfig,
    step: Step,
    mesh: Mesh,
    *,
    batch: int,
    capacity: int,
    tokens: int = 512,
    dtype: Any = jnp.bfloat16,
    expert_format: ExpertDtype | None = None,
) -> tuple[Any, ...]:
    """A step's arguments as abstract arrays, sharded as in generation.

    Args:
      cfg: configuration of the model.
      step: 'decode' takes one token per row, 'prefill' a chunk of `tokens`; generation runs 'begin'
        and 'advance' after its prefill.
      mesh: mesh of real devices or of a topology.
      batch: number of rows. A single row is replicated; more are sharded.
      capacity: capacity of the cache, in tokens.
      tokens: size of a prefill chunk.
      dtype: dtype of activations, cache and unquantised weights.
      expert_format: keep FP8 weights and experts quantised, with experts in this format.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    sharding.check_rows(batch, mesh)
    declared = Model(cfg)
    model = params.abstract(declared, dtype, expert_format)
    model = jax.tree.map(placed, model, sharding.shardings(declared, mesh, model))
    cache = jax.eval_shape(lambda: caches.make(cfg, batch, capacity, dtype))
    cache = jax.tree.map(lambda x: placed(x, caches.place(x.shape, mesh)), cache)
    rows = lambda *shape, of=jnp.int32: _rows((batch, *shape), of, mesh, "batch")
    match step:
        case "decode":
            return model, rows(), cache
        case "prefill":
            return model, rows(tokens), cache, rows()
    state = _sampling(cfg, batch, mesh)
    if step == "begin":
        logits_BV = _rows((batch, cfg.vocab_size), jnp.float32, mesh, "batch", "vocab")
        return logits_BV, cache, state, rows()
    parts = cache, state, rows(), rows(), rows(of=bool)
    loop = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(steps.Loop, *parts)), jax.tree.leaves(parts)
    )
    return model, loop, _rows((), jnp.int32, mesh)


def placed(struct: Any, place: Any) -> jax.ShapeDtypeStruct:
    """The struct with a sharding."""
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.place(axes, shape, mesh))


def _sampling(cfg: ModelConfig, batch: int, mesh: Mesh) -> SamplingState:
    prompts_BT, lengths_B = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
    settings = [SamplingParams(seed=0)] * batch
    state = jax.eval_shape(lambda: sampling.init(settings, cfg.vocab_size, prompts_BT, lengths_B))
    return jax.tree.map(placed, state, sampling.shardings(state, mesh))
