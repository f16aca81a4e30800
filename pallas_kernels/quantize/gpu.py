"""Matmuls with FP8 weights on NVIDIA GPUs from Hopper on, by Mosaic GPU.

A block of threads owns 128 columns. A 128 x 128 tile of codes has one scale: it becomes bfloat16
in shared memory, exactly, and its product with the rows is multiplied by the scale in registers.

Axis letters: L layers of a stack, G groups, R rows, K input channels, N output channels, Z parts
of K, D tiles under way, M rows of a block, X channels of a tile, C columns of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_gpu import load
from pallas_kernels.quantize.leaves import FP8_BLOCK, Fp8Weight, Weight, as_stack, of_layer

_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_BYTES_TILED = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_DEPTH = 3  # tiles under way; two blocks of threads fit a multiprocessor's memory
_BLOCKS = 264  # of threads: two on each multiprocessor of an H200
_PART_BYTES = 2**21  # of float32 sums of parts of K


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows N"]:
    """As `quantize.linear`, for bfloat16 and FP8 weights.

    Raises:
      Unsupported: another kind of weight, dtype, or a matrix that is not whole blocks of 128.
    """
    del precision  # products of bfloat16 are exact
    if not isinstance(w, Fp8Weight) or w.codes.ndim != (2 if layer is None else 3):
        raise Unsupported("The GPU form of linear takes one matrix in FP8.")
    (N, K), x_RK = w.shape[-2:], x.reshape(-1, x.shape[-1])
    if x.dtype != jnp.bfloat16 or N % (groups * FP8_BLOCK) or K % FP8_BLOCK or x.size == 0:
        raise Unsupported(
            f"The GPU form of linear takes bfloat16 and whole blocks of {FP8_BLOCK}; not"
            f" {x.dtype} {x.shape} times {groups} groups of {N} x {K}."
        )
    rows = 128 if len(x_RK) > 64 else 64
    x_RK = jnp.pad(x_RK, ((0, -len(x_RK) % (8 if rows == 64 else rows)), (0, 0)))
    parts = _parts(len(x_RK), N, K, rows)
    # A number in 16384: not worth a conversion of its own in each block of threads.
    scale_kn = of_layer(w.scale, layer).astype(jnp.float32)
    codes_LKN, layer_1 = as_stack(w.codes, layer)
    sums_ZRN = _sums(x_RK, layer_1, codes_LKN, scale_kn, groups=groups, rows=rows, parts=parts)
    y_RN = sums_ZRN[0] if parts == 1 else jnp.sum(sums_ZRN, axis=0).astype(x.dtype)
    return y_RN[: x.size // (groups * K)].reshape(*x.shape[:-1], N)


def _parts(R: int, N: int, K: int, rows: int) -> int:
    """Parts of K summed apart, so that few rows occupy the whole GPU too."""
    blocks = pl.cdiv(R, rows) * (N // FP8_BLOCK)
    most = min(_BLOCKS // blocks, _PART_BYTES // (4 * R * N))
    return next((n for n in range(most, 1, -1) if K // FP8_BLOCK % n == 0), 1)


def _sums(
    x_RK: Float[Array, "R GK"],
    layer_1: Int[Array, " 1"],
    codes_LKN: Any,
    scale_kn: Any,
    *,
    groups: int,
    rows: int,
    parts: int,
) -> Float[Array, "Z R N"]:
    R, (_, K, N) = len(x_RK), codes_LKN.shape
    tiles, taken = K // FP8_BLOCK // parts, min(R, rows)
    dtype = x_RK.dtype if parts == 1 else jnp.float32

    def body(
        x_ref: Any, layer_ref: Any, codes_ref: Any, scale_ref: Any, out_ref: Any, **smem: Any
    ) -> None:
        at = tuple(jax.lax.axis_index(name) for name in ("part", "column", "row"))
        part, column, row = at
        columns = pl.ds(column * FP8_BLOCK, FP8_BLOCK)
        first, layer = part * tiles, layer_ref[0]
        of_group = column // (N // groups // FP8_BLOCK) * K

        def fetch(tile: Any) -> None:
            slot, here = jax.lax.rem(tile, _DEPTH), smem["here_D"].at[jax.lax.rem(tile, _DEPTH)]
            at = (first + tile) * FP8_BLOCK
            # Rows that there are not hold anything, and stay on their own.
            x = x_ref.at[pl.ds(row * rows, taken), pl.ds(of_group + at, FP8_BLOCK)]
            plgpu.copy_gmem_to_smem(x, smem["x_DMX"].at[slot, pl.ds(0, taken)], here)
            codes = codes_ref.at[layer, pl.ds(at, FP8_BLOCK), columns]
            plgpu.copy_gmem_to_smem(codes, smem["codes_DXC"].at[slot], here)

        for tile in range(min(_DEPTH, tiles)):
            fetch(jnp.int32(tile))

        def add(tile: Array, sum_MC: Float32[Array, "M C"]) -> Float32[Array, "M C"]:
            slot = jax.lax.rem(tile, _DEPTH)
            plgpu.barrier_wait(smem["here_D"].at[slot])
            codes_XC = load(smem["codes_DXC"].at[slot], plgpu.Layout.WGMMA)
            smem["dense_XC"][...] = codes_XC.astype(jnp.float32).astype(jnp.bfloat16)
            products_MC = _product(smem["x_DMX"].at[slot], smem["dense_XC"])
            plgpu.commit_smem()  # all warps have read what is overwritten next
            pl.when(tile + _DEPTH < tiles)(functools.partial(fetch, tile + _DEPTH))
            return sum_MC + products_MC * scale_ref[first + tile, column]

        zeros = plgpu.layout_cast(jnp.zeros((rows, FP8_BLOCK), jnp.float32), plgpu.Layout.WGMMA)
        sum_MC = jax.lax.fori_loop(0, tiles, add, zeros)
        out = out_ref.at[part, pl.ds(row * rows, taken), columns]
        _write(sum_MC, smem["out_MC"], out, taken)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, R, N), dtype),
        # Blocks of rows next to each other read the same codes.
        grid=(parts, N // FP8_BLOCK, pl.cdiv(R, rows)),
        grid_names=("part", "column", "row"),
        scratch_types=_room(rows, dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="linear_fp8",
    )(x_RK, layer_1, codes_LKN, scale_kn)


def _write(sum_MC: Float32[Array, "M C"], own_MC: Any, out: Any, taken: int) -> None:
    """The rows that there are, through shared memory."""
    own_MC[...] = sum_MC.astype(own_MC.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own_MC.at[pl.ds(0, taken)], out)
    plgpu.wait_smem_to_gmem(0)


def _room(rows: int, dtype: Any) -> dict[str, Any]:
    """Shared memory: tiles on their way, the one at hand as bfloat16, and the result."""
    block = FP8_BLOCK
    return {
        "x_DMX": plgpu.SMEM((_DEPTH, rows, block), jnp.bfloat16, transforms=_TILED),
        "codes_DXC": plgpu.SMEM((_DEPTH, block, block), jnp.float8_e4m3fn, transforms=_BYTES_TILED),
        "dense_XC": plgpu.SMEM((block, block), jnp.bfloat16, transforms=_TILED),
        "out_MC": plgpu.SMEM((rows, block), dtype),
        "here_D": plgpu.Barrier(num_arrivals=2, num_barriers=_DEPTH),
    }


def _product(x_ref: Any, dense_ref: Any) -> Float32[Array, "M C"]:
    plgpu.commit_smem()

    def multiply(sum_ref: Any) -> Array:
        plgpu.wgmma(sum_ref, x_ref, dense_ref)
        return sum_ref[...]

    shape = (x_ref.shape[0], dense_ref.shape[1])
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
