"""Compiled programs as text (HLO): instructions, and how often each runs.

The body of a loop runs once per iteration, or counts as run once if the number of iterations
depends on data, as for the end of a text. All branches of a condition count.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The memory beside the cores of a TPU: what is in it is not in HBM.
_ON_CHIP = "S(1)"
# Operations whose computations are executed as they are, instead of as parts of one operation.
_CONTROL = ("while", "conditional", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Array:
    """One device's shard of an array.

    Attributes:
      dtype: the type of its elements, such as 'bf16'.
      dims: its shape.
      on_chip: whether it is next to a TPU's cores instead of in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * (int(bits[0]) if bits else 8) // 8


class Instruction(NamedTuple):
    """An instruction of a computation; `rest` is what follows its opening bracket."""

    name: str
    result: tuple[Array, ...]
    operation: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.-]+)", self.rest.partition("), ")[0])

    @property
    def source(self) -> str:
        """The JAX operation that it implements."""
        source = re.search(r'op_name="([^"]*)"', self.rest)
        return source[1] if source else ""

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        groups = (names or single for names, single in _CALLED.findall(self.rest))
        return [name for names in groups for name in re.findall(r"[\w.-]+", names)]


Computation = dict[str, Instruction]


class Step(NamedTuple):
    """An instruction that a program runs.

    Attributes:
      computation: the computation around it.
      instruction: the instruction.
      times: how often it runs.
      is_inner: whether it is a part of another operation, such as a fusion.
    """

    computation: Computation
    instruction: Instruction
    times: int
    is_inner: bool

    @property
    def operands(self) -> list[Array]:
        """The arrays it reads."""
        names = self.instruction.operands
        return [array for name in names for array in self.computation[name].result]


class Program:
    """A program, read from the text of `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str) -> None:
        """Read the text of a program."""
        self.computations: dict[str, Computation] = {}
        self.entry, current = "", {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                root, name, result, operation, rest = match.groups()
                current[name] = Instruction(name, arrays(result), operation, rest, bool(root))

    def steps(self) -> Iterator[Step]:
        """All instructions that run, in the order of the text."""
        yield from self._walk(self.entry, 1, False)

    def _walk(self, name: str, times: int, is_inner: bool) -> Iterator[Step]:
        for instruction in (computation := self.computations[name]).values():
            yield Step(computation, instruction, times, is_inner)
            operation = instruction.operation
            if operation.removesuffix("-start") in COLLECTIVES:
                continue
            if operation.endswith(("-update", "-done")):
                continue
            inner = is_inner or operation not in _CONTROL
            trips = self._trips(instruction)
            for called in instruction.called:
                yield from self._walk(called, times * trips, inner)

    def _trips(self, instruction: Instruction) -> int:
        """How often the computations that an instruction calls run."""
        if known := _TRIPS.search(instruction.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", instruction.rest)
        if not condition:
            return 1
        # TPU programs do not say the number of iterations: read it from the loop's condition.
        *_, compare = (computation := self.computations[condition[1]]).values()
        if compare.operation != "compare" or "direction=LT" not in compare.rest:
            return 1
        limit = computation[compare.operands[1]]
        return int(limit.rest.partition(")")[0]) if limit.operation == "constant" else 1


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays that a text names, such as 'f32[2,4]{1,0}'."""
    dims = lambda numbers: tuple(int(number) for number in numbers.split(",") if number)
    return tuple(
        Array(dtype, dims(numbers), _ON_CHIP in layout)
        for dtype, numbers, layout in _ARRAY.findall(text)
    )
