"""The mesh of a job: every mesh of the devices, judged by arithmetic alone.

Memory is what devices hold of the arguments, and an estimate of what lives within a step. The best
mesh is the one that fits with the shortest estimated step. Nothing is traced for the mesh, so that
hundreds take seconds.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh

from v4jax.model import sharding
from v4jax.model.sharding import AXES
from v4jax.pods import estimate, memory
from v4jax.pods.chips import Slice
from v4jax.pods.estimate import Estimate
from v4jax.pods.jobs import Job, Work

# Part of the memory that a mesh may be estimated to use: the estimate is rough.
_ROOM = 0.97
_SEARCHED: tuple[str, ...] = ("data", "fsdp", "expert", "tensor")


class Candidate(NamedTuple):
    """A mesh with its figures per device.

    Attributes:
      sizes: sizes of the mesh's axes.
      parts: bytes of the arguments by what they are.
      work: what a step asks of a device.
      time: the estimated step; None if nothing is known about the devices.
    """

    sizes: dict[str, int]
    parts: dict[str, int]
    work: Work
    time: Estimate | None

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.work.temporaries

    def fits(self, where: Slice) -> bool:
        """Whether it is estimated to fit, or the devices' memory is unknown."""
        return where.chip is None or self.total <= _ROOM * where.chip.memory

    def __str__(self) -> str:
        """The sizes above 1, as `--mesh` takes them."""
        return named(self.sizes)


def named(sizes: dict[str, int]) -> str:
    """Sizes of a mesh as `--mesh` takes them."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def candidate(job: Job, where: Slice, sizes: dict[str, int]) -> Candidate:
    """The figures of one mesh.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    arguments = job.arguments(mesh)
    work = job.work(mesh, arguments)
    parts = {part: memory.device_bytes(tree) for part, tree in arguments.items()}
    time = estimate.step(
        where, useful=work.flops, executed=work.executed, nbytes=work.bytes, moves=work.moves
    )
    return Candidate(sizes, parts, work, time)


def ranked(job: Job, where: Slice) -> list[Candidate]:
    """All meshes of a slice, the best first: those that fit by time, the others by memory.

    Raises:
      ValueError: no mesh divides the weights and the batch.
    """
    candidates, reasons = [], []
    for sizes in _divided(job, where.devices):
        try:
            candidates.append(candidate(job, where, sizes))
        except ValueError as error:
            reasons.append(str(error))
    if not candidates:
        raise ValueError(
            f"No mesh of {where.devices} devices divides this model and {_batch(job)}. "
            + (reasons[0] if reasons else "Use a batch that more of the devices can share.")
        )

    def rank(candidate: Candidate) -> tuple[float, ...]:
        # With equal figures, fewer axes, and those nearest to the data axis.
        axes = [size > 1 for size in candidate.sizes.values()]
        seconds = candidate.time.total if candidate.time else candidate.total
        last = (sum(axes), *map(float, reversed(candidate.sizes.values())))
        fits = candidate.fits(where)
        return (float(not fits), _rounded(seconds if fits else candidate.total), *last)

    return sorted(candidates, key=rank)


def has_room(job: Job, where: Slice) -> bool:
    """Whether the arguments would fit a slice if they were split evenly over its devices."""
    mesh = AbstractMesh(tuple(1 for _ in AXES), AXES)
    nbytes = sum(map(memory.device_bytes, job.arguments(mesh).values()))
    return where.chip is None or nbytes <= where.devices * where.chip.memory


def _batch(job: Job) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in job.sizes().items())


def _rounded(figure: float) -> float:
    """Three digits: smaller differences are below what the estimates can tell."""
    return float(f"{figure:.2e}")


def _divided(job: Job, devices: int) -> Iterator[dict[str, int]]:
    """Sizes of meshes of which the rules can split the model, and which share the batch evenly."""
    cfg = job.cfg
    dims = {
        "experts": cfg.n_routed_experts,
        "heads": cfg.num_attention_heads,
        "ffn": cfg.moe_intermediate_size,
        "vocab": cfg.vocab_size,
        "batch": job.rows if job.rows > 1 else 0,  # a single row is replicated
    }
    for sizes in _meshes(devices):
        mesh = AbstractMesh(tuple(sizes.values()), AXES)
        if all(dim % sharding.ways(axis, mesh) == 0 for axis, dim in dims.items()):
            yield sizes


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """All meshes of this number of devices."""

    def shapes(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for size in (n for n in range(1, left + 1) if left % n == 0):
            for rest in shapes(left // size, axes - 1):
                yield size, *rest

    for shape in shapes(devices, len(_SEARCHED)):
        ones: dict[str, int] = dict.fromkeys(AXES, 1)
        yield ones | dict(zip(_SEARCHED, shape, strict=True))


def read(text: str, devices: int) -> dict[str, int]:
    """The sizes in a text such as 'expert=8,tensor=2'; the data axis gets the other devices.

    Raises:
      ValueError: it is malformed, or its sizes do not divide the number of devices.
    """
    sizes = sharding.read_sizes(text, devices)
    used = math.prod(sizes.values())
    if "data" not in sizes and devices % used == 0:
        sizes["data"] = devices // used
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"--mesh {text} has {used} devices, but there are {devices}; give sizes that multiply "
            "to this number or divide it."
        )
    return dict.fromkeys(AXES, 1) | sizes


def choose(job: Job, where: Slice) -> dict[str, int]:
    """The sizes of the best mesh; see `ranked`."""
    return ranked(job, where)[0].sizes
