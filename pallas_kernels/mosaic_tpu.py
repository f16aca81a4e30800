"""Helpers shared by Mosaic TPU kernels."""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register


def resident(*shape: int) -> pl.BlockSpec:
    """The same block in all steps of a grid, so that it is read once."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def in_hbm(arrays: Any) -> Any:
    """Pin arrays to HBM that a kernel reads in parts.

    XLA would copy any that fit, such as the scales of all experts, to VMEM in full.
    """
    pin = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
    return jax.tree.map(pin, arrays)
