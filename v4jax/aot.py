"""Lowering of steps for absent devices, with abstract weights: nothing is allocated.

The compiler of libtpu needs `TPU_SKIP_MDS_QUERY=1` in the environment before JAX starts, and
`JAX_PLATFORMS=cpu` on machines without a TPU.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from v4jax.decoding import sampling, steps
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import programs
from v4jax.engine.arrays import Counts, Drafting, Rows, Static
from v4jax.engine.device import STOPS
from v4jax.engine.settings import PAGE
from v4jax.model import cache as caches
from v4jax.model import numerics, paging, params, sharding
from v4jax.model.cache import BLOCK, Cache
from v4jax.model.config import ExpertDtype, ModelConfig
from v4jax.model.transformer import Model

Step = Literal["prefill", "decode", "advance"]


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
      drafts: drafts that each row of 'advance' takes.
      top: alternatives that 'advance' reports.
      sizes: keyword arguments of `arguments`.

    Returns:
      The lowered step; `.compile().memory_analysis()` returns the bytes per device.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    inputs = arguments(cfg, step, mesh, drafts=drafts, **sizes)
    with jax.set_mesh(mesh):
        if step == "advance":
            static = Static(cfg=cfg, numerics=rounding, drafts=drafts, top=top)
            return programs.advance.lower(*inputs, static=static)
        return getattr(steps, step).lower(*inputs, cfg=cfg, numerics=rounding)


def arguments(
    cfg: ModelConfig,
    step: Step,
    mesh: Mesh,
    *,
    batch: int,
    capacity: int,
    tokens: int = 512,
    drafts: int = 0,
    dtype: Any = jnp.bfloat16,
    expert_format: ExpertDtype | None = None,
) -> tuple[Any, ...]:
    """A step's arguments as abstract arrays, sharded as in generation.

    Args:
      cfg: configuration of the model.
      step: 'decode' takes one token per row, 'prefill' a chunk of `tokens`; 'advance' is the
        engine's step, whose cache has pages for the capacity of all rows.
      mesh: mesh of real devices or of a topology.
      batch: number of rows. A single row is replicated; more are sharded.
      capacity: capacity of the cache, in tokens.
      tokens: size of a prefill chunk.
      drafts: drafts that each row of 'advance' takes.
      dtype: dtype of activations, cache and unquantised weights.
      expert_format: keep FP8 weights and experts quantised, with experts in this format.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    sharding.check_rows(batch, mesh)
    declared = Model(cfg)
    model = params.abstract(declared, dtype, expert_format)
    model = jax.tree.map(placed, model, sharding.shardings(declared, mesh, model))
    if step == "advance":
        sizes = {"batch": batch, "capacity": capacity, "drafts": drafts}
        return model, *_of_engine(cfg, mesh, dtype, **sizes), _rows((), jnp.int32, mesh)
    cache = jax.eval_shape(lambda: caches.make(cfg, batch, capacity, dtype))
    cache = jax.tree.map(lambda x: placed(x, caches.place(x.shape, mesh)), cache)
    rows = lambda *shape: _rows((batch, *shape), jnp.int32, mesh, "batch")
    if step == "decode":
        return model, rows(), cache
    return model, rows(tokens), cache, rows()


def _of_engine(
    cfg: ModelConfig, mesh: Mesh, dtype: Any, *, batch: int, capacity: int, drafts: int
) -> tuple[Cache, Counts, Rows]:
    """The engine's arrays: each group of devices has its rows, their pages and a scratch page."""
    page = min(PAGE, -(-capacity // BLOCK) * BLOCK)
    row_pages, groups = -(-capacity // page), sharding.row_groups(mesh)
    sizes = {"rows": batch, "page": page, "mtp": drafts > 0}
    sizes["pages"] = batch * row_pages + (groups if batch % groups == 0 else 1)
    cache = jax.eval_shape(lambda: paging.make(cfg, **sizes, dtype=dtype))
    cache = jax.tree.map(lambda x: placed(x, caches.place(x.shape, mesh)), cache)
    counts, rows = jax.eval_shape(lambda: _engine_rows(cfg, batch, row_pages, drafts))
    place = lambda *axes: lambda x: _rows(x.shape, x.dtype, mesh, *axes)
    return cache, jax.tree.map(place("batch", "vocab"), counts), jax.tree.map(place("batch"), rows)


def _engine_rows(cfg: ModelConfig, batch: int, row_pages: int, drafts: int) -> tuple[Counts, Rows]:
    """Counts and rows of the engine, all zeros."""

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jnp.zeros((batch, *shape), dtype)

    params, vocab = [SamplingParams(seed=0)] * batch, cfg.vocab_size
    settings: dict[str, Any] = sampling.settings(params, vocab)
    drafting = Drafting(
        draft_Bk=zeros(drafts),
        count_B=zeros(),
        allowed_B=zeros(dtype=bool),
        share_B=zeros(dtype=jnp.float32),
        rest_B=zeros(),
        drafted_B=zeros(),
        right_B=zeros(),
    )
    rows = Rows(
        token_B=zeros(),
        length_B=zeros(),
        left_B=zeros(),
        stop_BE=zeros(STOPS),
        table_BM=zeros(row_pages),
        allowed_BW=zeros(-(-vocab // 32), dtype=jnp.uint32),
        drafting=drafting,
        settings={**settings, "drawn_B": zeros()},
    )
    return Counts(in_prompt_BV=zeros(vocab, dtype=bool), count_BV=zeros(vocab)), rows


def placed(struct: Any, place: Any) -> jax.ShapeDtypeStruct:
    """The struct with a sharding."""
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.place(axes, shape, mesh))
