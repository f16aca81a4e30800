"""Scores of a block of keys for one query, inside a TPU kernel.

The vector unit's work per head and 128 keys is minimal: relu, weight, add. Heads are along
sublanes; eight vectors of partial sums are folded into one, whose sublane i has the keys
128 * i .. 128 * i + 127.

Axis letters: as in the package; X = 1024 keys of a tile, L = 128 lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels.indexer_topk import tpu_choice as choice
from pallas_kernels.indexer_topk.keys import FP4_BLOCK
from pallas_kernels.indexer_topk.reference import ordered
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract
from pallas_kernels.quantize import tpu_codes

TILE = 8 * LANES  # keys whose scores are one vector
# Of 4096 places, few have more than this many of the 512 best: 1 query in 1000 needs a second pass.
PEAKS = 4


def score_block(
    q_IJ: Any,
    column_ref: Any,
    key_refs: Any,
    scale_ref: Any,
    scores_ref: Any,
    peaks_ref: Any,
    start: Int32[Array, ""],
    visible: Int32[Array, ""],
    hidden: Int32[Array, ""] | None = None,
    *,
    heads: int,
    tiles: int,
) -> None:
    """Write a block's scores, and update the few largest of each place.

    Args:
      q_IJ: the query.
      column_ref: [I, 128], each head's weight along lanes.
      key_refs: [1, 1, N, J] each, together the block; or FP4 codes, [1, 1, J / 2, X].
      scale_ref: None; scales of the scores, [1, 1, X / 128, 128]; or with FP4 codes, scales of the
        keys, [1, 1, X / 128, 4 * J].
      scores_ref: all ordered scores, [R, 128].
      peaks_ref: the largest, second largest and so on, [PEAKS, 8 * places / 1024, 128].
      start: first row of `scores_ref` to write.
      visible: entries below this are seen,
      hidden: but not those below this; None: 0.
      heads: heads of the query; the rest is padding.
      tiles: tiles of 1024 keys in the block.
    """
    fp4 = key_refs[0].dtype == jnp.uint8
    unit = tpu_codes.E2M1_UNIT if fp4 else 1.0
    scale = None if scale_ref is None else _float32(scale_ref[0, 0]) * unit
    for tile in range(tiles):
        scale_of_tile = None if scale is None else scale[tile * 8 : tile * 8 + 8]
        if fp4:
            keys = _tile_of_fp4(key_refs[0], scale_of_tile, tile, q_IJ.dtype)
        else:
            keys = _tile_of_keys(key_refs, tile)
        score = _tile_of_scores(q_IJ, column_ref[...], keys, heads, by_channel=fp4)
        if scale_of_tile is not None and not fp4:
            score *= scale_of_tile
        first = pl.multiple_of(start + tile * 8, 8)
        entry = choice.index_of(8, first)
        exists = entry < visible if hidden is None else (entry < visible) & (entry >= hidden)
        key = jnp.where(exists, ordered(score), choice.NOTHING)
        scores_ref[pl.ds(first, 8), :] = key
        _update_peaks(peaks_ref, pl.ds(tile * 8 % peaks_ref.shape[1], 8), key)


def _update_peaks(peaks_ref: Any, rows: Any, key: Int32[Array, "8 128"]) -> None:
    for depth in range(PEAKS):
        peak = peaks_ref[depth, rows, :]
        peaks_ref[depth, rows, :] = jnp.maximum(peak, key)
        key = jnp.minimum(peak, key)


def _float32(scale: Any) -> Any:
    """Scales in float32; 2^-127 counts as 0."""
    if scale.dtype != jnp.float8_e8m0fnu:
        return scale
    exponent = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    power = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return jnp.where(exponent == 255, jnp.nan, power)


def _tile_of_keys(key_refs: Any, tile: int) -> Any:
    per_piece = key_refs[0].shape[2]
    if per_piece >= TILE:
        ref, at = key_refs[tile * TILE // per_piece], tile * TILE % per_piece
        return ref[0, 0, pl.ds(at, TILE), :]
    pieces = TILE // per_piece
    return jnp.concatenate(
        [ref[0, 0] for ref in key_refs[tile * pieces : (tile + 1) * pieces]], axis=0
    )


def _tile_of_fp4(codes_ref: Any, scale: Any, tile: int, dtype: Any) -> Any:
    """Keys with channels first, [J, 1024]; `scale` is `E2M1_UNIT` times the keys' scale."""
    packed = codes_ref[0, 0, :, pl.ds(tile * TILE, TILE)]
    # Products with powers of two are exact either way; before TPU7x, float32 needs fewer packings.
    wide = jnp.bfloat16 if tpu_codes.has_native_e4m3() else jnp.float32
    value_JX = jnp.concatenate([half.astype(wide) for half in tpu_codes.e2m1_halves(packed)])
    along = lambda block: jnp.concatenate(
        [scale[row : row + 1, block * LANES : (block + 1) * LANES] for row in range(8)], axis=1
    )
    blocks = range(scale.shape[1] // LANES)
    scale_KX = [jnp.broadcast_to(along(block).astype(wide), (FP4_BLOCK, TILE)) for block in blocks]
    return (value_JX * jnp.concatenate(scale_KX)).astype(dtype)


def _tile_of_scores(
    q_IJ: Any, weight_IL: Any, keys: Any, heads: int, *, by_channel: bool
) -> Float32[Array, "8 128"]:
    """Scores of keys [1024, J], or [J, 1024] with `by_channel`."""
    if keys.dtype != q_IJ.dtype:
        keys = keys.astype(q_IJ.dtype)
    precision = jax.lax.Precision.HIGHEST if q_IJ.dtype == jnp.float32 else None
    dots_IX = contract(q_IJ, keys, 1, 0 if by_channel else 1, precision)
    if heads < len(dots_IX):
        # An infinite key times a padding head of zeros is NaN.
        head_IX = jax.lax.broadcasted_iota(jnp.int32, dots_IX.shape, 0)
        dots_IX = jnp.where(head_IX < heads, dots_IX, 0.0)

    def part(at: int) -> Any:
        weighted_IL = jnp.maximum(dots_IX[:, at * LANES : (at + 1) * LANES], 0.0) * weight_IL
        return jnp.sum(weighted_IL.reshape(-1, 8, LANES), axis=0)

    return _sublanes_summed([part(at) for at in range(8)])


def _sublanes_summed(parts: list[Any]) -> Float32[Array, "8 128"]:
    """Fold eight vectors into one, whose row i is the sum of part i's eight rows."""
    row = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
    for shift in (4, 2, 1):
        first = (row & shift) == 0
        parts = [
            jnp.where(first, a, pltpu.roll(b, shift, 0))
            + jnp.where(first, pltpu.roll(a, 8 - shift, 0), b)
            for a, b in zip(parts[:shift], parts[shift:], strict=True)
        ]
    return parts[0]
