"""Rows times FP8 weights with Mosaic GPU.

A block of threads owns 128 columns. A 128 x 128 tile of codes has one scale: it becomes bfloat16
in shared memory, exactly, and its product with the rows is multiplied by the scale in registers.

Axis letters: as in gpu.py; D tiles in flight, X channels of a tile, C columns of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.mosaic_gpu import BYTES_TILED, TILED, load, product
from pallas_kernels.quantize import gpu_tiles
from pallas_kernels.quantize.gpu_tiles import COLUMNS
from pallas_kernels.quantize.leaves import FP8_BLOCK, Fp8Weight, of_layer

_DEPTH = 3  # tiles in flight


def sums(
    x_RK: Float[Array, "R GK"],
    stack: Fp8Weight,
    layer_1: Int[Array, " 1"],
    *,
    groups: int,
    rows: int,
    parts: int,
) -> Float[Array, "Z R N"]:
    """Partial sums of the product; a block of threads has `rows` rows."""
    R, (_, N, K) = len(x_RK), stack.shape
    tiles, real_rows = K // FP8_BLOCK // parts, min(R, rows)

    def body(
        x_ref: Any, layer_ref: Any, codes_ref: Any, scale_ref: Any, out_ref: Any, **smem: Any
    ) -> None:
        part, column, row = gpu_tiles.place()
        columns, block_rows = pl.ds(column * COLUMNS, COLUMNS), pl.ds(row * rows, real_rows)
        first, layer = part * tiles, layer_ref[0]
        of_group = column // (N // groups // COLUMNS) * K

        def fetch(tile: Any) -> None:
            slot, here = jax.lax.rem(tile, _DEPTH), smem["here_D"].at[jax.lax.rem(tile, _DEPTH)]
            at = (first + tile) * FP8_BLOCK
            # Missing rows hold garbage, which does not reach other rows.
            x = x_ref.at[block_rows, pl.ds(of_group + at, FP8_BLOCK)]
            plgpu.copy_gmem_to_smem(x, smem["x_DMX"].at[slot, pl.ds(0, real_rows)], here)
            codes = codes_ref.at[layer, pl.ds(at, FP8_BLOCK), columns]
            plgpu.copy_gmem_to_smem(codes, smem["codes_DXC"].at[slot], here)

        for tile in range(min(_DEPTH, tiles)):
            fetch(jnp.int32(tile))

        def add(tile: Array, sum_MC: Float32[Array, "M C"]) -> Float32[Array, "M C"]:
            slot = jax.lax.rem(tile, _DEPTH)
            plgpu.barrier_wait(smem["here_D"].at[slot])
            codes_XC = load(smem["codes_DXC"].at[slot], plgpu.Layout.WGMMA)
            smem["dense_XC"][...] = codes_XC.astype(jnp.float32).astype(jnp.bfloat16)
            plgpu.commit_smem()
            products_MC = product(smem["x_DMX"].at[slot], smem["dense_XC"])
            plgpu.commit_smem()  # all warps have read what is overwritten next
            pl.when(tile + _DEPTH < tiles)(functools.partial(fetch, tile + _DEPTH))
            return sum_MC + products_MC * scale_ref[first + tile, column]

        zeros = plgpu.layout_cast(jnp.zeros((rows, COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
        sum_MC = jax.lax.fori_loop(0, tiles, add, zeros)
        gpu_tiles.write(sum_MC, smem["out_MC"], out_ref.at[part, block_rows, columns], real_rows)

    # One number per 16384 weights: not worth converting in each block of threads.
    scale_kn = of_layer(stack.scale, layer_1[0]).astype(jnp.float32)
    kernel = gpu_tiles.kernel(body, (parts, R, N), rows, _scratch(rows), "linear_fp8")
    return kernel(x_RK, layer_1, stack.codes, scale_kn)


def _scratch(rows: int) -> dict[str, Any]:
    """Shared memory: tiles in flight, and the current one in bfloat16."""
    block = FP8_BLOCK
    return {
        "x_DMX": plgpu.SMEM((_DEPTH, rows, block), jnp.bfloat16, transforms=TILED),
        "codes_DXC": plgpu.SMEM((_DEPTH, block, block), jnp.float8_e4m3fn, transforms=BYTES_TILED),
        "dense_XC": plgpu.SMEM((block, block), jnp.bfloat16, transforms=TILED),
        "here_D": plgpu.Barrier(num_arrivals=2, num_barriers=_DEPTH),
    }
