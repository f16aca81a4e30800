"""Shared by the GPU kernels of linear: the grid, a block's position in it, writing results.

Axis letters: as in gpu.py; M rows and C columns of a block of threads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels.mosaic_gpu import PARAMS, store

COLUMNS = 128  # per block of threads
_GRID = ("part", "column", "row")
_WRITTEN = 64  # rows written at once


def kernel(
    body: Callable[..., None],
    out: tuple[int, int, int],
    rows: int,
    scratch: dict[str, Any],
    name: str,
) -> Callable[..., Any]:
    """A kernel whose blocks of threads each compute one block of [Z, R, N].

    Args:
      body: takes references to the arrays and to the result, and to shared memory by name.
      out: Z, R and N.
      rows: rows per block.
      scratch: shared memory, besides that of the result.
      name: name in profiles.
    """
    parts, R, N = out
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        # Rows are innermost: blocks that run together read the same codes.
        grid=(parts, N // COLUMNS, pl.cdiv(R, rows)),
        grid_names=_GRID,
        scratch_types=scratch | {"out_MC": plgpu.SMEM((_WRITTEN, COLUMNS), dtype)},
        compiler_params=PARAMS,
        kernel_name=name,
    )


def place() -> tuple[Array, Array, Array]:
    """The part of K and the blocks of columns and rows of this block of threads."""
    part, column, row = (jax.lax.axis_index(name) for name in _GRID)
    return part, column, row


def write(sum_MC: Float32[Array, "M C"], buffer_MC: Any, out: Any, real_rows: int) -> None:
    """Write the first `real_rows` rows, through a buffer in shared memory."""
    for top in range(0, real_rows, _WRITTEN):
        count = min(_WRITTEN, real_rows - top)
        store(buffer_MC, sum_MC[top : top + _WRITTEN].astype(buffer_MC.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer_MC.at[pl.ds(0, count)], out.at[pl.ds(top, count)])
        plgpu.wait_smem_to_gmem(0)
