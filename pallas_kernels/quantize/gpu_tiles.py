"""What the GPU kernels of linear share: the grid, a block of threads' place in it, its results.

Axis letters: as in gpu.py; M rows and C columns of a block of threads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels.mosaic_gpu import store

COLUMNS = 128  # of a block of threads
_GRID = ("part", "column", "row")
_WRITTEN = 64  # rows at once


def kernel(
    body: Callable[..., None], out: tuple[int, int, int], rows: int, room: dict[str, Any], name: str
) -> Callable[..., Any]:
    """A kernel whose blocks of threads each make one block of [Z, R, N].

    Args:
      body: takes references to the arrays, to the result, and to shared memory by name.
      out: Z, R and N.
      rows: of a block.
      room: shared memory, beside that of the result.
      name: for profiles.
    """
    parts, R, N = out
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        # Blocks of rows next to each other read the same codes.
        grid=(parts, N // COLUMNS, pl.cdiv(R, rows)),
        grid_names=_GRID,
        scratch_types=room | {"out_MC": plgpu.SMEM((_WRITTEN, COLUMNS), dtype)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
    )


def place() -> tuple[Array, Array, Array]:
    """Which part of K, and blocks of columns and rows, this block of threads has."""
    part, column, row = (jax.lax.axis_index(name) for name in _GRID)
    return part, column, row


def write(sum_MC: Float32[Array, "M C"], own_MC: Any, out: Any, taken: int) -> None:
    """The rows that there are, through shared memory."""
    for top in range(0, taken, _WRITTEN):
        count = min(_WRITTEN, taken - top)
        store(own_MC, sum_MC[top : top + _WRITTEN].astype(own_MC.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_MC.at[pl.ds(0, count)], out.at[pl.ds(top, count)])
        plgpu.wait_smem_to_gmem(0)
