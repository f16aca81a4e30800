"""What each device of a mesh holds, from shapes and shardings."""

import math
from typing import Any, NamedTuple

import jax

from v4jax.model import params

# Copies of a smaller array are not worth a line of a report.
LARGE = 16 * 2**20


class Replicated(NamedTuple):
    """An array of which several devices hold the same part.

    Attributes:
      name: its name in the tree.
      bytes: bytes on each device.
      copies: how many devices hold the same bytes.
    """

    name: str
    bytes: int
    copies: int


def shard_bytes(array: Any) -> int:
    """Bytes of one device's part of an array with a sharding."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def device_bytes(tree: Any) -> int:
    """Bytes of one device's parts of all arrays of a tree."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def replicated(tree: Any, least: int = LARGE) -> list[Replicated]:
    """The arrays of which devices hold `least` bytes that others hold too, the largest first."""
    rows = []
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        nbytes = shard_bytes(array)
        copies = array.sharding.num_devices * nbytes // max(1, array.size * array.dtype.itemsize)
        if copies > 1 and nbytes >= least:
            rows.append(Replicated(params.path_name(path), nbytes, copies))
    return sorted(rows, key=lambda row: -row.bytes)
