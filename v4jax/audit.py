"""Bytes that a compiled program moves between devices, and copies, read from its text.

`cost_analysis` counts the body of a loop once. Here it counts once per iteration; see `v4jax.hlo`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from v4jax.hlo import COLLECTIVES, Array, Program, Step

# Groups of devices along axes of a mesh, listed, and as an iota.
_ALONG = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
# An axis of a mesh with its size, an entire axis, or part of an axis: 'a'=8, 'a', 'a':(2)4.
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
      kind: name of the operation, such as 'all-gather'.
      operands: inputs on one device.
      results: outputs on one device.
      times: how often it runs.
      source: the JAX operation it implements.
      group: number of devices that take part in each; 0 for all of them.
    """

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    times: int
    source: str
    group: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the operands or the results, whichever are larger, over all runs."""
        total = lambda arrays: sum(array.bytes for array in arrays)
        return self.times * max(total(self.operands), total(self.results))

    def moves(self, *dims: int) -> bool:
        """Whether an operand or a result has all these dims."""
        return any(set(dims) <= set(array.dims) for array in (*self.operands, *self.results))


def collectives(program: str | Program) -> list[Collective]:
    """The collectives of a program or of its text, those that move most first."""
    moving = (
        _collective(step)
        for step in _program(program).steps()
        if step.instruction.operation.removesuffix("-start") in COLLECTIVES
        and _group(step.instruction.rest) != 1
    )
    return sorted(moving, key=lambda collective: -collective.bytes)


def copies(program: str | Program, *dims: int) -> int:
    """How often a program copies arrays, on one device, that have all these dims."""
    return sum(
        step.times
        for step in _program(program).steps()
        if step.instruction.operation in ("copy", "copy-start")
        and any(set(dims) <= set(array.dims) for array in step.instruction.result)
    )


def moved(collectives: Iterable[Collective]) -> int:
    """Bytes that each device receives or sends, whichever are more."""
    return sum(collective.bytes for collective in collectives)


def by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """`moved` per kind of collective."""
    total: dict[str, int] = {}
    for collective in collectives:
        total[collective.kind] = total.get(collective.kind, 0) + collective.bytes
    return total


def _program(program: str | Program) -> Program:
    return Program(program) if isinstance(program, str) else program


def _group(rest: str) -> int:
    """The number of devices in each group of a collective; 0 for all devices."""
    if along := _ALONG.search(rest):
        sizes = {name: size for name, size, _ in _AXIS.findall(along[1])}
        return math.prod(int(part or sizes[name]) for name, _, part in _AXIS.findall(along[2]))
    if iota := _IOTA.search(rest):
        return int(iota[1])
    listed = _LISTED.search(rest)
    return listed[1].count(",") + 1 if listed else 0


def _collective(step: Step) -> Collective:
    instruction, operands = step.instruction, tuple(step.operands)
    results = instruction.result
    if len(results) > len(operands):
        # The results of an asynchronous start are its operands, the results and counters.
        results = results[len(operands) : 2 * len(operands)]
    kind = instruction.operation.removesuffix("-start")
    return Collective(
        kind, operands, results, step.times, instruction.source, _group(instruction.rest)
    )
