"""Lowering of steps for absent devices, with abstract weights: nothing is allocated.

The compiler of libtpu needs `TPU_SKIP_MDS_QUERY=1` in the environment before JAX starts, and
`JAX_PLATFORMS=cpu` on machines without a TPU.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from v4jax.decoding import steps
from v4jax.engine import device, inputs, programs
from v4jax.engine.arrays import Static
from v4jax.engine.build import STOPS
from v4jax.engine.inputs import Shape
from v4jax.engine.settings import page_of
from v4jax.model import cache as caches
from v4jax.model import numerics, params, sharding
from v4jax.model.cache import BLOCK
from v4jax.model.config import ExpertDtype, ModelConfig
from v4jax.model.sharding import AnyMesh
from v4jax.model.transformer import Model

Step = Literal["prefill", "decode", "read", "advance"]
_OF_ENGINE: dict[str, Any] = {"read": programs.prefill, "advance": programs.advance}


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
    drafts: int = 0,
    top: int = 0,
    **sizes: Any,
) -> jax.stages.Lowered:
    """Trace and lower a step for the devices of a mesh.

    Args:
      cfg: configuration of the model.
      step: name of the step; see `arguments`.
      mesh: mesh of real devices or of a topology.
      rounding: the numerics.
      drafts: drafts that each row of the engine takes.
      top: alternatives that the engine reports.
      sizes: keyword arguments of `arguments`.

    Returns:
      The lowered step; `.compile().memory_analysis()` returns the bytes per device.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    args = arguments(cfg, step, mesh, drafts=drafts, **sizes)
    with jax.set_mesh(mesh):
        if step in _OF_ENGINE:
            static = Static(cfg=cfg, numerics=rounding, drafts=drafts, top=top)
            return _OF_ENGINE[step].lower(*args, static=static)
        return getattr(steps, step).lower(*args, cfg=cfg, numerics=rounding)


def arguments(
    cfg: ModelConfig,
    step: Step,
    mesh: AnyMesh,
    *,
    batch: int,
    capacity: int,
    tokens: int = 512,
    drafts: int = 0,
    dtype: Any = jnp.bfloat16,
    expert_format: ExpertDtype | None = None,
    entries: str | None = None,
) -> tuple[Any, ...]:
    """A step's arguments as abstract arrays, sharded as in generation.

    Args:
      cfg: configuration of the model.
      step: 'decode' takes one token per row, 'prefill' a chunk of `tokens`. The engine's cache has
        pages for the capacity of all rows: 'advance' is its step of them, 'read' takes a chunk of
        a prompt for one row of each group of devices.
      mesh: mesh of real devices, of a topology, or of none.
      batch: number of rows. A single row is replicated; more are sharded.
      capacity: capacity of the cache, in tokens.
      tokens: size of a chunk.
      drafts: drafts that each row of the engine takes.
      dtype: dtype of activations, cache and unquantised weights.
      expert_format: keep FP8 weights and experts quantised, with experts in this format.
      entries: form of the engine's compressed entries, see `v4jax.engine.settings`.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    sharding.check_rows(batch, mesh)
    declared = Model(cfg)
    model = params.abstract(declared, dtype, expert_format)
    model = jax.tree.map(placed, model, sharding.shardings(declared, mesh, model))
    if step in _OF_ENGINE:
        shape = _shape(cfg, mesh, batch=batch, capacity=capacity, tokens=tokens)
        shape = dataclasses.replace(shape, entries=entries)
        return model, *_of_engine(cfg, step, mesh, shape, drafts=drafts, dtype=dtype)
    cache = jax.eval_shape(lambda: caches.make(cfg, batch, capacity, dtype))
    cache = jax.tree.map(lambda x: placed(x, caches.place(x.shape, mesh)), cache)
    rows = lambda *shape: _rows((batch, *shape), jnp.int32, mesh, "batch")
    if step == "decode":
        return model, rows(), cache
    return model, rows(tokens), cache, rows()


def _of_engine(
    cfg: ModelConfig, step: Step, mesh: AnyMesh, shape: Shape, *, drafts: int, dtype: Any
) -> tuple[Any, ...]:
    """The engine's arrays: its cache, counts and rows, and its chunks or its number of steps."""
    static = Static(cfg=cfg, numerics=numerics.OFFICIAL, drafts=drafts, top=0)
    cache, counts = jax.eval_shape(lambda: device.empty(shape, static, dtype))
    cache = jax.tree.map(lambda x: placed(x, caches.place(x.shape, mesh)), cache)
    count = shape.groups if step == "read" else shape.rows
    rows = jax.eval_shape(lambda: inputs.empty_rows(count, shape, static))
    chunks = jax.eval_shape(lambda: inputs.empty_chunks(shape.groups, shape.widths[1]))
    by_row = lambda tree: jax.tree.map(lambda x: _rows(x.shape, x.dtype, mesh, "batch"), tree)
    last = by_row(chunks) if step == "read" else _rows((), jnp.int32, mesh)
    return cache, by_row(counts), by_row(rows), last


def _shape(cfg: ModelConfig, mesh: AnyMesh, *, batch: int, capacity: int, tokens: int) -> Shape:
    """An engine's sizes: each group of devices has its rows, their pages and a scratch page."""
    groups = sharding.row_groups(mesh)
    page = page_of(
        capacity, cfg, mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "tpu"
    )
    groups = groups if batch % groups == 0 else 1
    row_pages = -(-capacity // page)
    return Shape(
        rows=batch,
        pages=batch * row_pages + groups,
        page=page,
        row_pages=row_pages,
        widths=(BLOCK, tokens),
        stops=STOPS + len(cfg.eos_token_ids),
        groups=groups,
    )


def placed(struct: Any, place: Any) -> jax.ShapeDtypeStruct:
    """The struct with a sharding."""
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)


def _rows(shape: tuple[int, ...], dtype: Any, mesh: AnyMesh, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.place(axes, shape, mesh))
