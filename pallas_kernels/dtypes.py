"""Which dtype sums are kept in."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """float32, or the dtype itself where it is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
