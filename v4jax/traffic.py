"""Bytes that a compiled program reads and writes in HBM, and its operations, from its text.

Every operation reads its operands and writes its results, once for each time that it runs (see
`v4jax.hlo`), except that

* a slice reads what it takes, and an update in place writes what it changes;
* a Pallas kernel that gets a stack of layers and the index of one reads that layer; one that gets
  pages and a table reads the pages in the table, as of a full context; sparse attention reads the
  entries that it is told to; experts' kernels read the experts that are expected to have tokens;
* what is next to a TPU's cores (VMEM) is not in HBM.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from v4jax.hlo import COLLECTIVES, Array, Computation, Instruction, Program, Step

# Operations that name arrays or run others, but touch no memory.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "partition-id", "replica-id", "after-all", "opt-barrier", "iota"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_KERNEL = "tpu_custom_call"
# A copy of fewer bytes is a scale or a part of a small matrix.
_LARGE = 2**20


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device does in a program.

    Attributes:
      read, written: bytes in HBM.
      flops: floating-point operations of matrix products, those of kernels included.
      wide_weights: bytes of float32 copies of FP8 weights that are written to HBM.
    """

    read: int
    written: int
    flops: float
    wide_weights: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Experts:
    """How busy a device's experts are.

    Attributes:
      active: share of the experts that have tokens.
      rows: most tokens of a device's experts, each counted once per expert.
    """

    active: float = 1.0
    rows: int = 2**62


def measure(program: str | Program, experts: Experts = Experts()) -> Traffic:
    """The bytes and operations of a program, or of its text, on one device."""
    program = Program(program) if isinstance(program, str) else program
    quantised = _quantised(program)
    read = written = wide = 0
    flops = 0.0
    for step in program.steps():
        flops += step.times * _flops(step, experts)
        if step.is_inner:
            continue
        reads, writes = _bytes(program, step, experts)
        read, written = read + step.times * reads, written + step.times * writes
        for array in step.instruction.result:
            is_copy = step.instruction.operation not in _FREE and _unstacked(array) in quantised
            if is_copy and array.dtype == "f32" and not array.on_chip:
                wide += step.times * array.bytes
    return Traffic(read, written, flops, wide)


def _bytes(program: Program, step: Step, experts: Experts) -> tuple[int, int]:
    """Bytes that an operation reads and writes."""
    instruction, operation = step.instruction, step.instruction.operation
    if operation in _FREE or operation.endswith(("-done", "-update")):
        return 0, 0
    result, operands = instruction.result, step.operands
    if operation.removesuffix("-start") in COLLECTIVES:
        return _hbm(operands), _hbm(result[-len(operands) :])
    if operation in ("copy-start", "slice-start"):
        target = result[0] if operation == "copy-start" else result[-2]
        return 0 if operands[0].on_chip else target.bytes, _hbm([target])
    if operation == "dynamic-update-slice":
        update = _total(operands[1:2])
        return _hbm(operands[1:2]), 0 if result[0].on_chip else update
    if operation in _SLICES:
        return 0 if operands[0].on_chip else _total(result), _hbm(result)
    if operation == "fusion":
        return _fusion(program, step)
    if operation == "custom-call" and _KERNEL in instruction.rest:
        return _kernel(step, experts), _hbm(result)
    return _hbm(operands), _hbm(result)


def _fusion(program: Program, step: Step) -> tuple[int, int]:
    body = program.computations[step.instruction.called[0]]
    parameters = {
        int(inner.rest.partition(")")[0]): inner
        for inner in body.values()
        if inner.operation == "parameter"
    }
    reads = sum(
        min(_used(program, body, parameters[number]), array.bytes)
        for number, array in enumerate(step.operands)
        if not array.on_chip and number in parameters
    )
    (root,) = (inner for inner in body.values() if inner.is_root)
    outputs = [body[name] for name in root.operands] if root.operation == "tuple" else [root]
    writes = 0
    for array, output in zip(step.instruction.result, outputs, strict=False):
        while output.operation == "bitcast":
            output = body[output.operands[0]]
        in_place = output.operation == "dynamic-update-slice"
        size = _total(body[output.operands[1]].result) if in_place else array.bytes
        writes += 0 if array.on_chip else size
    return reads, writes


def _used(program: Program, body: Computation, value: Instruction) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    used = 0
    for user in body.values():
        if value.name not in user.operands or user.operation == "parameter":
            continue
        position = user.operands.index(value.name)
        if user.operation in _SLICES and position == 0:
            used += _total(user.result)
        elif user.operation == "dynamic-update-slice" and position == 0:
            continue
        elif user.operation in ("bitcast", "reshape"):
            used += _used(program, body, user)
        elif user.operation == "fusion":
            inner = program.computations[user.called[0]]
            parameter = next(x for x in inner.values() if x.rest.startswith(f"{position})"))
            used += _used(program, inner, parameter)
        else:
            return _total(value.result)
    return used


def _kernel(step: Step, experts: Experts) -> int:
    """Bytes that a Pallas kernel reads."""
    name, instruction = _kernel_name(step), step.instruction
    by_name = {name: step.computation[name].result for name in instruction.operands}
    arrays = [array for result in by_name.values() for array in result if not array.on_chip]
    tables = [array for array in step.operands if array.dtype == "s32"]
    total = 0
    for array in arrays:
        if name.startswith("experts_") and len(array.dims) == 4:
            total += int(array.bytes / array.dims[0] * experts.active)
        elif name.startswith("linear_") and len(array.dims) == 3:
            total += array.bytes // array.dims[0]
        elif len(array.dims) == 4 and name.startswith(("dense_", "sparse_", "indexer_")):
            total += _pool(name, array, tables)
        elif name == "compress_decode" and len(array.dims) == 4:
            total += array.bytes // array.dims[0]
        else:
            total += array.bytes
    return total


def _pool(name: str, array: Array, tables: list[Array]) -> int:
    """Bytes of a stack of pools that attention or the indexer reads."""
    entries, width = array.dims[-2:]
    width = width * array.bytes // math.prod(array.dims)
    if name == "sparse_attention_decode":
        return width * max(math.prod(table.dims) for table in tables)
    pages = max((math.prod(table.dims) for table in tables), default=1)
    return min(array.bytes // array.dims[0], width * entries * pages)


def _flops(step: Step, experts: Experts) -> float:
    instruction, operation = step.instruction, step.instruction.operation
    size = sum(math.prod(array.dims) for array in instruction.result)
    if operation == "dot":
        left = step.operands[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        dims = contracted[1].split(",") if contracted else []
        return 2.0 * size * math.prod(left[int(dim)] for dim in dims if dim)
    if operation == "convolution":
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
        kernel = step.operands[1].dims
        return 2.0 * size * (kernel[labels[1].index("i")] if labels else 1)
    if operation == "custom-call" and _KERNEL in instruction.rest:
        return _kernel_flops(step, experts)
    return 0.0


def _kernel_flops(step: Step, experts: Experts) -> float:
    name, operands, result = _kernel_name(step), step.operands, step.instruction.result[0]
    if name.startswith("linear_"):
        weight = next(array for array in operands if len(array.dims) == 3)
        rows = math.prod(result.dims[:-1])
        return 2.0 * rows * math.prod(weight.dims[-2:])
    if name == "experts_weight_gradient":
        left, right = [array for array in operands if len(array.dims) == 2][-2:]
        return 2.0 * min(left.dims[0], experts.rows) * left.dims[1] * right.dims[1]
    if name.startswith("experts_"):
        weights = [a for a in operands if len(a.dims) == 4 and a.dtype != "f8e8m0fnu"]
        inputs = max((a.dims[-1] for a in operands if len(a.dims) == 2), default=0)
        rows = min(result.dims[0], experts.rows)
        return 2.0 * rows * len(weights) * inputs * result.dims[-1]
    if name.startswith(("dense_", "sparse_")):
        return _attention_flops(name, operands)
    if name.startswith("indexer_"):
        query = next(a for a in operands if len(a.dims) == 4 and a.dtype in ("bf16", "f32"))
        pool = next(a for a in reversed(operands) if len(a.dims) >= 3)
        tables = [array for array in operands if array.dtype == "s32"]
        pages = max((math.prod(table.dims) for table in tables), default=1)
        return 2.0 * math.prod(query.dims) * pool.dims[-2] * pages / max(1, query.dims[0])
    if name.startswith("hyper_"):
        weight = max((a for a in operands if a.dtype == "f32"), key=lambda a: math.prod(a.dims))
        streams = max(math.prod(a.dims[:-1]) for a in operands if a.dtype == "bf16")
        return 2.0 * streams * math.prod(weight.dims) if len(weight.dims) == 2 else 0.0
    return 0.0


def _attention_flops(name: str, operands: list[Array]) -> float:
    """Of the products with keys and with values, for all keys that are given."""
    query = next(a for a in operands if a.dtype in ("bf16", "f32") and len(a.dims) >= 3)
    heads_and_dim = query.dims[-2:]
    rows = math.prod(query.dims[:-2])
    window = next((a for a in operands if len(a.dims) == 3 and a.dims != query.dims), None)
    keys = window.dims[-2] if window else 0
    tables = [array for array in operands if array.dtype == "s32"]
    if name == "sparse_attention_decode":
        keys += max(table.dims[-1] for table in tables)
    elif pools := [array for array in operands if len(array.dims) == 4 and array is not query]:
        pages = max((table.dims[-1] for table in tables), default=1)
        keys += pools[-1].dims[-2] * pages
    passes = 2.5 if name.endswith("backward") else 1.0
    return passes * 4.0 * rows * keys * math.prod(heads_and_dim)


def _kernel_name(step: Step) -> str:
    return step.instruction.name.split(".")[0]


def _quantised(program: Program) -> set[tuple[int, ...]]:
    """Shapes of FP8 weights, without the dim over which layers are stacked."""
    parameters = (
        array
        for instruction in program.computations[program.entry].values()
        if instruction.operation == "parameter"
        for array in instruction.result
    )
    large = (array for array in parameters if array.dtype == "f8e4m3fn" and array.bytes >= _LARGE)
    return {_unstacked(array) for array in large}


def _unstacked(array: Array) -> tuple[int, ...]:
    """The shape of a matrix, whatever the order of its dims."""
    return tuple(sorted(array.dims[-2:])) if len(array.dims) >= 2 else ()


def _total(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays)


def _hbm(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)
