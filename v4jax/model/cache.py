"""Decode state of static shape, addressed by absolute position; nothing in it is ever erased.

Token p is in row p mod R of a ring, entry i in row i of a pool, and `length_B` alone determines
which of them exist: a query at p sees entries below (p + 1) // ratio. So forgetting drafted tokens
is a subtraction.

Axis letters: L layers of a stack, B batch, T new tokens, R rows of a ring, S entries of a pool,
K channels of the array at hand.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from v4jax.model import sharding
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.pytree import pytree
from v4jax.model.segments import segments
from v4jax.model.sharding import ROWS, STACKED_ROWS, AnyMesh

_F = TypeVar("_F", bound=Callable[..., Any])
# Rows beyond the window, so that rejecting up to this many tokens loses nothing.
SPARE = 8
# Capacities are multiples of this many tokens: lcm(4, 128), the block of a paged pool.
BLOCK = 128
# Kernels need pools of entire device memory tiles, for every dtype down to 8 bits.
_POOL_TILE = 32


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """State of one position of a segment's pattern, stacked over its L repeats.

    Attributes:
      window_LBRK: keys of the newest tokens.
      tail_LBRK: the compressor's kv and gate of the newest tokens, concatenated (float32).
      pool_LBSK: compressed entries; in a paged cache, B are pages and S entries of a page, and K
        may be bytes (`byte_rows`).
      index_tail_LBRK: `tail_LBRK` of CSA's indexer.
      index_LBSK: `pool_LBSK` of CSA's indexer.
    """

    window_LBRK: Float[Array, "L B R K"]
    tail_LBRK: Float32[Array, "L B _ _"] | None = None
    pool_LBSK: Shaped[Array, "L _ S _"] | None = None
    index_tail_LBRK: Float32[Array, "L B _ _"] | None = None
    index_LBSK: Shaped[Array, "L _ S _"] | None = None


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """A batch's state.

    Attributes:
      length_B: number of tokens of each row in the cache (int32).
      segments: for each segment, a LayerCache for each position of its pattern.
      mtp: a LayerCache for each MTP block.
      table_BM: the pages of each row if pools are pages that all rows share (`v4jax.model.paging`).
    """

    length_B: Int[Array, " B"]
    segments: tuple[tuple[LayerCache, ...], ...]
    mtp: tuple[LayerCache, ...] = ()
    table_BM: Int[Array, "B M"] | None = None


def is_decode(tokens: int) -> bool:
    """Whether chunks of this many tokens are decoded.

    Then the chunk is written to the ring first, and each token finds its window there. Longer
    chunks are prefilled; part of their windows is only in the chunk.
    """
    return tokens <= SPARE


def bucket(tokens: int, limit: int) -> int:
    """The capacity for this many tokens: BLOCK times a power of two, at most the limit.

    A few capacities serve every text, so that few programs are compiled.
    """
    capacity = BLOCK
    while capacity < tokens:
        capacity *= 2
    return min(capacity, -(-limit // BLOCK) * BLOCK)


# One program instead of one for each shape.
@functools.partial(jax.jit, static_argnames=("cfg", "batch", "capacity", "dtype", "mtp", "mesh"))
def make(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any,
    *,
    mtp: bool = False,
    mesh: Mesh | None = None,
) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens, on the mesh if there is one."""
    layer = lambda kind, repeats: _layer_cache(
        cfg, kind, capacity, maker(repeats, batch, dtype, mesh)
    )
    drafters = range(cfg.num_nextn_predict_layers if mtp else 0)
    return Cache(
        length_B=_zeros((batch,), jnp.int32, mesh),
        segments=tuple(
            tuple(layer(kind, segment.repeats) for kind in segment.pattern)
            for segment in segments(cfg.layers)
        ),
        mtp=tuple(layer(cfg.mtp_kind, 1) for _ in drafters),
    )


def place(shape: tuple[int, ...], mesh: AnyMesh | None) -> NamedSharding | None:
    """The sharding of a cache's array of this shape: the mesh shares its rows."""
    if mesh is None:
        return None
    return sharding.place(ROWS if len(shape) == 1 else STACKED_ROWS, shape, mesh)


def fresh(cfg: ModelConfig, kind: LayerKind, batch: int, tokens: int, dtype: Any) -> LayerCache:
    """The empty state of one layer, for rows of `tokens` processed at once."""
    return _layer_cache(cfg, kind, tokens, maker(1, batch, dtype, None))


def maker(repeats: int, batch: int, dtype: Any, mesh: Mesh | None) -> Callable[..., Any]:
    """A function that creates a layer's empty arrays from numbers of rows and channels."""

    def zeros(rows: int, channels: int, dtype: Any = dtype) -> Shaped[Array, "L B R K"]:
        return _zeros((repeats, batch, rows, channels), dtype, mesh)

    return zeros


def _zeros(shape: tuple[int, ...], dtype: Any, mesh: Mesh | None) -> Shaped[Array, "..."]:
    zeros = jnp.zeros(shape, dtype)
    return zeros if mesh is None else jax.lax.with_sharding_constraint(zeros, place(shape, mesh))


def _layer_cache(
    cfg: ModelConfig, kind: LayerKind, capacity: int, zeros: Callable[..., Any]
) -> LayerCache:
    rings = layer_rings(cfg, kind, zeros)
    if kind.attention == "sliding":
        return rings
    # A chunk also writes the rows of windows that it does not complete, beyond the text's entries.
    entries = -(-capacity // kind.ratio) + 1
    entries += -entries % _POOL_TILE
    channels = lambda index: cfg.index_head_dim if index else cfg.head_dim
    return with_pools(rings, kind, lambda index: zeros(entries, channels(index)))


def layer_rings(cfg: ModelConfig, kind: LayerKind, zeros: Callable[..., Any]) -> LayerCache:
    """A layer's empty rings; `zeros` creates them from numbers of rows and channels."""
    window = zeros(cfg.sliding_window + SPARE, cfg.head_dim)
    if kind.attention == "sliding":
        return LayerCache(window_LBRK=window)
    tail = lambda channels: zeros(
        kind.overlap * kind.ratio + SPARE, 2 * kind.overlap * channels, jnp.float32
    )
    return LayerCache(
        window_LBRK=window,
        tail_LBRK=tail(cfg.head_dim),
        index_tail_LBRK=tail(cfg.index_head_dim) if kind.attention == "csa" else None,
    )


def with_pools(rings: LayerCache, kind: LayerKind, zeros: Callable[[bool], Any]) -> LayerCache:
    """A layer's rings and its empty pools, which `zeros` creates; True: the indexer's."""
    return dataclasses.replace(
        rings,
        pool_LBSK=zeros(False),
        index_LBSK=zeros(True) if kind.attention == "csa" else None,
    )


def rewind(cache: Cache, rejected_B: Int[Array, " B"]) -> Cache:
    """Forget the newest `rejected_B` tokens of each row, at most SPARE. No buffer is touched."""
    return dataclasses.replace(cache, length_B=cache.length_B - rejected_B)


def ring_positions(end_B: Int[Array, " B"], rows: int) -> Int[Array, "B R"]:
    """The newest position below `end` in each ring row; negative if there is none."""
    row_R = jnp.arange(rows, dtype=jnp.int32)
    last_B1 = end_B[:, None] - 1
    return last_B1 - jnp.mod(last_B1 - row_R[None], rows)


def layer_of(stack: Float[Array, "L ..."], layer: Int[Array, ""]) -> Float[Array, "..."]:
    """One layer's state, copied out of the stack: for rings, which are small."""
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def ring_read(
    ring_LBRK: Float[Array, "L B R K"], layer: Int[Array, ""], start_B: Int[Array, " B"], count: int
) -> Float[Array, "B X K"]:
    """The `count` rows before position `start`, which the ring must still hold."""
    before_X = jnp.arange(-count, 0, dtype=jnp.int32)
    position_BX = start_B[:, None] + before_X[None]

    def read(ring_LBRK: Array, layer: Array, position_BX: Array) -> Array:
        row_BX = jnp.mod(position_BX, ring_LBRK.shape[2])
        return jnp.take_along_axis(layer_of(ring_LBRK, layer), row_BX[..., None], axis=1)

    axes = (STACKED_ROWS, (), ROWS)
    return sharding.per_device(
        read, ring_LBRK, layer, position_BX, axes=axes, out=ROWS, kernels=False
    )


def _writer(write: _F) -> _F:
    """Decorates a function that writes to the rows of a stack: each device writes its own."""
    axes = (STACKED_ROWS, (), ROWS, ROWS, ROWS)

    @functools.wraps(write)
    def call(*args: Any) -> Any:
        return sharding.per_device(write, *args, axes=axes, out=STACKED_ROWS, kernels=False)

    return cast(_F, call)


@_writer
def ring_write(
    ring_LBRK: Float[Array, "L B R K"],
    layer: Int[Array, ""],
    new_BTK: Float[Array, "B T K"],
    start_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
) -> Float[Array, "L B R K"]:
    """Write tokens start .. start + count - 1 of each row to their ring rows."""
    rows, tokens = ring_LBRK.shape[2], new_BTK.shape[1]
    new_BTK = new_BTK.astype(ring_LBRK.dtype)
    if is_decode(tokens):
        offset_T = jnp.arange(tokens, dtype=jnp.int32)
        row_BT = jnp.mod(start_B[:, None] + offset_T[None], rows)
        # Padding goes to a row out of range, and is dropped.
        row_BT = jnp.where(offset_T[None] < count_B[:, None], row_BT, rows)
        batch_B1 = jnp.arange(start_B.shape[0])[:, None]
        return ring_LBRK.at[layer, batch_B1, row_BT].set(new_BTK, mode="drop")
    position_BR = ring_positions(start_B + count_B, rows)
    offset_BR = position_BR - start_B[:, None]
    chunk_BRK = jnp.take_along_axis(new_BTK, jnp.maximum(offset_BR, 0)[..., None], axis=1)
    old_BRK = layer_of(ring_LBRK, layer)
    ring_BRK = jnp.where((offset_BR >= 0)[..., None], chunk_BRK, old_BRK)
    return jax.lax.dynamic_update_index_in_dim(ring_LBRK, ring_BRK, layer, 0)


@_writer
def pool_write(
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    new_BnK: Float[Array, "B n K"],
    first_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
) -> Float[Array, "L B S K"]:
    """Write entries first .. first + count - 1 of each row to the pool."""
    new_BnK = new_BnK.astype(pool_LBSK.dtype)
    rows, entries = pool_LBSK.shape[2], new_BnK.shape[1]
    entries = min(entries, rows)

    def write_row(b: Any, pool: Any) -> Any:
        # Move the block back if it would leave the pool; outside `count`, rewrite the old rows.
        start = jnp.minimum(first_B[b], rows - entries)
        at = (layer, b, start, jnp.zeros((), jnp.int32))
        old_nK = jax.lax.dynamic_slice(pool, at, (1, 1, entries, pool.shape[3]))[0, 0]
        shift = first_B[b] - start
        moved_nK = jnp.roll(new_BnK[b, :entries], shift, axis=0)
        row_n = jnp.arange(entries) - shift
        new_n = (row_n >= 0) & (row_n < count_B[b])
        block_nK = jnp.where(new_n[:, None], moved_nK, old_nK)
        return jax.lax.dynamic_update_slice(pool, block_nK[None, None], at)

    return jax.lax.fori_loop(0, new_BnK.shape[0], write_row, pool_LBSK)


def ring_mask(
    end_B: Int[Array, " B"], rows: int, query_BT: Int[Array, "B T"], window: int
) -> Bool[Array, "B T R"]:
    """Ring rows that a query at each position sees: the `window` tokens that end with itself."""
    position_BR = ring_positions(end_B, rows)
    age_BTR = query_BT[..., None] - position_BR[:, None]
    return (age_BTR >= 0) & (age_BTR < window) & (position_BR >= 0)[:, None]
