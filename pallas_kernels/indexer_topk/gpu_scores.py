"""Scores of a chunk of entries for one query: keys in device memory, scores in shared memory.

TMA copies tiles of 64 keys, a few ahead of the tensor cores, which multiply them by the query's
heads; relu, weights and the sum over heads follow in registers. E4M3 codes are converted to
bfloat16, which is exact, so that products accumulate in full float32 (8-bit products would keep 14
bits on these GPUs).

Axis letters: as in the package; X entries per tile, D tiles in flight, Y scales read per tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.byte_rows import FP4, e2m1
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import gpu_select
from pallas_kernels.indexer_topk.gpu_select import NOTHING
from pallas_kernels.indexer_topk.keys import Fp8Keys, Keys
from pallas_kernels.indexer_topk.reference import ordered
from pallas_kernels.mosaic_gpu import BYTES_TILED, TILED, along, load
from pallas_kernels.paged import Paged

# Heads are padded to a multiple of 64, a tile of a product, too.
TILE = HEADS = 64
_BY_ENTRY, _BY_HEAD = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# Bytes of tiles in flight per thread block; a multiprocessor runs two blocks.
_AHEAD = 48 * 2**10


def arrays_of(keys: Keys) -> tuple[Any, ...]:
    """The arrays of keys that the kernel reads.

    Raises:
      Unsupported: unless they are bfloat16 or pages of FP4 (with a multiple of 64 entries), or
        E4M3.
    """
    match keys:
        case Fp8Keys() if keys.codes.shape[3] % 128 == 0:
            scale = keys.scale
            if scale.dtype == jnp.float8_e8m0fnu:
                scale = jax.lax.bitcast_convert_type(scale, jnp.uint8)
            return keys.codes, scale.reshape(*scale.shape[:2], -1)
        case Paged() if keys.pages.shape[2] % TILE == 0 and _takes(keys):
            return keys.pages, keys.table.astype(jnp.int32)
        case jax.Array() if keys.dtype == jnp.bfloat16:
            return (keys,)
    raise Unsupported(
        f"The GPU kernel takes bfloat16 keys, in one array or in pages of a multiple of {TILE}"
        f" entries, such pages in {FP4}, or Fp8Keys with a dim that is a multiple of 128, not"
        f" {keys}."
    )


def _takes(keys: Paged) -> bool:
    return keys.codec == FP4 or (keys.codec is None and keys.pages.dtype == jnp.bfloat16)


def buffers(keys: Keys, dim: int, heads: int) -> dict[str, Any]:
    """Shared memory for `score_chunk`."""
    matrix = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
    fp8, fp4 = isinstance(keys, Fp8Keys), isinstance(keys, Paged) and keys.codec == FP4
    # The bfloat16 copy of a tile of codes takes the memory of two.
    depth = (_AHEAD // (TILE * dim) - 2) if fp8 or fp4 else _AHEAD // (TILE * dim * 2)
    buffers = {
        "q_JI": matrix((dim, heads)),
        "weights_I": plgpu.SMEM((heads,), jnp.float32),
        "here": plgpu.Barrier(num_arrivals=2),
        "tile_here_D": plgpu.Barrier(num_arrivals=1 + fp8, num_barriers=depth),
    }
    if fp4:
        rows = plgpu.SMEM((depth, TILE, FP4.width), jnp.uint8)
        return buffers | {"rows_DXW": rows, "keys_XJ": matrix((TILE, dim))}
    if not isinstance(keys, Fp8Keys):
        return buffers | {"keys_DXJ": matrix((depth, TILE, dim))}
    codes = plgpu.SMEM((depth, TILE, dim), jnp.float8_e4m3fn, transforms=BYTES_TILED)
    scale = jnp.float32 if keys.scale.dtype == jnp.float32 else jnp.uint8
    scales = plgpu.SMEM((depth, 2 * TILE), scale)
    return buffers | {"codes_DXJ": codes, "scale_DY": scales, "keys_XJ": matrix((TILE, dim))}


def start_of(nominal: Any, entries: int) -> Any:
    """Start of the tile whose first entry should be `nominal`: the last tile reaches back."""
    return jnp.minimum(nominal, entries - TILE)


def score_chunk(
    source: Any, layer: Array, row: Array, q_JI: Any, weights_I: Any, *, span: Any, heads: int
) -> Any:
    """Score entries of a batch row.

    Args:
      source: refs to `arrays_of` keys, and whether they are pages.
      layer: the layer to read.
      row: the batch row to read.
      q_JI: ref to the query, heads last.
      weights_I: ref to its weights.
      span: first entry, one past the last, and capacity in entries.
      heads: heads of the query; the rest is padding.
    Returns:
      A function that takes a ref to i32[R, C] and the `buffers`, and writes the ordered scores to
      the ref, from its start on.
    """
    first, end, capacity = span
    arrays, _ = source

    def fetch(smem: Any, depth: int, tile: Any) -> None:
        start = start_of(first + tile * TILE, capacity)
        _fetch(source, layer, row, start, smem, jax.lax.rem(tile, depth))

    def run(score_ref: Any, smem: Any) -> None:
        depth = smem["tile_here_D"].shape[0]
        tiles = (end - first + TILE - 1) // TILE
        plgpu.copy_gmem_to_smem(q_JI, smem["q_JI"], smem["here"])
        plgpu.copy_gmem_to_smem(weights_I, smem["weights_I"], smem["here"])
        for tile in range(depth):
            pl.when(tile < tiles)(functools.partial(fetch, smem, depth, jnp.int32(tile)))
        plgpu.barrier_wait(smem["here"])
        weights = load(smem["weights_I"], _BY_HEAD)

        @pl.loop(0, tiles)
        def _(tile: Array) -> None:
            slot = jax.lax.rem(tile, depth)
            plgpu.barrier_wait(smem["tile_here_D"].at[slot])
            nominal = first + tile * TILE
            start = start_of(nominal, capacity)
            # Scales first: the product waits until all warps have read what `fetch` overwrites.
            scale_X = None
            if "scale_DY" in smem:
                of_tile = pl.ds(start - _scales_start(start, arrays[1]), TILE)
                scale_X = load(smem["scale_DY"].at[slot, of_tile], _BY_ENTRY)
            score_X = _tile_scores(slot, weights, heads, smem)
            if scale_X is not None:
                score_X *= scale_X if scale_X.dtype == jnp.float32 else _power_of_two(scale_X)
            key_X = ordered(score_X)
            entry_X = start + gpu_select.iota((TILE,), 0, _BY_ENTRY)
            # The last tile may repeat entries of the one before.
            in_span_X = (entry_X >= nominal) & (entry_X < end)
            half = pl.ds(jax.lax.rem(tile, 2) * TILE, TILE)
            score_ref[tile // 2, half] = jnp.where(in_span_X, key_X, NOTHING)
            pl.when(tile + depth < tiles)(functools.partial(fetch, smem, depth, tile + depth))

    return run


def _fetch(source: Any, layer: Array, row: Array, start: Any, smem: Any, slot: Any) -> None:
    """Start copying the tile that starts with this entry, and its scales, to a slot."""
    arrays, paged = source
    here = smem["tile_here_D"].at[slot]
    if paged:
        pages, table = arrays
        size = pages.shape[2]
        page, within = table[row, start // size], jax.lax.rem(start, size)
        keys_XJ = pages.at[layer, page, pl.ds(within, TILE)]
    else:
        keys_XJ = arrays[0].at[layer, row, pl.ds(start, TILE)]
    to = next(smem[name] for name in ("codes_DXJ", "rows_DXW", "keys_DXJ") if name in smem)
    plgpu.copy_gmem_to_smem(keys_XJ, to.at[slot], here)
    if "scale_DY" in smem:
        scale_LBS = arrays[1]
        scales = pl.ds(_scales_start(start, scale_LBS), 2 * TILE)
        scale_Y = scale_LBS.at[layer, row, scales]
        plgpu.copy_gmem_to_smem(scale_Y, smem["scale_DY"].at[slot], here)


def _tile_scores(slot: Array, weights_I: Array, heads: int, smem: Any) -> Array:
    """Scores of the tile in a slot."""
    if "codes_DXJ" in smem:
        codes_XJ = load(smem["codes_DXJ"].at[slot], plgpu.Layout.WGMMA)
        smem["keys_XJ"][...] = codes_XJ.astype(jnp.float32).astype(jnp.bfloat16)
        dots_XI = gpu_select.product(smem["keys_XJ"], smem["q_JI"])
    elif "rows_DXW" in smem:
        _expand(smem["rows_DXW"].at[slot], smem["keys_XJ"])
        dots_XI = gpu_select.product(smem["keys_XJ"], smem["q_JI"])
    else:
        dots_XI = gpu_select.product(smem["keys_DXJ"].at[slot], smem["q_JI"])
    terms_XI = jnp.maximum(dots_XI, 0.0) * along(weights_I, dots_XI.shape, 1)
    if heads < dots_XI.shape[1]:
        # An infinite key times a padding head of zeros is NaN.
        terms_XI = jnp.where(gpu_select.iota(dots_XI.shape, 1) < heads, terms_XI, 0.0)
    return jnp.sum(terms_XI, axis=1)


def _expand(rows_XW: Any, keys_XJ: Any) -> None:
    """Write a tile of `byte_rows.FP4` as bfloat16, in the order of `FP4.by_nibble`."""
    half = FP4.channels // 2
    words = lambda at: load(rows_XW.at[:, pl.ds(at, half)], plgpu.Layout.WGMMA).astype(jnp.int32)
    code_XH = words(0)
    power_XH = jax.lax.bitcast_convert_type(words(half) << 23, jnp.float32)
    for nibble in range(2):
        value_XH = e2m1(code_XH >> 4 * nibble) * power_XH
        keys_XJ[:, pl.ds(nibble * half, half)] = value_XH.astype(jnp.bfloat16)


def _scales_start(start: Any, scale_LBS: Any) -> Any:
    """Where to read 128 scales, the least that a warpgroup copies, that include a tile's."""
    return jnp.minimum(start, scale_LBS.shape[2] - 2 * TILE)


def _power_of_two(exponent: Array) -> Array:
    """E8M0 as float32: 2^(e - 127), the smallest of which is subnormal."""
    exponent = exponent.astype(jnp.int32)
    bits = jnp.where(exponent == 0, 1 << 22, jax.lax.shift_left(exponent, jnp.int32(23)))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
