"""Where logical axes lie on the mesh: the one table, and what reads it.

Mesh axes: data (replicas), fsdp (weights' hidden dims), expert (routed experts) and tensor (heads,
shared expert, vocabulary). Batches are split over data, fsdp and expert.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels import quantize
from v4jax.params import ParamSpec, map_leaves

AXES = ("data", "fsdp", "expert", "tensor")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "batch": ("data", "fsdp", "expert"),
    "vocab": "tensor",
    "embed": "fsdp",
    "streams": None,
    "q_lora": None,
    "heads": "tensor",
    "index_heads": "tensor",
    "compress": None,
    "ffn": "tensor",
    # Experts are kept whole, so that an optimiser that orthogonalises each needs no gather.
    "experts": ("expert", "fsdp"),
}


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """A mesh with the four axes, over the given devices (all, by default).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = (data, fsdp, expert, tensor)
    if math.prod(shape) != devices.size:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"A mesh of {sizes} needs {math.prod(shape)} devices; there are {devices.size}."
        )
    return Mesh(devices.reshape(shape), AXES)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of a value with these logical axes."""
    if missing := sorted({axis for axis in axes if axis is not None} - RULES.keys()):
        raise KeyError(f"No sharding rule for {missing}; known axes: {sorted(RULES)}.")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def shardings(declared: Any, mesh: Mesh, like: Any) -> Any:
    """A NamedSharding for each array in `like`, a tree of weights declared by `declared`.

    A dim that its mesh axes do not divide is not split. Scales of quantised weights lie with
    their codes where their coarser grid divides too.
    """

    def place(_: str, spec: ParamSpec, leaf: Any) -> Any:
        axes = spec.axes
        if isinstance(leaf, quantize.Fp8Weight | quantize.Fp4Weight):
            axes = (*axes[:-2], axes[-1], axes[-2])
        return jax.tree.map(lambda array: _fitting(axes, array.shape, mesh), leaf)

    return map_leaves(place, declared, like)


def _fitting(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, _fitting_spec(axes, shape, mesh))


def _fitting_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    dims = []
    for part, size in zip(partition_spec(axes), shape, strict=True):
        names = (part,) if isinstance(part, str) else (part or ())
        ways = math.prod(mesh.shape[name] for name in names)
        dims.append(part if size % ways == 0 else None)
    return PartitionSpec(*dims)


def constrain(x: Array, *axes: str | None) -> Array:
    """Ask for a layout by logical axes; does nothing outside `jax.set_mesh`.

    A dim that the mesh does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = _fitting_spec(axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def per_device(
    run: Callable[..., Any],
    *args: Any,
    axes: tuple[tuple[str | None, ...], ...],
    out: tuple[str | None, ...],
) -> Any:
    """`run(*args)` by each device on its own part: the compiler does not partition kernels.

    Args:
      run: keeps apart what lies on the split axes.
      args: arrays, or trees of arrays that share their leading dims; None stays None.
      axes: the logical axes of each argument; None for a dim that every device has whole. A named
        axis is split where all dims of that name divide.
      out: the axes of the result, or of all arrays in it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*args)
    whole = set()
    for arg, names in zip(args, axes, strict=True):
        for leaf in jax.tree.leaves(arg):
            fits = _fitting_spec(names, leaf.shape[: len(names)], mesh)
            whole |= {name for name, part in zip(names, fits, strict=True) if part is None}
    spec = lambda names: partition_spec(tuple(None if n in whole else n for n in names))
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(spec(names) for names in axes),
        out_specs=spec(out),
        check_vma=False,
    )(*args)


def over_experts(
    run: Callable[..., Array], x_TD: Array, expert_TA: Array, weight_TA: Array, *weights: Any
) -> Array:
    """`run(x_TD, expert_TA, weight_TA, *weights)` with each device's own experts only.

    Tokens of a group of devices that together hold all experts are gathered, every device adds
    what its experts give, and the sums go back to the tokens' owners. Experts are never gathered.

    Args:
      run: maps tokens to the sum over their experts; ignores ids that are not 0 .. E - 1.
      x_TD: tokens.
      expert_TA: each token's experts.
      weight_TA: their routing weights.
      weights: stacks [L, E, ...], arrays or quantised.
    """
    mesh = jax.sharding.get_abstract_mesh()
    group = () if mesh.empty else ("fsdp", "expert")
    ways = math.prod(mesh.shape[name] for name in group)
    experts = jax.tree.leaves(weights)[0].shape[1]
    if ways == 1 or experts % ways:
        return run(x_TD, expert_TA, weight_TA, *weights)
    batch = partition_spec(("batch",))[0]
    split = x_TD.shape[0] % math.prod(mesh.shape[name] for name in batch) == 0

    def local(x_TD, expert_TA, weight_TA, *weights):
        tokens = (x_TD, expert_TA, weight_TA)
        if split:
            tokens = jax.lax.all_gather(tokens, group, axis=0, tiled=True)
        x_TD, expert_TA, weight_TA = tokens
        first = jax.lax.axis_index(RULES["experts"]) * (experts // ways)
        total_TD = run(x_TD, expert_TA - first, weight_TA, *weights)
        if split:
            return jax.lax.psum_scatter(total_TD, group, scatter_dimension=0, tiled=True)
        return jax.lax.psum(total_TD, group)

    tokens = PartitionSpec(batch if split else None)
    whole = partition_spec((None, "experts"))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, *(whole for _ in weights)),
        out_specs=tokens,
        check_vma=False,
    )(x_TD, expert_TA, weight_TA, *weights)
