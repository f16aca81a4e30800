"""Rows of arrays that the mesh splits: each group of devices (`sharding.row_groups`) has its own.

No row is moved but those that are asked for. Axis letters: G groups.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from v4jax.model import sharding
from v4jax.model.sharding import ROWS

_BATCH = sharding.partition_spec(ROWS)[0]


def read(x: Shaped[Array, "..."], row: Int[Array, ""], *, axis: int) -> Shaped[Array, "..."]:
    """A row, by its number among those of all groups, on every device."""

    def of_device(x: Array, row: Array) -> Array:
        at, is_here = _place(x.shape[axis], row)
        row_here = jax.lax.dynamic_index_in_dim(x, at, axis, keepdims=False)
        if is_here is None:
            return row_here
        return jax.lax.psum(jnp.where(is_here, row_here, jnp.zeros_like(row_here)), _BATCH)

    return _per_device(of_device, x, row, axis=axis, out=())


def write(
    x: Shaped[Array, "..."], row: Int[Array, ""], new: Shaped[Array, "..."], *, axis: int
) -> Shaped[Array, "..."]:
    """The array with a row replaced."""

    def of_device(x: Array, row: Array, new: Array) -> Array:
        at, is_here = _place(x.shape[axis], row)
        if is_here is not None:
            new = jnp.where(is_here, new, jax.lax.dynamic_index_in_dim(x, at, axis, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(x, new, at, axis)

    return _per_device(of_device, x, row, new, axis=axis, out=_split(axis))


def read_each(
    x: Shaped[Array, "..."], row_G: Int[Array, " G"], *, axis: int
) -> Shaped[Array, "..."]:
    """One row of each group, by its number in the group."""
    slice_row = lambda x, row_1: jax.lax.dynamic_slice_in_dim(x, row_1[0], 1, axis)
    axes = (_split(axis), ROWS)
    return sharding.per_device(slice_row, x, row_G, axes=axes, out=axes[0], kernels=False)


def write_each(
    x: Shaped[Array, "..."], row_G: Int[Array, " G"], new: Shaped[Array, "..."], *, axis: int
) -> Shaped[Array, "..."]:
    """The array with one row of each group replaced."""
    put_row = lambda x, row_1, new: jax.lax.dynamic_update_slice_in_dim(x, new, row_1[0], axis)
    axes = (_split(axis), ROWS, _split(axis))
    return sharding.per_device(put_row, x, row_G, new, axes=axes, out=axes[0], kernels=False)


def _split(axis: int) -> tuple[str | None, ...]:
    return (*(None,) * axis, *ROWS)


def _per_device(run: Callable[..., Array], x: Array, *args: Any, axis: int, out: Any) -> Array:
    axes = (_split(axis), *((),) * len(args))
    return sharding.per_device(run, x, *args, axes=axes, out=out, kernels=False)


def _place(rows: int, row: Int[Array, ""]) -> tuple[Array, Array | None]:
    """Where a row is among those of this device, and whether it is there; None: all are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[name] for name in _BATCH) == 1:
        return row, None
    at = row - jax.lax.axis_index(_BATCH) * rows
    return jnp.clip(at, 0, rows - 1), (at >= 0) & (at < rows)
