"""Few rows times a quantised matrix: each block's products are scaled, not its weights.

Reading the codes is the bottleneck.

Axis letters: R rows, K input channels, N output channels, B blocks of K, L layers of a stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize import tpu_codes, tpu_tiles
from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK, Fp4Weight, Fp8Weight

_TILE_BYTES = 2**21  # of codes: a microsecond or two of HBM time, which hides latency


def matmul(
    x_RK: Float[Array, "R GK"],
    stack: Fp8Weight | Fp4Weight,
    layer_1: Int[Array, " 1"],
    groups: int,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "R N"]:
    """Rows times one matrix [N, K] of a stack; each group of N reads its own K channels.

    Raises:
      Unsupported: a K that tiles do not divide.
    """
    R, (_, N, K) = len(x_RK), stack.shape
    packed = K // stack.codes.shape[1]
    bn = tpu_tiles.columns(N // groups, 2048)
    bk = tpu_tiles.channels(K, max(_TILE_BYTES * packed // bn, 1024))
    rows, group_tiles = -(-R // 8) * 8, pl.cdiv(N // groups, bn)
    fp8 = isinstance(stack, Fp8Weight)
    kernel = _fp8_products if fp8 else _fp4_products

    # Index maps: (tile of N, tile of K, prefetched layer) -> block. The sum over K is innermost.
    def weight_tile(n: Any, k: Any, layer_ref: Any) -> Any:
        return layer_ref[0], k, n

    def group_channels(n: Any, k: Any, layer_ref: Any) -> Any:
        return 0, jax.lax.div(n, group_tiles) * (K // bk) + k

    def result_tile(n: Any, k: Any, layer_ref: Any) -> Any:
        return 0, n

    scale_shape = stack.scale.shape[1:]
    scale_spec = tpu_tiles.all_scales(stack.scale)
    if not fp8:
        scale_spec = pl.BlockSpec((None, bk // FP4_BLOCK, bn), weight_tile)
    per_block = pltpu.VMEM((bk // FP8_BLOCK, rows * FP8_BLOCK // FP4_BLOCK, FP8_BLOCK), x_RK.dtype)
    scratch = [pltpu.VMEM((rows, bn), jnp.float32)]
    scratch.append(pltpu.VMEM(scale_shape, jnp.float32) if fp8 else per_block)
    return pl.pallas_call(
        functools.partial(kernel, precision=precision, native=tpu_codes.has_native_e4m3()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(N, bn), K // bk),
            in_specs=[
                pl.BlockSpec((rows, bk), group_channels),
                pl.BlockSpec((None, bk // packed, bn), weight_tile),
                scale_spec,
            ],
            out_specs=pl.BlockSpec((rows, bn), result_tile),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((R, N), x_RK.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tpu_tiles.VMEM_BYTES
        ),
        name="linear_few_rows",
    )(layer_1, x_RK, stack.codes, stack.scale)


def _fp8_products(
    layer_ref: Any,
    x_ref: Any,  # [R, bk]
    codes_ref: Any,  # [bk, bn]
    scale_ref: Any,  # [B, N / 128]
    out_ref: Any,  # [R, bn]
    sum_ref: Any,  # [R, bn] float32
    wide_ref: Any,  # [B, N / 128] float32
    *,
    precision: Any,
    native: bool,
) -> None:
    del layer_ref  # the index maps have picked its matrix
    n, k = pl.program_id(0), pl.program_id(1)
    bk, bn = codes_ref.shape

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        unit = tpu_codes.e4m3_unit(native)
        wide_ref[...] = tpu_codes.scale_values(scale_ref[...]) * unit

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP8_BLOCK
        block = tpu_tiles.part_of(k * bk + at_k, ck, FP8_BLOCK) if wide_ref.shape[0] > blocks else 0
        scale = wide_ref[pl.ds(block, blocks), :]
        scale = tpu_codes.spread(scale, jax.lax.div(n * bn + at_n, FP8_BLOCK), cn)
        total = sum_ref[:, pl.ds(at_n, cn)]
        for b in range(blocks):
            at = pl.ds(at_k + b * FP8_BLOCK, FP8_BLOCK)
            values = tpu_codes.e4m3_values(codes_ref[at, pl.ds(at_n, cn)], native)
            total += tpu_tiles.dot(x_ref[:, at], values, precision) * scale[b : b + 1]
        sum_ref[:, pl.ds(at_n, cn)] = total

    tpu_tiles.over_chunks(bk, bn, chunk)

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _fp4_products(
    layer_ref: Any,
    x_ref: Any,  # [R, bk]
    codes_ref: Any,  # [bk / 2, bn]
    scale_ref: Any,  # [bk / 32, bn]
    out_ref: Any,  # [R, bn]
    sum_ref: Any,  # [R, bn] float32
    per_block_ref: Any,  # [bk / 128, 4 * R, 128]
    *,
    precision: Any,
    native: bool,
) -> None:
    del layer_ref, native
    k = pl.program_id(1)
    R, bk = x_ref.shape
    bn = codes_ref.shape[1]
    group = FP8_BLOCK // FP4_BLOCK  # blocks per product

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for g in range(bk // FP8_BLOCK):
        # In float32, whose layout does not depend on the number of rows.
        x = x_ref[:, g * FP8_BLOCK : (g + 1) * FP8_BLOCK].astype(jnp.float32)
        per_block_ref[g] = tpu_codes.rows_per_block(x).astype(x_ref.dtype)

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP4_BLOCK
        scale = scale_ref[pl.ds(tpu_tiles.part_of(at_k, ck, FP4_BLOCK), blocks), pl.ds(at_n, cn)]
        scale = tpu_codes.scale_values(scale) * tpu_codes.E2M1_UNIT
        total = sum_ref[:, pl.ds(at_n, cn)]
        for b in range(ck // FP8_BLOCK):
            at = tpu_tiles.part_of(at_k, ck, 2) + b * FP8_BLOCK // 2
            values = tpu_codes.e2m1_values(codes_ref[pl.ds(at, FP8_BLOCK // 2), pl.ds(at_n, cn)])
            products = tpu_tiles.dot(
                per_block_ref[tpu_tiles.part_of(at_k, ck, FP8_BLOCK) + b], values, precision
            )
            for i in range(group):
                row = b * group + i
                total += products[i * R : (i + 1) * R] * scale[row : row + 1]
        sum_ref[:, pl.ds(at_n, cn)] = total

    tpu_tiles.over_chunks(bk, bn, chunk)

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
