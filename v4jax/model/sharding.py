"""Logical axes and the mesh: one table of rules, and what applies it.

Mesh axes: data (replicas), fsdp (all matrices, which operations gather), expert (routed experts)
and tensor (heads, shared expert, vocabulary). Batches are split over data, fsdp and expert.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels import quantize
from v4jax.arguments import checked, integer, optional, sequence
from v4jax.model.params import ParamSpec, map_leaves

AnyMesh = Mesh | AbstractMesh
# A weight that the mesh does not divide is replicated if it has fewer bytes than this.
_SMALL = 16 * 2**20
# A matrix of fewer elements is not worth a gather.
_LEAST = 4096
AXES = ("data", "fsdp", "expert", "tensor")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "batch": ("data", "fsdp", "expert"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "index_heads": "tensor",
    "ffn": "tensor",
    # Experts are not split, so that an optimiser that orthogonalises each needs no gather.
    "experts": ("expert", "fsdp", "tensor"),
}
# Logical axes of rows of a batch, and of a stack over layers of such rows: each device has its own.
ROWS, STACKED_ROWS = ("batch",), (None, "batch")


@checked(
    **{axis: integer(1, 2**31 - 1) for axis in AXES},
    devices=optional(sequence("a list of JAX devices", of=jax.Device)),
)
def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """A mesh with the four axes, over the given devices (by default all).

    Neighbours on an axis are neighbours in a TPU's torus, as far as the torus allows. Only the data
    axis spans slices of TPUs, which are connected by a slower network.

    Raises:
      ValueError: a size is below 1, their product is not the number of devices, or slices cannot
        share the data axis evenly.
    """
    devices = list(jax.devices() if devices is None else np.asarray(devices).flat)
    shape = (data, fsdp, expert, tensor)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"A mesh of {_sizes(shape)} needs {math.prod(shape)} devices; there are {len(devices)}."
        )
    try:
        arranged = _arranged(shape, devices)
    except AssertionError:  # chips that do not form a block of their slice
        arranged = np.asarray(devices).reshape(shape)
    return Mesh(arranged, AXES)


def _arranged(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    slices = {getattr(x, "slice_index", 0) for x in devices if x.platform == "tpu"}
    if len(slices) < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *others = shape
    if data % len(slices):
        raise ValueError(
            f"The devices are in {len(slices)} slices, which only the data axis may span; data must"
            f" be a multiple of {len(slices)}, not {data}. Give the other axes fewer devices."
        )
    inner, outer = (data // len(slices), *others), (len(slices), *(1 for _ in others))
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def read_mesh(text: str) -> Mesh:
    """Parse a mesh over all devices, such as 'expert=4,tensor=2'.

    Raises:
      ValueError: it is malformed, or its sizes do not multiply to the number of devices.
    """
    return make_mesh(**read_sizes(text, jax.device_count()))


def read_sizes(text: str, devices: int) -> dict[str, int]:
    """The sizes of a mesh's axes in a text such as 'expert=4,tensor=2'.

    Raises:
      ValueError: it is malformed.
    """
    matches = [
        re.fullmatch(r"\s*(\w+)=([1-9]\d{0,5})\s*", part, re.ASCII) for part in text.split(",")
    ]
    sizes = {match[1]: int(match[2]) for match in matches if match}
    if len(sizes) < len(matches) or sizes.keys() - set(AXES):
        raise ValueError(
            f"'{text}' is not a mesh; give sizes of {', '.join(AXES)}, as in 'expert=4,tensor=2', "
            f"that multiply to {devices}, the number of devices."
        )
    return sizes


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of a value with these logical axes."""
    if missing := sorted({axis for axis in axes if axis is not None} - RULES.keys()):
        raise KeyError(f"No sharding rule for {missing}; known axes: {sorted(RULES)}.")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def shardings(declared: Any, mesh: AnyMesh, like: Any) -> Any:
    """A NamedSharding for each array in `like`, a tree of weights declared by `declared`.

    A dim of a small array that its mesh axes do not divide is not split. Scales of quantised
    weights are split like their codes if their coarser grid divides too.

    Raises:
      ValueError: the mesh has other axes, or does not divide a large array.
    """
    if mesh.axis_names != AXES:
        raise ValueError(
            f"The mesh has the axes {', '.join(map(str, mesh.axis_names))}; create one with the "
            f"axes {', '.join(AXES)}, using v4jax.model.sharding.make_mesh."
        )
    if undivided := _undivided(declared, mesh, like):
        raise ValueError(f"{_why(undivided)} {_nearest(declared, mesh, like)}")

    def sharding_of(_: str, spec: ParamSpec, leaf: Any) -> Any:
        axes, is_table = _axes_of(spec, leaf), spec.stored == "i64"
        of = fitting if is_table else weight_spec
        return jax.tree.map(lambda array: NamedSharding(mesh, of(axes, array.shape, mesh)), leaf)

    return map_leaves(sharding_of, declared, like)


def _axes_of(spec: ParamSpec, leaf: Any) -> tuple[str | None, ...]:
    if isinstance(leaf, quantize.Fp8Weight | quantize.Fp4Weight):
        return (*spec.axes[:-2], spec.axes[-1], spec.axes[-2])
    return spec.axes


class _Undivided(NamedTuple):
    """A large array with an undivided dim, and the bytes of it that each device would hold."""

    name: str
    size: int
    ways: str
    bytes: int


def _undivided(declared: Any, mesh: AnyMesh, like: Any) -> list[_Undivided]:
    undivided = []

    def check(name: str, spec: ParamSpec, leaf: Any) -> None:
        axes = _axes_of(spec, leaf)
        for array in jax.tree.leaves(leaf):
            stored = weight_spec(axes, array.shape, mesh)
            nbytes = array.size * array.dtype.itemsize
            lost = _lost(axes, stored, mesh)
            if nbytes < _SMALL or lost is None:
                continue
            dim, ideal = lost
            ways = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ideal)
            nbytes //= math.prod(mesh.shape[axis] for part in stored for axis in names(part))
            undivided.append(_Undivided(name, array.shape[dim], ways, nbytes))

    map_leaves(check, declared, like)
    return undivided


def _lost(
    axes: tuple[str | None, ...], stored: PartitionSpec, mesh: AnyMesh
) -> tuple[int, tuple[str, ...]] | None:
    """A dim that should be split further, and over what; None if there is none."""
    for dim, part in enumerate(partition_spec(axes)):
        if not set(names(part)) <= set(names(stored[dim])):
            return dim, names(part)
    is_split = any("fsdp" in names(part) for part in stored)
    if is_split or mesh.shape["fsdp"] == 1 or not _is_matrix(axes):
        return None
    return len(axes) - 2, (*names(stored[len(axes) - 2]), "fsdp")


def _is_matrix(axes: tuple[str | None, ...]) -> bool:
    return sum(axis != "layers" for axis in axes) > 1


def _why(undivided: list[_Undivided]) -> str:
    name, size, ways, _ = undivided[0]
    gibibytes = sum(array.bytes for array in undivided) / 2**30
    others = f" and {len(undivided) - 1} others" if len(undivided) > 1 else ""
    return (
        f"A mesh of {ways} does not divide a dim of {size}, and every device would hold all of it: "
        f"{gibibytes:.1f} GiB of {name}{others}."
    )


def _nearest(declared: Any, mesh: AnyMesh, like: Any) -> str:
    """The most similar mesh of as many devices that divides all large arrays, as a sentence."""
    requested = [mesh.shape[axis] for axis in AXES]

    def distance(shape: tuple[int, ...]) -> tuple[float, list[int]]:
        steps = [abs(math.log2(new / old)) for new, old in zip(shape, requested, strict=True)]
        return round(sum(steps), 6), [-size for size in shape]

    shapes = sorted(_shapes(mesh.size, len(AXES)), key=distance)
    works = lambda shape: not _undivided(declared, AbstractMesh(shape, AXES), like)
    return f"The nearest mesh that works has {_sizes(next(filter(works, shapes)))}."


def _shapes(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All shapes with this number of axes and of devices."""
    if axes == 1:
        yield (devices,)
        return
    for size in (n for n in range(1, devices + 1) if devices % n == 0):
        for rest in _shapes(devices // size, axes - 1):
            yield size, *rest


def weight_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh
) -> PartitionSpec:
    """Where the parts of an array of a weight are stored.

    Unless its logical axes use fsdp, the first dim of its matrices that fsdp divides is split over
    it too: the rows as stored, because devices pad short columns.
    """
    spec = fitting(axes, shape, mesh)
    uses = any("fsdp" in names(part) for part in partition_spec(axes))
    is_small = math.prod(shape[-2:]) < _LEAST
    if uses or is_small or not _is_matrix(axes) or mesh.shape["fsdp"] == 1:
        return spec
    for dim in (len(shape) - 2, len(shape) - 1):
        part = (*names(spec[dim]), "fsdp")
        if shape[dim] % math.prod(mesh.shape[axis] for axis in part) == 0:
            return PartitionSpec(*spec[:dim], part, *spec[dim + 1 :])
    return spec


def place(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array whose first dims have these axes; undivided dims are not split."""
    return NamedSharding(mesh, fitting(axes, shape[: len(axes)], mesh))


def fitting(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The mesh axes of a value of this shape; undivided dims are not split."""
    dims = []
    for part, size in zip(partition_spec(axes), shape, strict=True):
        ways = math.prod(mesh.shape[name] for name in names(part))
        dims.append(part if size % ways == 0 else None)
    return PartitionSpec(*dims)


def names(part: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return (part,) if isinstance(part, str) else (part or ())


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes over which a logical axis is split."""
    return names(RULES[axis])


def ways(axis: str, mesh: AnyMesh | None = None) -> int:
    """Into how many parts a mesh, by default that of `jax.set_mesh`, splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def row_groups(mesh: AnyMesh | None) -> int:
    """Number of groups of devices that share the rows of a batch."""
    return 1 if mesh is None else ways("batch", mesh)


def groups_of(mesh: Mesh | None, process: int | None = None) -> list[int]:
    """The groups that a process (by default this one) has devices in."""
    if mesh is None:
        return [0]
    groups, process = row_groups(mesh), jax.process_index() if process is None else process
    places = place(("batch",), (groups,), mesh).devices_indices_map((groups,))
    local = (rows for device, (rows,) in places.items() if device.process_index == process)
    return sorted({rows.start or 0 for rows in local})


def check_rows(batch: int, mesh: AnyMesh) -> None:
    """Reject a batch, of more than one row, that groups of devices cannot share evenly."""
    groups = row_groups(mesh)
    if batch > 1 and batch % groups:
        raise ValueError(
            f"A batch of {batch} rows cannot be shared by {groups} groups of devices; use a "
            f"multiple of {groups}."
        )


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of a tree of arrays; None if they are on one device."""
    placement = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return getattr(placement, "mesh", None)


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which to compile and run programs for the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrain an array's sharding by logical axes; does nothing outside `jax.set_mesh`.

    A dim that the mesh does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = fitting(axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def per_device(
    run: Callable[..., Any],
    *args: Any,
    axes: tuple[tuple[str | None, ...], ...],
    out: tuple[str | None, ...],
    kernels: bool = True,
) -> Any:
    """`run(*args)` on each device's own shards, as the compiler does not partition kernels.

    Args:
      run: a function that does not mix elements along split axes.
      args: arrays, or trees of arrays that share their leading dims; None stays None.
      axes: logical axes of each argument; None for a dim that is not split. A named axis is split
        if all dims of that name divide.
      out: logical axes of the result, or of all arrays in it.
      kernels: whether `run` calls kernels. JAX cannot tell which of their results are replicated,
        so gradients are then summed over replicas too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*args)
    spec = common_specs(args, axes, mesh)
    return jax.shard_map(
        run, mesh=mesh, in_specs=tuple(map(spec, axes)), out_specs=spec(out), check_vma=not kernels
    )(*args)


def common_specs(
    args: tuple[Any, ...], axes: tuple[tuple[str | None, ...], ...], mesh: AnyMesh
) -> Callable[[tuple[str | None, ...]], PartitionSpec]:
    """The mesh axes of logical axes, which are split if all dims of that name in `args` divide."""
    unsplit = set()
    for arg, logical in zip(args, axes, strict=True):
        for leaf in jax.tree.leaves(arg):
            spec = fitting(logical, leaf.shape[: len(logical)], mesh)
            unsplit |= {axis for axis, part in zip(logical, spec, strict=True) if part is None}
    return lambda logical: partition_spec(tuple(None if x in unsplit else x for x in logical))
