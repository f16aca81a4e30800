"""What the compiler says about a program, kept on disk by program."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import pallas_kernels
from v4jax import audit, programs, waiting
from v4jax.hlo import Array, Program
from v4jax.pods.jobs import Job, Move, Work
from v4jax.traffic import Traffic, measure

_PACKAGES = ("v4jax", "jax", "jaxlib", "libtpu")
# Arrays of a collective that a report names.
_SHOWN = 2
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_NONE = Traffic(0, 0, 0.0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Figures of a compiled program, per device and step.

    Attributes:
      refused: why it does not fit, without which all other figures are 0; empty if it may fit.
      arguments, outputs, reused, temporaries, code: bytes; outputs of which `reused` are in the
        place of arguments.
      peak: bytes that are in use at once at most, of all these.
      traffic: bytes and operations.
      moves: collectives.
      largest: the largest collectives, as text.
      kernels: operation, form and reason of each choice of a kernel, and the number of calls.
      from_disk: whether it was compiled by an earlier plan.
    """

    refused: str = ""
    arguments: int = 0
    outputs: int = 0
    reused: int = 0
    temporaries: int = 0
    code: int = 0
    peak: int = 0
    traffic: Traffic = _NONE
    moves: tuple[Move, ...] = ()
    largest: tuple[str, ...] = ()
    kernels: tuple[tuple[str, str, str, int], ...] = ()
    from_disk: bool = False


def get(job: Job, mesh: Mesh, work: Work, progress: waiting.Progress) -> Compiled:
    """Lower a job's program for a mesh, and compile it unless an earlier plan has.

    Args:
      job: the job.
      mesh: mesh of real devices, or of a topology.
      work: what the job asks of the mesh's devices.
      progress: is told what is being done.
    """
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    where = f"{job.name} on {sizes or 'one device'}"
    progress(f"Lowering {where}", 0, 0)
    pallas_kernels.clear_choices()
    lowered = job.lower(mesh)
    kernels = _kernels(mesh.devices.flat[0].platform)
    file = _file(lowered, mesh, (work.experts, job.compiler_options))
    if file is not None and (known := _read(file)) is not None:
        return dataclasses.replace(known, from_disk=True)
    progress(f"Compiling {where}", 0, 0)
    try:
        program = lowered.compile(job.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result = Compiled(refused=_reason(str(error)))
    else:
        progress(f"Reading {where}", 0, 0)
        result = _figures(program, work)
    result = dataclasses.replace(result, kernels=kernels)
    if file is not None:
        _write(file, result)
    return result


def _figures(program: jax.stages.Compiled, work: Work) -> Compiled:
    memory: Any = program.memory_analysis()
    text = Program(program.as_text() or "")
    collectives = audit.collectives(text)
    moves = [Move(c.kind, c.group, c.bytes / c.times, c.times) for c in collectives]
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        traffic=measure(text, work.experts),
        moves=tuple(moves),
        largest=tuple(_line(collective) for collective in collectives[:3]),
    )


def _line(collective: audit.Collective) -> str:
    def shapes(arrays: tuple[Array, ...]) -> str:
        largest = sorted(arrays, key=lambda array: -array.bytes)
        others = f" and {len(arrays) - _SHOWN} others" if len(arrays) > _SHOWN else ""
        return " ".join(f"{a.dtype}{list(a.dims)}" for a in largest[:_SHOWN]) + others

    result = f"{shapes(collective.operands)} -> {shapes(collective.results)}"
    return f"{collective.bytes / 1e6:,.3f} MB: {collective.times} x {collective.kind} {result}"


def _kernels(platform: str) -> tuple[tuple[str, str, str, int], ...]:
    """The choices of the program that was lowered last."""
    counts: dict[tuple[str, str, str], int] = {}
    for choice, count in pallas_kernels.choices().items():
        if choice.target in (platform, "any"):
            key = choice.operation, choice.form, choice.reason
            counts[key] = counts.get(key, 0) + count
    return tuple((*key, count) for key, count in counts.items())


def _reason(message: str) -> str:
    """The sentence of a compiler's error that says how much memory is missing."""
    sentence = re.search(r"RESOURCE_EXHAUSTED: (.*?[^\d]\.)(?:\s|$)", message, re.DOTALL)
    return " ".join((sentence[1] if sentence else message.splitlines()[0]).split())


def directory() -> Path | None:
    """Where figures are kept: beside compiled programs; None if these are not kept."""
    setting = os.environ.get(programs.VARIABLE, "")
    if setting.lower() == programs.OFF:
        return None
    kept = Path(setting).expanduser() if setting else programs.default_directory()
    return kept / "plans"


def _file(lowered: jax.stages.Lowered, mesh: Mesh, settings: Any) -> Path | None:
    """The file of a program's figures, named by all that they depend on."""
    if (folder := directory()) is None:
        return None
    device = mesh.devices.flat[0]
    versions = [(name, _version(name)) for name in _PACKAGES]
    flags = [os.environ.get(name, "") for name in _FLAGS]
    order = [getattr(device, "coords", device.id) for device in mesh.devices.flat]
    text = repr((versions, flags, device.device_kind, order, settings)) + lowered.as_text()
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(file: Path) -> Compiled | None:
    """The figures in a file; None if it is missing or damaged."""
    try:
        fields = json.loads(file.read_text("utf-8"))
        fields["traffic"] = Traffic(**fields["traffic"])
        fields["moves"] = tuple(Move(*move) for move in fields["moves"])
        fields["largest"] = tuple(fields["largest"])
        fields["kernels"] = tuple(map(tuple, fields["kernels"]))
        return Compiled(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(file: Path, figures: Compiled) -> None:
    """Write figures to a file that appears when it is complete; without it, nothing is kept."""
    fields = dataclasses.asdict(figures)
    del fields["from_disk"]
    unfinished = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(fields), "utf-8")
        unfinished.replace(file)
