"""Many rows times a quantised matrix: each tile is dequantised once and used for all rows.

Axis letters: R rows, G groups, I channels that are summed over, O channels of the result, K input
channels, N output channels, B blocks of K, L layers of a stack.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize import tpu_codes, tpu_tiles
from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK, Fp4Weight, Fp8Weight

_DENSE_BYTES = 32 * 2**20  # dequantised weights kept in VMEM


def matmul(
    x_RI: Float[Array, "R GI"],
    stack: Fp8Weight | Fp4Weight,
    layer_1: Int[Array, " 1"],
    groups: int,
    precision: jax.lax.PrecisionLike,
    *,
    transposed: bool = False,
) -> Float[Array, "R O"]:
    """Sum over K, or over a group's N if `transposed`; the other dim is outermost in the grid.

    Raises:
      Unsupported: a matrix that tiles do not divide, or with too many channels to keep in VMEM.
    """
    R, (_, N, K) = len(x_RI), stack.shape
    packed, group_N = K // stack.codes.shape[1], N // groups
    most = _DENSE_BYTES // x_RI.dtype.itemsize
    if transposed:
        bk, bn = _own_k(stack, group_N, most), tpu_tiles.divisor(group_N, 1024, 128)
        group_tiles, inner, out_size, block = K // bk, group_N // bn, groups * K, bk
    else:
        bk, bn = tpu_tiles.channels(K, 1024), _own_n(group_N, K, most)
        group_tiles, inner, out_size, block = pl.cdiv(group_N, bn), K // bk, N, bn
    bm = min(512, -(-R // 16) * 16)
    place = functools.partial(_place, group_tiles=group_tiles, inner=inner, transposed=transposed)

    # Index maps: (tile of O, block of rows, tile of I, prefetched layer) -> block.
    def group_channels(o: Any, rows: Any, i: Any, layer_ref: Any) -> tuple[Any, Any]:
        return rows, jax.lax.div(o, group_tiles) * inner + i

    def weight_tile(o: Any, rows: Any, i: Any, layer_ref: Any) -> tuple[Any, Any, Any]:
        # Read with the first block of rows only, when they are dequantised; after that the index
        # stays at the last tile, so that nothing is copied.
        return (layer_ref[0], *place(o, jnp.where(rows == 0, i, inner - 1)))

    def result_tile(o: Any, rows: Any, i: Any, layer_ref: Any) -> tuple[Any, Any]:
        return rows, o

    scale_spec, wide, dequantise = _of_format(stack, (bk, bn), weight_tile, transposed)
    settings = {"precision": precision, "transposed": transposed}
    return pl.pallas_call(
        functools.partial(_dense_tiles, dequantise=dequantise, place=place, **settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups * group_tiles, pl.cdiv(R, bm), inner),
            in_specs=[
                pl.BlockSpec((bm, bn if transposed else bk), group_channels),
                pl.BlockSpec((None, bk // packed, bn), weight_tile),
                scale_spec,
            ],
            out_specs=pl.BlockSpec((bm, block), result_tile),
            scratch_shapes=[
                pltpu.VMEM((bm, block), jnp.float32),
                pltpu.VMEM((inner, bk, bn), x_RI.dtype),
                pltpu.VMEM(wide, jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((R, out_size), x_RI.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu_tiles.VMEM_BYTES,
        ),
        name="linear_backward" if transposed else "linear_many_rows",
    )(layer_1, x_RI, stack.codes, stack.scale)


def _of_format(
    stack: Fp8Weight | Fp4Weight, tile: tuple[int, int], weight_tile: Any, transposed: bool
) -> tuple[Any, tuple[int, ...], Callable[..., None]]:
    """Spec of the scales, shape of the scratch for them in float32, function that dequantises."""
    (bk, bn), scale_shape = tile, stack.scale.shape[1:]
    if isinstance(stack, Fp4Weight):
        # The scratch is not used.
        return pl.BlockSpec((None, bk // FP4_BLOCK, bn), weight_tile), (8, 128), _dequantise_fp4
    scratch_shape = (bk // FP8_BLOCK, scale_shape[1]) if transposed else scale_shape
    dequantise = functools.partial(_dequantise_fp8, native=tpu_codes.has_native_e4m3())
    return tpu_tiles.all_scales(stack.scale), scratch_shape, dequantise


def _own_n(N: int, K: int, most: int) -> int:
    """Columns per tile whose K weights are all kept dequantised, `most` numbers at most."""
    size = tpu_tiles.columns(N, min(1024, most // K))
    if K * size > most:
        raise Unsupported(f"The TPU form of linear takes fewer input channels than {K}.")
    return size


def _place(o: Any, i: Any, *, group_tiles: int, inner: int, transposed: bool) -> tuple[Any, Any]:
    """The matrix's tile, along K and N, of step `i` of the sum for tile `o`."""
    if not transposed:
        return i, o
    group = jax.lax.div(o, group_tiles)
    return o - group * group_tiles, group * inner + i


def _dense_tiles(
    layer_ref: Any,
    x_ref: Any,  # [bm, bk], or [bm, bn] if transposed
    codes_ref: Any,  # [bk or bk / 2, bn]
    scale_ref: Any,  # FP8: [B, N / 128]; FP4: [bk / 32, bn]
    out_ref: Any,  # [bm, bn], or [bm, bk]
    sum_ref: Any,  # the same, float32
    dense_ref: Any,  # [tiles along the sum, bk, bn]
    wide_ref: Any,  # FP8: the scales in float32
    *,
    dequantise: Any,
    place: Any,
    precision: Any,
    transposed: bool,
) -> None:
    del layer_ref  # the index maps have picked its matrix
    o, m, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dense = dense_ref.at[i]

    @pl.when(m == 0)
    def _():
        k, n = place(o, i)
        dequantise(codes_ref, scale_ref, dense, wide_ref, k, n)

    @pl.when(i == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += tpu_tiles.dot(x_ref[...], dense[...], precision, transposed=transposed)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _own_k(stack: Fp8Weight | Fp4Weight, N: int, most: int) -> int:
    """Channels per tile whose weights for a group's N are all kept dequantised, `most` at most."""
    K = stack.shape[-1]
    size = tpu_tiles.divisor(K, min(1024, most // N), 128)
    if size * N > most or (isinstance(stack, Fp4Weight) and size % 1024 and size != K):
        raise Unsupported(f"The TPU form of linear_backward does not take a matrix of {N} x {K}.")
    return size


def _dequantise_fp8(
    codes_ref: Any, scale_ref: Any, dense: Any, wide_ref: Any, k: Any, n: Any, *, native: bool
) -> None:
    bk, bn = codes_ref.shape
    rows = wide_ref.shape[0]
    partial = rows != scale_ref.shape[0]  # k is outermost: only its tile's rows are needed

    @pl.when(pl.program_id(2) == 0)
    def _():
        scale = tpu_codes.scale_values(scale_ref[...]) * tpu_codes.e4m3_unit(native)
        wide_ref[...] = tpu_codes.rows(scale, k * rows, rows) if partial else scale

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP8_BLOCK
        first = (
            tpu_tiles.part_of(at_k if partial else k * bk + at_k, ck, FP8_BLOCK)
            if rows > blocks
            else 0
        )
        scale = tpu_codes.spread(
            wide_ref[pl.ds(first, blocks), :], jax.lax.div(n * bn + at_n, FP8_BLOCK), cn
        )
        for b in range(blocks):
            at = (pl.ds(at_k + b * FP8_BLOCK, FP8_BLOCK), pl.ds(at_n, cn))
            values = tpu_codes.e4m3_values(codes_ref[at], native).astype(jnp.float32)
            dense[at] = (values * scale[b : b + 1]).astype(dense.dtype)

    tpu_tiles.over_chunks(bk, bn, chunk)


def _dequantise_fp4(codes_ref: Any, scale_ref: Any, dense: Any, *_: Any) -> None:
    bk, bn = dense.shape

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP4_BLOCK
        scale = scale_ref[pl.ds(tpu_tiles.part_of(at_k, ck, FP4_BLOCK), blocks), pl.ds(at_n, cn)]
        # Powers of two are exact in bfloat16.
        scale = (tpu_codes.scale_values(scale) * tpu_codes.E2M1_UNIT).astype(jnp.bfloat16)
        for b in range(ck // FP8_BLOCK):
            at = tpu_tiles.part_of(at_k, ck, 2) + b * FP8_BLOCK // 2
            values = tpu_codes.e2m1_values(codes_ref[pl.ds(at, FP8_BLOCK // 2), pl.ds(at_n, cn)])
            for i in range(FP8_BLOCK // FP4_BLOCK):
                row = b * FP8_BLOCK // FP4_BLOCK + i
                part = values[i * FP4_BLOCK : (i + 1) * FP4_BLOCK] * scale[row : row + 1]
                to = (pl.ds(at_k + row * FP4_BLOCK, FP4_BLOCK), pl.ds(at_n, cn))
                dense[to] = part.astype(dense.dtype)

    tpu_tiles.over_chunks(bk, bn, chunk)
