"""The entries that a decoding step completes on TPUs, read from the cache's ring in place.

Grid: rows of the batch. A row's entire ring, little more than the windows, is copied to VMEM; there
it is repeated once, so that windows never wrap around.

Axis letters: as in the package; V channels of a column (128), U = 2 * overlap columns at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.compress.tpu_finish import finish, in_pairs
from pallas_kernels.compress.tpu_pool import SUBLANES, pool
from pallas_kernels.mosaic_tpu import LANES, in_hbm, resident


def decode(
    ring_LBRC: Float[Array, "L B R C2"],
    layer: Int[Array, ""],
    window_B: Int[Array, " B"],
    bias_MC: Float[Array, "M C"],
    scale_K: Float[Array, " K"],
    table: tuple[Float[Array, "B 1 Q"], Float[Array, "B 1 Q"]],
    *,
    overlap: int,
    eps: float,
    rounding: str,
    dtype: Any,
) -> Float[Array, "B 1 K"]:
    """See the package."""
    _, batch, rows, channels = ring_LBRC.shape
    dim, window_B = len(scale_K), window_B.astype(jnp.int32)
    per_row = lambda width: pl.BlockSpec((1, 1, width), lambda row, *_: (row, 0, 0))

    def ring(row: Any, layer_ref: Any, window_ref: Any, rows_read_ref: Any) -> Any:
        # Not read for a row without an entry: the previous row's ring stays (`_rows_read`).
        return layer_ref[0], rows_read_ref[row], 0, 0

    settings = {"eps": eps, "rounding": rounding, "dtype": dtype}
    return pl.pallas_call(
        functools.partial(_kernel, overlap, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[
                pl.BlockSpec((1, 1, rows, channels), ring),
                resident(*bias_MC.shape),
                resident(*scale_K[None].shape),
                *(per_row(part.shape[2]) for part in table),
            ],
            out_specs=per_row(dim),
            scratch_shapes=[
                pltpu.VMEM((2 * overlap, 2 * rows, LANES), jnp.float32),
                pltpu.VMEM((dim // LANES, SUBLANES, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, 1, dim), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="compress_decode",
    )(
        layer.astype(jnp.int32)[None],
        window_B,
        _rows_read(window_B),
        in_hbm(ring_LBRC),
        bias_MC,
        scale_K[None],
        *table,
    )


def _rows_read(window_B: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """The row whose ring is in VMEM: for a row without an entry, the last before it with one."""
    row_B = jnp.arange(len(window_B), dtype=jnp.int32)
    return jnp.maximum(jax.lax.cummax(jnp.where(window_B >= 0, row_B, -1)), 0)


def _kernel(
    overlap: int,
    settings: dict[str, Any],
    _: Any,
    window_ref: Any,  # SMEM [B]
    __: Any,
    ring_ref: Any,  # [1, 1, R, C2]
    bias_ref: Any,  # [M, C]
    scale_ref: Any,  # [1, K]
    cos_ref: Any,  # [1, 1, Q]
    sin_ref: Any,  # [1, 1, Q]
    out_ref: Any,  # [1, 1, K]
    twice_ref: Any,  # [U, 2R, V]
    pooled_ref: Any,  # [K / V, 8, V]
) -> None:
    window, ratio, rows = window_ref[pl.program_id(0)], len(bias_ref), ring_ref.shape[2]
    columns = len(pooled_ref)
    base = (window + 1 - overlap) * ratio % rows

    def column(c: Any, _: Any) -> None:
        lanes = lambda u: pl.ds(pl.multiple_of((u * columns + c) * LANES, LANES), LANES)
        for u in range(2 * overlap):
            part_RV = ring_ref[0, 0, :, lanes(u)]
            twice_ref[u, :rows] = part_RV
            twice_ref[u, rows:] = part_RV
        pooled_1V = pool(
            lambda u, at, count, stride: twice_ref.at[u][pl.ds(base + at, count, stride=stride)],
            lambda s, at, count: bias_ref[pl.ds(at, count), lanes(s)],
            ratio,
            overlap,
            1,
            window,
        )
        pooled_ref[c] = jnp.broadcast_to(pooled_1V, pooled_ref.shape[1:])

    @pl.when(window < 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(window >= 0)
    def _() -> None:
        jax.lax.fori_loop(0, columns, column, None)
        pairs = [
            in_pairs(jnp.broadcast_to(ref[0], (SUBLANES, ref.shape[2])), 1)
            for ref in (cos_ref, sin_ref)
        ]
        columns_RV = [pooled_ref[c] for c in range(columns)]
        rotated = 2 * cos_ref.shape[2]
        entry_RK = finish(columns_RV, scale_ref[...], *pairs, rotated=rotated, **settings)
        out_ref[0] = entry_RK[:1]
