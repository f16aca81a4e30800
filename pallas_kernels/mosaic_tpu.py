"""What Mosaic TPU kernels share."""

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def in_hbm(arrays: Any) -> Any:
    """Arguments of which a kernel reads parts, from where they lie.

    XLA would bring any to VMEM whole that fit there, such as the scales of all experts.
    """
    pin = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
    return jax.tree.map(pin, arrays)
