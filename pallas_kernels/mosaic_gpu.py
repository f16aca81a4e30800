"""Helpers shared by Mosaic GPU kernels: layouts of matrices, differences between JAX versions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def tiles(shape: tuple[int, int], swizzle: int) -> tuple[Any, Any]:
    """Transforms of a matrix in shared memory: tiles of this shape, this swizzle in bytes."""
    # JAX 0.12 types both as a protocol whose methods raise, so pyright considers them abstract.
    return (
        plgpu.TilingTransform(shape),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


# For 16-bit matrices that tensor cores read, and for matrices of bytes.
TILED = tiles((8, 64), 128)
BYTES_TILED = tiles((8, 128), 128)

# JAX 0.10 takes the index as a separate argument.
_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()

PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def load(ref: Any, layout: Any) -> Array:
    """Read a reference into a register array of this layout; bank conflicts are accepted."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def store(ref: Any, value: Array) -> None:
    """Write a register array to a reference; bank conflicts and partial sectors are accepted."""
    # New in JAX 0.12; before, plain assignments accept both.
    if plgpu_store := getattr(plgpu, "store", None):
        plgpu_store(ref, value, optimized=False)
    else:
        ref[...] = value


def along(vector: Array, shape: tuple[int, ...], dim: int) -> Array:
    """A matrix with the vector along this dim, the same everywhere along the other."""
    return jax.lax.broadcast_in_dim(vector, shape, (dim,))


def product(a_ref: Any, b_ref: Any) -> Array:
    """Multiply two matrices in shared memory on tensor cores, accumulating in float32."""

    def multiply(sum_ref: Any) -> Array:
        plgpu.wgmma(sum_ref, a_ref, b_ref)
        return sum_ref[...]

    shape = (a_ref.shape[0], b_ref.shape[1])
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
