"""Rows times FP4 weights with Mosaic GPU.

A block of threads owns 128 columns. While tensor cores multiply one tile, the threads convert the
codes and scales of the next to bfloat16 in the other half of a double buffer.

Axis letters: as in gpu.py; D tiles in flight, S the two tiles of the buffer, X channels of a tile,
J bytes and B blocks of them, M rows and C columns of a block of threads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import TILED
from pallas_kernels.quantize import gpu_codes, gpu_tiles
from pallas_kernels.quantize.gpu_tiles import COLUMNS
from pallas_kernels.quantize.leaves import FP4_BLOCK, Fp4Weight

CHANNELS = 64  # per tile
# Tiles in flight. Two blocks of threads fit into a multiprocessor's memory, except with 128 rows
# and several parts of K.
_DEPTH = 3


def sums(
    x_RK: Float[Array, "R GK"],
    stack: Fp4Weight,
    layer_1: Int[Array, " 1"],
    *,
    groups: int,
    rows: int,
    parts: int,
) -> Float[Array, "Z R N"]:
    """Partial sums of the product; a block of threads has `rows` rows."""
    R, (_, N, K) = len(x_RK), stack.shape
    tiles, real_rows = K // CHANNELS // parts, min(R, rows)

    def body(x: Any, layer: Any, codes: Any, scale: Any, out: Any, **smem: Any) -> None:
        part, column, row = gpu_tiles.place()
        columns, block_rows = pl.ds(column * COLUMNS, COLUMNS), pl.ds(row * rows, real_rows)
        of_group = column // (N // groups // COLUMNS) * K

        def fetch(tile: Any) -> None:
            slot = jax.lax.rem(tile, _DEPTH)
            here, at = smem["here_D"].at[slot], part * tiles + tile
            channels = lambda per: pl.ds(at * (CHANNELS // per), CHANNELS // per)
            # Missing rows hold garbage, which does not reach other rows.
            x_MX = x.at[block_rows, pl.ds(of_group + at * CHANNELS, CHANNELS)]
            plgpu.copy_gmem_to_smem(x_MX, smem["x_DMX"].at[slot, pl.ds(0, real_rows)], here)
            codes_JC = codes.at[layer[0], channels(2), columns]
            plgpu.copy_gmem_to_smem(codes_JC, smem["codes_DJC"].at[slot], here)
            scale_BC = scale.at[layer[0], channels(FP4_BLOCK), columns]
            plgpu.copy_gmem_to_smem(scale_BC, smem["scale_DBC"].at[slot], here)

        def accumulate(sum_ref: Any) -> Array:
            @pl.loop(0, tiles)
            def _(tile: Array) -> None:
                slot, dense_XC = jax.lax.rem(tile, _DEPTH), smem["dense_SXC"].at[tile & 1]
                plgpu.barrier_wait(smem["here_D"].at[slot])
                gpu_codes.write_fp4(
                    smem["codes_DJC"].at[slot], smem["scale_DBC"].at[slot], dense_XC
                )
                plgpu.wgmma_wait(0)
                # All warps are done with the previous tile: its slot can be refilled.
                plgpu.commit_smem()
                plgpu.wgmma(sum_ref, smem["x_DMX"].at[slot], dense_XC)
                ahead = tile + _DEPTH - 1
                pl.when((tile > 0) & (ahead < tiles))(lambda: fetch(ahead))

            return sum_ref[...]

        for tile in range(min(_DEPTH, tiles)):
            fetch(jnp.int32(tile))
        accumulator = plgpu.WGMMAAccumulatorRef((rows, COLUMNS), jnp.float32)
        sum_MC = pl.run_scoped(accumulate, accumulator)
        gpu_tiles.write(sum_MC, smem["out_MC"], out.at[part, block_rows, columns], real_rows)

    kernel = gpu_tiles.kernel(body, (parts, R, N), rows, _scratch(rows), "linear_fp4")
    exponents = jax.lax.bitcast_convert_type(stack.scale, jnp.uint8)
    return kernel(x_RK, layer_1, stack.codes, exponents)


def _scratch(rows: int) -> dict[str, Any]:
    """Shared memory: tiles in flight, and two in bfloat16."""
    bytes_of = lambda per: plgpu.SMEM((_DEPTH, CHANNELS // per, COLUMNS), jnp.uint8)
    return {
        "x_DMX": plgpu.SMEM((_DEPTH, rows, CHANNELS), jnp.bfloat16, transforms=TILED),
        "codes_DJC": bytes_of(2),
        "scale_DBC": bytes_of(FP4_BLOCK),
        "dense_SXC": plgpu.SMEM((2, CHANNELS, COLUMNS), jnp.bfloat16, transforms=TILED),
        "here_D": plgpu.Barrier(num_arrivals=3, num_barriers=_DEPTH),
    }
