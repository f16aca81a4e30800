"""Scores of a block of keys for one query, inside a TPU kernel.

The vector unit's work per head and 128 keys is the least there is: bound, weigh, add. Heads lie
along sublanes; eight vectors of partial sums are folded into one whose sublane i holds keys
128 * i to 128 * i + 127.

Axis letters: as in the package; X keys of a tile, 1024.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels.indexer_topk import tpu_choice as choice
from pallas_kernels.indexer_topk.reference import ordered

LANES = 128
TILE = 8 * LANES  # keys whose scores are one vector


def score_block(
    q_IJ: Any,
    column_ref: Any,
    key_refs: Any,
    scale_ref: Any,
    scores_ref: Any,
    peaks_ref: Any,
    start: Int32[Array, ""],
    visible: Int32[Array, ""],
    *,
    heads: int,
) -> None:
    """Write a block's scores, and raise the maxima over blocks of each place in a block.

    Args:
      q_IJ: the query.
      column_ref: [I, 128], each head's weight along lanes.
      key_refs: [1, 1, N, J] each, side by side the block.
      scale_ref: None, or [1, 1, X / 128, 128], factors of the scores.
      scores_ref: all ordered scores, [R, 128].
      peaks_ref: the maxima, [X / 128, 128].
      start: first row of `scores_ref` to write.
      visible: entries that exist.
      heads: those of the query; what follows them is padding.
    """
    scale = None if scale_ref is None else _float32(scale_ref[0, 0])
    for tile in range(peaks_ref.shape[0] // 8):
        score = _tile_of_scores(q_IJ, column_ref[...], _tile_of_keys(key_refs, tile), heads)
        rows = slice(tile * 8, tile * 8 + 8)
        if scale is not None:
            score *= scale[rows]
        first = pl.multiple_of(start + tile * 8, 8)
        exists = choice.index_of(8, first) < visible
        key = jnp.where(exists, ordered(score), choice.NOTHING)
        scores_ref[pl.ds(first, 8), :] = key
        peaks_ref[rows, :] = jnp.maximum(peaks_ref[rows, :], key)


def _float32(scale: Any) -> Any:
    """Scales as numbers; 2^-127 counts as 0."""
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


def _tile_of_scores(q_IJ: Any, weight_IL: Any, keys_XJ: Any, heads: int) -> Float32[Array, "8 128"]:
    if keys_XJ.dtype != q_IJ.dtype:
        keys_XJ = keys_XJ.astype(q_IJ.dtype)
    dots_IX = jax.lax.dot_general(
        q_IJ,
        keys_XJ,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if q_IJ.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    if heads < len(dots_IX):
        # Of an infinite key padding would make NaN.
        head_IX = jax.lax.broadcasted_iota(jnp.int32, dots_IX.shape, 0)
        dots_IX = jnp.where(head_IX < heads, dots_IX, 0.0)

    def part(at: int) -> Any:
        weighted_IL = jnp.maximum(dots_IX[:, at * LANES : (at + 1) * LANES], 0.0) * weight_IL
        return jnp.sum(weighted_IL.reshape(-1, 8, LANES), axis=0)

    return _sublanes_summed([part(at) for at in range(8)])


def _sublanes_summed(parts: list[Any]) -> Float32[Array, "8 128"]:
    """Row i of the result is the sum of part i's eight rows."""
    row = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
    for shift in (4, 2, 1):
        first = (row & shift) == 0
        parts = [
            jnp.where(first, a, pltpu.roll(b, shift, 0))
            + jnp.where(first, pltpu.roll(a, 8 - shift, 0), b)
            for a, b in zip(parts[:shift], parts[shift:], strict=True)
        ]
    return parts[0]
