"""Logical axes and the mesh: one table of rules, and what applies it.

Mesh axes: data (replicas), fsdp (weights' hidden dims), expert (routed experts) and tensor (heads,
shared expert, vocabulary). Batches are split over data, fsdp and expert.
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
    # Experts are not split, so that an optimiser that orthogonalises each needs no gather.
    "experts": ("expert", "fsdp"),
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

    Neighbours on an axis are neighbours in a TPU's torus, as far as the torus allows.

    Raises:
      ValueError: a size is below 1, or their product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else np.asarray(devices).flat)
    shape = (data, fsdp, expert, tensor)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"A mesh of {_sizes(shape)} needs {math.prod(shape)} devices; there are {len(devices)}."
        )
    try:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # chips that do not form a block of their slice
        arranged = np.asarray(devices).reshape(shape)
    return Mesh(arranged, AXES)


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
        axes = _axes_of(spec, leaf)
        return jax.tree.map(lambda array: place(axes, array.shape, mesh), leaf)

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
            ideal, fitting = partition_spec(axes), _fitting_spec(axes, array.shape, mesh)
            nbytes = array.size * array.dtype.itemsize
            if nbytes < _SMALL or ideal == fitting:
                continue
            dim = next(i for i, part in enumerate(ideal) if part != fitting[i])
            ways = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in _names(ideal[dim]))
            nbytes //= math.prod(mesh.shape[axis] for part in fitting for axis in _names(part))
            undivided.append(_Undivided(name, array.shape[dim], ways, nbytes))

    map_leaves(check, declared, like)
    return undivided


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


def place(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array whose first dims have these axes; undivided dims are not split."""
    return NamedSharding(mesh, _fitting_spec(axes, shape[: len(axes)], mesh))


def _fitting_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh
) -> PartitionSpec:
    dims = []
    for part, size in zip(partition_spec(axes), shape, strict=True):
        ways = math.prod(mesh.shape[name] for name in _names(part))
        dims.append(part if size % ways == 0 else None)
    return PartitionSpec(*dims)


def _names(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else (part or ())


def ways(axis: str | None) -> int:
    """Into how many parts the mesh of `jax.set_mesh` splits a logical axis."""
    mesh, (part,) = jax.sharding.get_abstract_mesh(), partition_spec((axis,))
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in _names(part))


def row_groups(mesh: AnyMesh | None) -> int:
    """Number of groups of devices that share the rows of a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in _names(RULES["batch"]))


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
    spec = _fitting_spec(axes, x.shape, mesh)
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
    unsplit = set()
    for arg, names in zip(args, axes, strict=True):
        for leaf in jax.tree.leaves(arg):
            fitting = _fitting_spec(names, leaf.shape[: len(names)], mesh)
            unsplit |= {name for name, part in zip(names, fitting, strict=True) if part is None}
    spec = lambda names: partition_spec(tuple(None if n in unsplit else n for n in names))
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(spec(names) for names in axes),
        out_specs=spec(out),
        check_vma=not kernels,
    )(*args)
