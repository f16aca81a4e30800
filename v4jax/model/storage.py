"""Weights as operations take them: one of a stack, gathered from where a mesh stores its parts.

Axis letters: N output channels, K input channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import quantize
from pallas_kernels.quantize.leaves import of_layer
from v4jax.model import sharding

Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InStack:
    """One layer of a stack that is not sliced, but read and written in place.

    Attributes:
      stack: an array, a quantised weight or a tree of them, [L, ...].
      layer: index of the layer.
    """

    stack: Any
    layer: Any


def value(weight: Any) -> Any:
    """The array or quantised weight inside an `nnx.Param`."""
    return weight.get_value() if isinstance(weight, nnx.Variable) else weight


def matrix_and_layer(weight: Any) -> tuple[Any, Any]:
    """A weight and None, or a stack of weights and the index of the layer."""
    weight = value(weight)
    return (weight.stack, weight.layer) if isinstance(weight, InStack) else (weight, None)


def whole(w: Float[Array, "N K"], axes: Axes) -> Float[Array, "N K"]:
    """A matrix gathered from where it is stored, but for what these logical axes split.

    Its gradient is summed into the parts that are stored.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return w
    stored, used = sharding.weight_spec(axes, w.shape, mesh), sharding.fitting(axes, w.shape, mesh)
    return w if stored == used else _gathered(w, used, stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: Array, used: PartitionSpec, stored: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(w, used)


_gathered.defvjp(
    lambda w, used, stored: (_gathered(w, used, stored), None),
    lambda used, stored, _, grad: (jax.lax.with_sharding_constraint(grad, stored),),
)


def per_device(
    run: Callable[..., Any],
    *arrays: Any,
    weight: Any,
    axes: tuple[Axes, ...],
    weight_axes: Axes,
    out: Axes,
) -> Any:
    """`run(*arrays, matrix, layer)` on each device's own shards.

    Args:
      run: a function of arrays, a matrix or a stack of them, and the index in the stack or None.
      arrays: arrays that share the weight's logical axes.
      weight: a matrix or a layer of a stack, an array or quantised.
      axes: logical axes of the arrays; see `sharding.per_device`.
      weight_axes: logical axes of the matrix, [N, K]. Along others it is gathered.
      out: logical axes of the result.
    """
    mesh, (matrix, layer) = jax.sharding.get_abstract_mesh(), matrix_and_layer(weight)
    if mesh.empty or mesh.size == 1:
        return run(*arrays, matrix, layer)
    quantised = isinstance(matrix, quantize.Fp8Weight | quantize.Fp4Weight)
    ordered = weight_axes[::-1] if quantised else weight_axes
    stacked: Axes = ordered if layer is None else (None, *ordered)
    spec = sharding.common_specs((*arrays, matrix), (*axes, stacked), mesh)
    used = spec(ordered)
    stored = jax.tree.map(lambda x: sharding.weight_spec(stacked, x.shape, mesh), matrix)
    is_stored_as_used = all(part == spec(stacked) for part in jax.tree.leaves(stored))

    def local(*args: Any) -> Any:
        *arrays, matrix, layer = args
        if not is_stored_as_used:
            places = jax.tree.map(lambda part: part[-2:], stored)
            matrix = jax.tree.map(
                lambda x, place: _gather(x, PartitionSpec(*place), used),
                of_layer(matrix, layer),
                places,
            )
            layer = None
        return run(*arrays, matrix, layer)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*map(spec, axes), stored, PartitionSpec()),
        out_specs=spec(out),
        check_vma=False,
    )(*arrays, matrix, layer)


def _gather(x: Array, stored: PartitionSpec, used: PartitionSpec) -> Array:
    for dim, (have, want) in enumerate(zip(stored, used, strict=True)):
        missing = tuple(axis for axis in sharding.names(have) if axis not in sharding.names(want))
        if missing:
            x = jax.lax.all_gather(x, missing, axis=dim, tiled=True)
    return x
