"""Matmuls with quantised weights on NVIDIA GPUs from Hopper on, with Mosaic GPU.

Weights are read in place: the index of their tiles picks the layer of a stack, that of the rows'
tiles a group's channels.

Axis letters: L layers of a stack, G groups, R rows, K input channels, N output channels, Z parts
of K.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize import gpu_fp4, gpu_fp8
from pallas_kernels.quantize.gpu_tiles import COLUMNS
from pallas_kernels.quantize.leaves import FP8_BLOCK, Fp4Weight, Fp8Weight, Weight, as_stack

_KERNELS = {Fp8Weight: (gpu_fp8.sums, FP8_BLOCK), Fp4Weight: (gpu_fp4.sums, gpu_fp4.CHANNELS)}
_BLOCKS = 264  # blocks of threads: two on each multiprocessor of an H200
_PART_BYTES = 2**21  # float32 sums of all parts of K


def linear(
    x: Float[Array, "*rows GK"],
    w: Weight,
    layer: Int[Array, ""] | None = None,
    *,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows N"]:
    """`quantize.linear`, for bfloat16 and quantised weights.

    Raises:
      Unsupported: another kind of weight or dtype, or a matrix that is not whole tiles.
    """
    del precision  # products of bfloat16 are exact
    if not isinstance(w, Fp8Weight | Fp4Weight) or w.codes.ndim != (2 if layer is None else 3):
        raise Unsupported("The GPU form of linear takes one matrix in FP8 or FP4.")
    sums, channels = _KERNELS[type(w)]
    (N, K), x_RK = w.shape[-2:], x.reshape(-1, x.shape[-1])
    if x.dtype != jnp.bfloat16 or N % (groups * COLUMNS) or K % channels or x.size == 0:
        raise Unsupported(
            f"The GPU form of linear takes bfloat16, N per group in multiples of {COLUMNS} and K in"
            f" multiples of {channels}, not {x.dtype} {x.shape} times {groups} groups of {N} x {K}."
        )
    rows = 128 if len(x_RK) > 64 else 64
    x_RK = jnp.pad(x_RK, ((0, -len(x_RK) % (8 if rows == 64 else rows)), (0, 0)))
    parts = _parts(len(x_RK), N, K // channels, rows)
    stack, layer_1 = as_stack(w, layer)
    sums_ZRN = sums(x_RK, stack, layer_1, groups=groups, rows=rows, parts=parts)
    y_RN = sums_ZRN[0] if parts == 1 else jnp.sum(sums_ZRN, axis=0).astype(x.dtype)
    return y_RN[: x.size // (groups * K)].reshape(*x.shape[:-1], N)


def _parts(R: int, N: int, tiles: int, rows: int) -> int:
    """How many parts of K to sum separately, so that few rows also occupy the entire GPU."""
    blocks = pl.cdiv(R, rows) * (N // COLUMNS)
    most = min(_BLOCKS // blocks, _PART_BYTES // (4 * R * N))
    return next((n for n in range(most, 1, -1) if tiles % n == 0), 1)
