"""A plan: a job on a slice, compiled for it, with all figures and what they suggest."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from v4jax import facts, waiting
from v4jax.facts import GIB
from v4jax.model import sharding
from v4jax.pods import compiled, estimate, memory, mesh_search
from v4jax.pods.chips import Slice
from v4jax.pods.compiled import Compiled
from v4jax.pods.estimate import Estimate
from v4jax.pods.jobs import Job
from v4jax.pods.memory import Replicated
from v4jax.pods.mesh_search import Candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A job on a slice.

    Attributes:
      model: name of the model.
      job: the job.
      where: the slice.
      mesh: sizes of the mesh's axes.
      parts: bytes per device of the arguments, by what they are.
      candidate: the figures of arithmetic.
      compiled: the figures of the compiler.
      replicated: large arrays of which several devices hold the same part.
      hops: mean links between neighbours on each axis; empty where devices have no coordinates.
      time: the estimated step; None if nothing is known about the devices.
    """

    model: str
    job: Job
    where: Slice
    mesh: dict[str, int]
    parts: dict[str, int]
    candidate: Candidate
    compiled: Compiled
    replicated: list[Replicated]
    hops: dict[str, float]
    time: Estimate | None

    @property
    def limit(self) -> int | None:
        """Bytes of memory of a device; None if unknown."""
        return self.where.chip.memory if self.where.chip else None

    @property
    def total(self) -> int:
        """Bytes that the job needs on a device; estimated if it was not compiled."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return not self.compiled.refused and (self.limit is None or self.total <= self.limit)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes per device by what they are for.

        Arguments that the program does not use, such as MTP blocks without drafts, are held too.
        """
        known, program = sum(self.parts.values()), self.compiled
        if program.refused:
            return self.parts | {"temporaries (estimated)": round(self.candidate.work.temporaries)}
        return self.parts | {
            "padding": max(0, program.arguments - known),
            "results": max(0, program.outputs - program.reused),
            "temporaries": program.temporaries,
            "program": program.code,
        }


def make(
    model: str,
    job: Job,
    where: Slice,
    devices: list[Any],
    sizes: dict[str, int],
    *,
    progress: waiting.Progress,
) -> Plan:
    """Compile a job for a mesh of devices, and collect the figures.

    Args:
      model: name of the model.
      job: the job.
      where: the slice.
      devices: its devices, attached or not.
      sizes: sizes of the mesh's axes.
      progress: is told what is being done.

    Raises:
      ValueError: the mesh does not divide the weights or the batch.
    """
    chosen = mesh_search.candidate(job, where, sizes)
    mesh = sharding.make_mesh(**sizes, devices=devices)
    if (too_much := _too_much(chosen, where)) is None:
        program = compiled.get(job, mesh, chosen.work, progress)
    else:
        program = Compiled(refused=too_much)
    arguments, work = job.arguments(mesh), chosen.work
    has_figures = not program.refused
    return Plan(
        model=model,
        job=job,
        where=where,
        mesh=sizes,
        parts=chosen.parts,
        candidate=chosen,
        compiled=program,
        replicated=memory.replicated(arguments),
        hops=_hops(mesh, where),
        time=estimate.step(
            where,
            useful=work.flops,
            executed=program.traffic.flops if has_figures else work.executed,
            nbytes=program.traffic.bytes if has_figures else work.bytes,
            moves=program.moves if has_figures else work.moves,
        ),
    )


def _too_much(chosen: Candidate, where: Slice) -> str | None:
    """Why there is no need to ask the compiler whether a mesh fits; None if there is."""
    arguments = sum(chosen.parts.values())
    if where.chip is None or arguments <= where.chip.memory:
        return None
    parts = " and ".join(part for part, nbytes in chosen.parts.items() if nbytes > GIB)
    return f"{parts} alone need {gib(arguments)} of {gib(where.chip.memory)} a device."


def _hops(mesh: Mesh, where: Slice) -> dict[str, float]:
    if not hasattr(mesh.devices.flat[0], "coords") or where.chip is None or len(where.shape) < 2:
        return {}
    return estimate.hops(mesh, where.shape)


def warnings(plan: Plan) -> list[str]:
    """What is wrong with a plan, each with a remedy."""
    found = []
    limit = plan.limit
    if plan.compiled.refused:
        found.append(f"It does not fit: {plan.compiled.refused} {_smaller(plan)}")
    elif limit is not None and plan.total > limit:
        found.append(f"It needs {gib(plan.total)} of {gib(limit)} a device. {_smaller(plan)}")
    elif limit is not None and plan.total > 0.95 * limit:
        found.append(
            f"It fills {plan.total / limit:.0%} of a device's memory, which leaves little for "
            "fragments and for other programs; take a smaller batch or a larger slice."
        )
    if plan.compiled.traffic.wide_weights:
        found.append(
            f"{gib(plan.compiled.traffic.wide_weights)} of float32 copies of FP8 weights are "
            "written in a step; use a mesh that divides these matrices, see 'Kernels'."
        )
    wasted = sum(array.bytes for array in plan.replicated if array.name != "embed_VD")
    if limit is not None and wasted > 0.1 * limit:
        found.append(
            f"{gib(wasted)} of large arrays are held by several devices alike; a larger fsdp or "
            "tensor axis splits them."
        )
    for axis, mean in plan.hops.items():
        if plan.mesh[axis] > 1 and mean > 1.0 and axis in ("expert", "tensor"):
            found.append(
                f"Neighbours on the {axis} axis are {mean:.1f} links apart; use sizes that are "
                "products of the slice's own."
            )
    return found


def _smaller(plan: Plan) -> str:
    largest = max(plan.memory, key=plan.memory.__getitem__)
    remedies = {
        "cache": "Use a smaller context or batch, --cache-dtype fp8, or a larger slice.",
        "weights": "Use a larger slice, or a mesh that splits weights further.",
        "optimizer": "Use a larger fsdp axis or slice, or train an adapter.",
    }
    return remedies.get(
        largest, "Use fewer tokens per device, a larger slice, or --search to find the smallest."
    )


def gib(nbytes: float) -> str:
    """A number of bytes in GiB, or in MiB if it is small."""
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB / 10 else _mib(nbytes)


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"


def cache_figures(plan: Plan) -> dict[str, float]:
    """Bytes of the engine's cache per token and per sequence; empty for training."""
    cache_dtype = getattr(plan.job, "cache_dtype", "none")
    if cache_dtype == "none":
        return {}
    cfg = plan.job.cfg
    packed = facts.cache_bytes(cfg)
    return {
        "per_token": packed[cache_dtype or "bfloat16"],
        "per_token_without_padding": packed["fp8 + fp4" if cache_dtype else "bfloat16"],
        "per_sequence": facts.report(cfg).state_bytes,
    }
