"""What Mosaic GPU kernels share: how matrices lie, what JAX 0.10 and 0.11 say differently."""

import inspect
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# Of matrices in shared memory, of 16 bits for tensor cores and of bytes: swizzles of 128 bytes.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
BYTES_TILED = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))

# JAX 0.10 wants the index as an argument of its own, of which 0.11 warns.
_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect._empty else ()


def load(ref: Any, layout: Any) -> Array:
    """What a reference holds, as a register array of this layout; bank conflicts are accepted."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)
