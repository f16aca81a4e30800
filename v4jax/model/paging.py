"""A cache for serving: rows are slots that requests come to and leave, pools are shared pages.

Entry s of a row is entry s % N of page `table_BM[row, s // N]`, where N entries are one page's.
Rings are constant in size and stay with the row. At a multiple of `BLOCK` tokens no compressed
window is open, so what a row's future depends on, besides its pages, is the sliding window and the
last window of CSA's compressors: a snapshot.

On a mesh that splits a batch into groups of rows (`sharding.row_groups`), each group has its rows
and its pages, of which tables say the numbers within the group.

Entries are arrays in the cache's dtype, or rows of bytes that hold the same values, if the numerics
round them to FP8, and the indexer's to FP4 (`byte_rows`).

Axis letters: L layers of a stack, B rows, R rows of a ring, P pages, N entries of a page, M pages
of a row, n new entries, X rows of a snapshot, K channels of the array at hand, G groups.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.byte_rows import Codec, Fp4Codec, Fp8Codec
from v4jax.model import cache as caches
from v4jax.model import grouped_rows, sharding
from v4jax.model.cache import BLOCK, Cache, LayerCache
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.segments import segments
from v4jax.model.sharding import ROWS, STACKED_ROWS

# The page of each group that belongs to no row.
SCRATCH = 0
_RINGS = ("window_LBRK", "tail_LBRK", "index_tail_LBRK")
_POOLS = ("pool_LBSK", "index_LBSK")
# Arrays of each layer, listed as the cache's layers: the newest rows of rings; a page's entries.
if TYPE_CHECKING:
    _AnyArray = Array
else:
    _AnyArray = Array | np.ndarray  # what was kept on the host
Snapshot = tuple[dict[str, Float[_AnyArray, "_ _ _"]], ...]
Page = tuple[dict[str, Shaped[_AnyArray, "_ _ _"]], ...]


def page_unit(cfg: ModelConfig) -> int:
    """Tokens that pages consist of: whole blocks, and whole windows of every compressor."""
    return math.lcm(BLOCK, *(kind.ratio for kind in cfg.layers if kind.ratio))


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "rows", "pages", "page", "dtype", "mtp", "entries", "numerics"),
)
def make(
    cfg: ModelConfig,
    *,
    rows: int,
    pages: int,
    page: int,
    dtype: Any,
    mtp: bool = False,
    entries: str | None = None,
    numerics: Numerics | None = None,
) -> Cache:
    """An empty cache without a table.

    Args:
      cfg: the model's configuration.
      rows: number of slots.
      pages: number of pages.
      page: tokens of a page.
      dtype: dtype of activations.
      mtp: whether MTP blocks have a cache too.
      entries: None to store them in `dtype`, 'fp8' as bytes: FP8, and FP4 of the indexer's.
      numerics: the model's, which 'fp8' depends on.

    Raises:
      ValueError: a page is not a multiple of `page_unit(cfg)` tokens, or entries that 'fp8' would
        change.
    """
    if page % page_unit(cfg):
        raise ValueError(f"A page of {page} tokens is not a multiple of {page_unit(cfg)}.")

    if entries is not None:
        require_exact(entries, numerics, dtype)
    channels = lambda index: cfg.index_head_dim if index else cfg.head_dim
    width = lambda index: channels(index) if entries is None else _codec(cfg, index=index).width
    pool_dtype = dtype if entries is None else jnp.uint8

    def layer(kind: LayerKind, repeats: int) -> LayerCache:
        rings = caches.layer_rings(cfg, kind, caches.maker(repeats, rows, dtype, None))
        if kind.attention == "sliding":
            return rings
        zeros = caches.maker(repeats, pages, pool_dtype, None)
        pool = lambda index: zeros(page // kind.ratio, width(index))
        return caches.with_pools(rings, kind, pool)

    return Cache(
        length_B=jnp.zeros(rows, jnp.int32),
        segments=tuple(
            tuple(layer(kind, segment.repeats) for kind in segment.pattern)
            for segment in segments(cfg.layers)
        ),
        mtp=tuple(
            layer(cfg.mtp_kind, 1) for _ in range(cfg.num_nextn_predict_layers if mtp else 0)
        ),
    )


def require_exact(entries: str, numerics: Numerics | None, dtype: Any) -> None:
    """Reject entries that storing them as bytes would change.

    Raises:
      ValueError: unknown `entries`, or numerics or a dtype that do not suit them.
    """
    if entries != "fp8":
        raise ValueError(f"entries is {entries!r}; it must be 'fp8' or None.")
    if numerics is None or not numerics.rounded_cache:
        raise ValueError(
            "A cache in 'fp8' would change entries that the numerics do not round to FP8; use "
            "numerics='official', or keep the cache in the model's dtype."
        )
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise ValueError(
            f"A cache in 'fp8' holds rotated channels in bfloat16, and this model's are "
            f"{jnp.dtype(dtype).name}; load it in bfloat16, or keep the cache in its dtype."
        )


def _codec(cfg: ModelConfig, *, index: bool) -> Codec:
    """The codec of entries, or of the indexer's."""
    if index:
        return Fp4Codec(cfg.index_head_dim)
    return Fp8Codec(cfg.head_dim, cfg.qk_rope_head_dim)


def codec_of(
    pool_LPNK: Shaped[Array, "L P N _"], cfg: ModelConfig, *, index: bool = False
) -> Codec | None:
    """The codec of a pool's entries, or of the indexer's; None if they are not bytes."""
    return _codec(cfg, index=index) if pool_LPNK.dtype == jnp.uint8 else None


def write(
    pages_LPNK: Shaped[Array, "L P N _"],
    layer: Int[Array, ""],
    new_BnK: Float[Array, "B n K"],
    first_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
    table_BM: Int[Array, "B M"],
    *,
    unit: int,
    codec: Codec | None = None,
) -> Shaped[Array, "L P N _"]:
    """Write entries first .. first + count - 1 of each row to its pages.

    They are written `unit` at a time; `first` is a multiple of it, and so is a page. What follows a
    row's entries in its last unit becomes garbage; units without entries go to page SCRATCH, as the
    row may have no page for them. Nothing is read, so that XLA writes in place.
    """
    new_BnK = new_BnK.astype(pages_LPNK.dtype) if codec is None else codec.encode(new_BnK)
    return sharding.per_device(
        functools.partial(_write, unit=min(unit, new_BnK.shape[1])),
        *(pages_LPNK, layer, new_BnK, first_B, count_B, table_BM),
        axes=(STACKED_ROWS, (), ROWS, ROWS, ROWS, ROWS),
        out=STACKED_ROWS,
        kernels=False,
    )


def _write(
    pages_LPNK: Shaped[Array, "L P N _"],
    layer: Int[Array, ""],
    new_BnK: Shaped[Array, "B n _"],
    first_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
    table_BM: Int[Array, "B M"],
    *,
    unit: int,
) -> Shaped[Array, "L P N _"]:
    """`write`, on one device."""
    units = -(-new_BnK.shape[1] // unit)
    new_BnK = jnp.pad(new_BnK, ((0, 0), (0, units * unit - new_BnK.shape[1]), (0, 0)))

    def write_unit(i, pages_LPNK):
        b, at = i // units, i % units * unit
        entry = first_B[b] + at
        place = entry // pages_LPNK.shape[2]
        has_page = (at < count_B[b]) & (place < table_BM.shape[1])
        page = jnp.where(has_page, table_BM.at[b, place].get(mode="clip"), SCRATCH)
        place = (layer, page, entry % pages_LPNK.shape[2], jnp.zeros((), jnp.int32))
        unit_nK = jax.lax.dynamic_slice_in_dim(new_BnK[b], at, unit)
        return jax.lax.dynamic_update_slice(pages_LPNK, unit_nK[None, None], place)

    return jax.lax.fori_loop(0, new_BnK.shape[0] * units, write_unit, pages_LPNK)


def take(
    cache: Cache, row_G: Int[Array, " G"], length_G: Int[Array, " G"], table_GM: Int[Array, "G M"]
) -> Cache:
    """The cache of one row of each group, by its number in the group: its rings, and all pages.

    The rings of a row without tokens are zeros, whatever the row held before.
    """

    def of_rows(ring_LBRK: Array) -> Array:
        ring_LGRK = grouped_rows.read_each(ring_LBRK, row_G, axis=1)
        holds_LGRK = (length_G > 0)[None, :, None, None]
        return jnp.where(holds_LGRK, ring_LGRK, jnp.zeros_like(ring_LGRK))

    taken = _with_layers(cache, [_map_arrays(of_rows, _RINGS, layer) for layer in _layers(cache)])
    return dataclasses.replace(taken, length_B=length_G, table_BM=table_GM)


def put(cache: Cache, row_G: Int[Array, " G"], taken: Cache, changed_G: Bool[Array, " G"]) -> Cache:
    """The cache with the rows that `take` returned, after a step: their rings, and all pages."""

    def into_rows(new_LGRK: Array, ring_LBRK: Array) -> Array:
        old_LGRK = grouped_rows.read_each(ring_LBRK, row_G, axis=1)
        new_LGRK = jnp.where(changed_G[None, :, None, None], new_LGRK, old_LGRK)
        return grouped_rows.write_each(ring_LBRK, row_G, new_LGRK, axis=1)

    pairs = zip(_layers(taken), _layers(cache), strict=True)
    return _with_layers(cache, [_map_arrays(into_rows, _RINGS, new, old) for new, old in pairs])


def _layers(cache: Cache) -> list[LayerCache]:
    """All layers' state: the segments', then the MTP blocks'."""
    return [*(layer for segment in cache.segments for layer in segment), *cache.mtp]


def _with_layers(cache: Cache, layers: list[LayerCache]) -> Cache:
    """The cache with other layers, listed as `_layers` does."""
    rest = iter(layers)
    stacks = tuple(tuple(next(rest) for _ in segment) for segment in cache.segments)
    return dataclasses.replace(cache, segments=stacks, mtp=tuple(rest))


def _map_arrays(
    change: Callable[..., Array], names: tuple[str, ...], layer: LayerCache, *others: Any
) -> LayerCache:
    """The layer with the named arrays that it has changed; the others' are further arguments."""
    changed = {
        name: change(array, *(getattr(other, name) for other in others))
        for name in names
        if (array := getattr(layer, name)) is not None
    }
    return dataclasses.replace(layer, **changed)


def _snapshot_rows(
    cfg: ModelConfig, kind: LayerKind, layer: LayerCache, entire: bool
) -> dict[str, int]:
    """Number of the newest rows of a layer's rings that a snapshot has."""
    if entire:
        return {n: x.shape[2] for n in _RINGS if (x := getattr(layer, n)) is not None}
    rows = {"window_LBRK": cfg.sliding_window}
    if kind.overlap > 1 and kind.attention == "csa":
        rows |= dict.fromkeys(("tail_LBRK", "index_tail_LBRK"), (kind.overlap - 1) * kind.ratio)
    return rows


def _kinds(cfg: ModelConfig, cache: Cache) -> list[LayerKind]:
    backbone = [kind for segment in segments(cfg.layers) for kind in segment.pattern]
    return [*backbone, *[cfg.mtp_kind] * len(cache.mtp)]


@functools.partial(jax.jit, static_argnames=("cfg", "entire"))
def snapshot(
    cache: Cache,
    row: Int[Array, ""],
    length: Int[Array, ""],
    *,
    cfg: ModelConfig,
    entire: bool = False,
) -> Snapshot:
    """What a row of `length` tokens needs besides its pages to go on.

    Unless the rings are saved entire, `length` must be a multiple of BLOCK.
    """

    def newest(ring_LBRK: Array, count: int) -> Float[Array, "L X K"]:
        ring_LRK = grouped_rows.read(ring_LBRK, row, axis=1)
        return ring_LRK[:, _ring_rows(length, count, ring_LRK.shape[1])]

    def of_layer(layer: LayerCache, kind: LayerKind) -> dict[str, Array]:
        counts = _snapshot_rows(cfg, kind, layer, entire)
        return {name: newest(getattr(layer, name), count) for name, count in counts.items()}

    pairs = zip(_layers(cache), _kinds(cfg, cache), strict=True)
    return tuple(of_layer(*pair) for pair in pairs)


@functools.partial(jax.jit, donate_argnames="cache")
def restore(cache: Cache, row: Int[Array, ""], length: Int[Array, ""], saved: Snapshot) -> Cache:
    """The cache with a snapshot's rows in a row's rings, which are zero elsewhere."""

    def refill(ring_LBRK: Array, saved_LXK: Array | None) -> Array:
        L, _, R, K = ring_LBRK.shape
        ring_LRK = jnp.zeros((L, R, K), ring_LBRK.dtype)
        if saved_LXK is not None:
            ring_LRK = ring_LRK.at[:, _ring_rows(length, saved_LXK.shape[1], R)].set(saved_LXK)
        return grouped_rows.write(ring_LBRK, row, ring_LRK, axis=1)

    def of_layer(layer: LayerCache, saved: dict[str, Array]) -> LayerCache:
        names = [name for name in _RINGS if getattr(layer, name) is not None]
        rings = {name: refill(getattr(layer, name), saved.get(name)) for name in names}
        return dataclasses.replace(layer, **rings)

    pairs = zip(_layers(cache), saved, strict=True)
    return _with_layers(cache, [of_layer(*pair) for pair in pairs])


def _ring_rows(length: Int[Array, ""], count: int, rows: int) -> Int[Array, " X"]:
    """Rows of a ring in which the newest `count` tokens are, oldest first."""
    return jnp.mod(length - count + jnp.arange(count), rows)


@functools.partial(jax.jit, donate_argnames="cache")
def copy_page(cache: Cache, source: Int[Array, ""], target: Int[Array, ""]) -> Cache:
    """The cache with one page's entries copied to another page."""
    copy = lambda pool_LPNK: grouped_rows.write(
        pool_LPNK, target, grouped_rows.read(pool_LPNK, source, axis=1), axis=1
    )
    return _with_layers(cache, [_map_arrays(copy, _POOLS, layer) for layer in _layers(cache)])


@jax.jit
def read_page(cache: Cache, page: Int[Array, ""]) -> Page:
    """The entries of a page in all layers."""
    return tuple(
        {
            name: grouped_rows.read(pool_LPNK, page, axis=1)
            for name in _POOLS
            if (pool_LPNK := getattr(layer, name)) is not None
        }
        for layer in _layers(cache)
    )


@functools.partial(jax.jit, donate_argnames="cache")
def write_entries(
    cache: Cache, page: Int[Array, ""], position: Int[Array, ""], entries: Page
) -> Cache:
    """The cache with part of a page replaced: if each layer has n entries, from position * n on."""

    def update(pool_LPNK: Array, new_LnK: Array) -> Array:
        page_LNK = grouped_rows.read(pool_LPNK, page, axis=1)
        at = position * new_LnK.shape[1]
        page_LNK = jax.lax.dynamic_update_slice_in_dim(page_LNK, new_LnK, at, 1)
        return grouped_rows.write(pool_LPNK, page, page_LNK, axis=1)

    def of_layer(layer: LayerCache, new: dict[str, Array]) -> LayerCache:
        pools = {name: update(getattr(layer, name), new[name]) for name in new}
        return dataclasses.replace(layer, **pools)

    pairs = zip(_layers(cache), entries, strict=True)
    return _with_layers(cache, [of_layer(*pair) for pair in pairs])
