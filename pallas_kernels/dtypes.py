"""The dtype in which sums are accumulated."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """float32, or the dtype itself if it is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
