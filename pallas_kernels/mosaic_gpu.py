"""What Mosaic GPU kernels share: how matrices lie, what JAX's versions say differently."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def tiles(shape: tuple[int, int], swizzle: int) -> tuple[Any, Any]:
    """Transforms of a matrix in shared memory: tiles of this shape, swizzled by so many bytes."""
    # JAX 0.12 types both as a protocol whose methods raise: pyright takes them for abstract.
    return (
        plgpu.TilingTransform(shape),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


# Of matrices of 16 bits for tensor cores, and of bytes.
TILED = tiles((8, 64), 128)
BYTES_TILED = tiles((8, 128), 128)

# JAX 0.10 wants the index as an argument of its own.
_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()


def load(ref: Any, layout: Any) -> Array:
    """What a reference holds, as a register array of this layout; bank conflicts are accepted."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def store(ref: Any, value: Array) -> None:
    """Write a register array to a reference; bank conflicts and partial sectors are accepted."""
    # Before JAX 0.12 there is no such function, and plain assignments accept them.
    if known := getattr(plgpu, "store", None):
        known(ref, value, optimized=False)
    else:
        ref[...] = value
