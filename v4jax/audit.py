"""Bytes that a compiled program moves between devices, and copies, read from its text.

`cost_analysis` counts the body of a loop once. Here it counts once per iteration, or once if the
number of iterations depends on data, as for the end of a text. All branches of a condition count.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

_KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.-]+))")
# Groups of one device each, listed or as an iota; and groups along axes of a mesh.
_ALONE = re.compile(r"replica_groups=(?:\{\{\d+\}(?:,\{\d+\})*\}|\[\d+,1\]<=)")
_ALONG = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
# An axis of a mesh with its size, an entire axis, or part of an axis: 'a'=8, 'a', 'a':(2)4.
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """One device's shard of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * (int(bits[0]) if bits else 8) // 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
      kind: name of the operation, such as 'all-gather'.
      operands: inputs on one device.
      results: outputs on one device.
      times: how often it runs.
      source: the JAX operation it implements.
    """

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the operands or the results, whichever are larger, over all runs."""
        total = lambda arrays: sum(array.bytes for array in arrays)
        return self.times * max(total(self.operands), total(self.results))

    def moves(self, *dims: int) -> bool:
        """Whether an operand or a result has all these dims."""
        return any(set(dims) <= set(array.dims) for array in (*self.operands, *self.results))


def collectives(text: str) -> list[Collective]:
    """The collectives in the text of `Compiled.as_text()`, those that move most first."""
    moving = (
        _collective(computation, instruction, times)
        for computation, instruction, times in _instructions(text)
        if instruction.operation.removesuffix("-start") in _KINDS
        and not _is_local(instruction.rest)
    )
    return sorted(moving, key=lambda collective: -collective.bytes)


def copies(text: str, *dims: int) -> int:
    """How often a program copies arrays, on one device, that have all these dims."""
    return sum(
        times
        for _, instruction, times in _instructions(text)
        if instruction.operation in ("copy", "copy-start")
        and any(set(dims) <= set(array.dims) for array in instruction.result)
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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    result: tuple[Array, ...]
    operation: str
    rest: str


_Computation = dict[str, _Instruction]


def _parsed(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the entry computation."""
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            name, result, operation, rest = match.groups()
            current[name] = _Instruction(_arrays(result), operation, rest)
    return computations, entry


def _arrays(text: str) -> tuple[Array, ...]:
    dims = lambda numbers: tuple(int(number) for number in numbers.split(",") if number)
    return tuple(Array(dtype, dims(numbers)) for dtype, numbers in _ARRAY.findall(text))


def _instructions(text: str) -> Iterator[tuple[_Computation, _Instruction, int]]:
    """All instructions, each with its computation and how often it runs."""
    computations, entry = _parsed(text)
    yield from _walk(computations, entry, 1)


def _walk(
    computations: dict[str, _Computation], name: str, times: int
) -> Iterator[tuple[_Computation, _Instruction, int]]:
    for instruction in (computation := computations[name]).values():
        yield computation, instruction, times
        operation = instruction.operation
        if operation.removesuffix("-start") in _KINDS or operation.endswith(("-update", "-done")):
            continue
        trips = _trips(computations, instruction)
        for names, single_name in _CALLED.findall(instruction.rest):
            for called in re.findall(r"[\w.-]+", names or single_name):
                yield from _walk(computations, called, times * trips)


def _is_local(rest: str) -> bool:
    """Whether each group of a collective is a single device."""
    if not (along := _ALONG.search(rest)):
        return bool(_ALONE.search(rest))
    sizes = {name: size for name, size, _ in _AXIS.findall(along[1])}
    return all(int(part or sizes[name]) == 1 for name, _, part in _AXIS.findall(along[2]))


def _trips(computations: dict[str, _Computation], instruction: _Instruction) -> int:
    """How often the computations that an instruction calls run."""
    if known := _TRIPS.search(instruction.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", instruction.rest)
    if not condition:
        return 1
    # The TPU compiler does not write the number of iterations: read it from the loop condition.
    *_, compare = (computation := computations[condition[1]]).values()
    if compare.operation != "compare" or "direction=LT" not in compare.rest:
        return 1
    limit = computation[_operands(compare)[1]]
    return int(limit.rest.partition(")")[0]) if limit.operation == "constant" else 1


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.-]+)", instruction.rest.partition("), ")[0])


def _collective(computation: _Computation, instruction: _Instruction, times: int) -> Collective:
    names = _operands(instruction)
    operands = tuple(array for name in names for array in computation[name].result)
    results = instruction.result
    if len(results) > len(operands):
        # The results of an asynchronous start are its operands, the results and counters.
        results = results[len(operands) : 2 * len(operands)]
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    kind = instruction.operation.removesuffix("-start")
    return Collective(kind, operands, results, times, source[1] if source else "")
