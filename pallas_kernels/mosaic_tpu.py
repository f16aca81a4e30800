"""Helpers shared by Mosaic TPU kernels."""

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def in_hbm(arrays: Any) -> Any:
    """Pin arrays to HBM that a kernel reads in parts.

    XLA would copy any that fit, such as the scales of all experts, to VMEM in full.
    """
    pin = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
    return jax.tree.map(pin, arrays)
