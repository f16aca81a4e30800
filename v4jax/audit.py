"""What a compiled program moves between devices, read from its text, its loops multiplied out.

`cost_analysis` counts a loop's body once. Here it counts as often as it runs; where only the data
decide that, as they decide when a text ends, once. Of a condition all branches count.
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
# Groups of one device each, listed or counted; and groups along axes of a mesh.
_ALONE = re.compile(r"replica_groups=(?:\{\{\d+\}(?:,\{\d+\})*\}|\[\d+,1\]<=)")
_ALONG = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
# An axis of a mesh, and what of it, all or a part: 'a'=8, 'a', 'a':(2)4.
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """A device's part of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * (int(bits[0]) if bits else 8) // 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """A place in a program where devices exchange arrays.

    Attributes:
      kind: such as 'all-gather'.
      operands: what a device puts in.
      results: what it has after.
      times: how often this runs.
      source: the operation that it was made for.
    """

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Of the operands or the results, whichever are larger, each time that it runs."""
        total = lambda arrays: sum(array.bytes for array in arrays)
        return self.times * max(total(self.operands), total(self.results))

    def moves(self, *dims: int) -> bool:
        """Whether an array that is put in, or comes out, has all these dims."""
        return any(set(dims) <= set(array.dims) for array in (*self.operands, *self.results))


def collectives(text: str) -> list[Collective]:
    """All of a program, given `Compiled.as_text()`, those that move most first."""
    computations, entry = _parsed(text)
    return sorted(_walk(computations, entry, 1), key=lambda one: -one.bytes)


def moved(found: Iterable[Collective]) -> int:
    """Bytes that arrive at a device, or leave it, whichever are more."""
    return sum(one.bytes for one in found)


def by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """`moved`, for each kind."""
    total: dict[str, int] = {}
    for one in found:
        total[one.kind] = total.get(one.kind, 0) + one.bytes
    return total


@dataclasses.dataclass(frozen=True)
class _Instruction:
    result: tuple[Array, ...]
    operation: str
    rest: str


_Computation = dict[str, _Instruction]


def _parsed(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and which of them is the program."""
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


def _walk(computations: dict[str, _Computation], name: str, times: int) -> Iterator[Collective]:
    computation = computations[name]
    for instruction in computation.values():
        if instruction.operation.removesuffix("-start") in _KINDS:
            if not _moves_nothing(instruction.rest):
                yield _collective(computation, instruction, times)
        elif not instruction.operation.endswith(("-update", "-done")):
            trips = _trips(computations, instruction)
            for several, one in _CALLED.findall(instruction.rest):
                for called in re.findall(r"[\w.-]+", several or one):
                    yield from _walk(computations, called, times * trips)


def _moves_nothing(rest: str) -> bool:
    """Whether each group of devices that exchange is a single one."""
    if not (along := _ALONG.search(rest)):
        return bool(_ALONE.search(rest))
    sizes = {name: size for name, size, _ in _AXIS.findall(along[1])}
    return all(int(part or sizes[name]) == 1 for name, _, part in _AXIS.findall(along[2]))


def _trips(computations: dict[str, _Computation], instruction: _Instruction) -> int:
    """How often what the instruction calls runs."""
    if known := _TRIPS.search(instruction.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", instruction.rest)
    if not condition:
        return 1
    # TPU's compiler does not write the number down: the loop ends when its counter reaches it.
    *_, ends = (computation := computations[condition[1]]).values()
    if ends.operation != "compare" or "direction=LT" not in ends.rest:
        return 1
    last = computation[_operands(ends)[1]]
    return int(last.rest.partition(")")[0]) if last.operation == "constant" else 1


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.-]+)", instruction.rest.partition("), ")[0])


def _collective(computation: _Computation, instruction: _Instruction, times: int) -> Collective:
    names = _operands(instruction)
    operands = tuple(array for name in names for array in computation[name].result)
    results = instruction.result
    if len(results) > len(operands):
        # One that is only started has its operands among its results, and counters behind them.
        results = results[len(operands) : 2 * len(operands)]
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    kind = instruction.operation.removesuffix("-start")
    return Collective(kind, operands, results, times, source[1] if source else "")
