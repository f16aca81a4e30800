"""Put arrays on devices; each process reads what its devices hold, once, in parallel ranges.

A leaf is a stack of matrices, or of vectors, each of which is stored on its own. A box is a slice
of each dim.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from v4jax import waiting
from v4jax.checkpoints import byte_files
from v4jax.checkpoints.byte_files import Box
from v4jax.model import params, sharding
from v4jax.model.params import ParamSpec, map_leaves
from v4jax.model.transformer import Model
from v4jax.waiting import Progress

_THREADS = 16
# Most elements that a thread reads and converts at once, in some 10 MiB.
_PIECE = 2**21
# Matrices are cut between blocks of rows that share scales.
_ROWS = 128

Interval = tuple[int, int]
Intervals = tuple[Interval, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an array's values come from.

    Attributes:
      read: the values of a box of the matrix at a position of the stack, in the array's dtype.
      units: for each dim of the matrix, `read` takes only boxes of multiples of this; 1 if absent.
      rows: the dim that is stored as rows, between which large boxes are cut.
    """

    read: Callable[[tuple[int, ...], Box], np.ndarray]
    units: tuple[int, ...] = ()
    rows: int = 0


def fill(
    declared: Model,
    structs: Any,
    mesh: Mesh | None,
    sources: Callable[[str, Any], Any],
    progress: Progress | None,
) -> Model:
    """The model with values.

    Args:
      declared: the model's declarations.
      structs: its arrays as ShapeDtypeStructs.
      mesh: the weights are placed by `sharding.RULES`; without a mesh, on the first device.
      sources: a leaf's name and structs to a tree like these, of each array's `Source`.
      progress: called with the current activity, leaves done and total leaves.
    """
    if mesh is not None:
        places = sharding.shardings(declared, mesh, structs)
    else:
        first = SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: first, structs)
    total, done = sum(1 for _ in params.leaves(declared)), 0
    threads = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        with waiting.progress(progress) as report:

            def one(name: str, spec: ParamSpec, leaf: Any, place: Any) -> Any:
                nonlocal done
                put = functools.partial(_assemble, threads, spec.stack_dims)
                arrays = jax.tree.map(put, leaf, place, sources(name, leaf))
                done += 1
                report("loading", done, total)
                return arrays

            return map_leaves(one, declared, structs, places)
    finally:
        threads.shutdown(cancel_futures=True)


def _assemble(
    threads: Executor,
    stack_dims: int,
    struct: jax.ShapeDtypeStruct,
    placement: Sharding,
    source: Source,
) -> jax.Array:
    """One array, of which every box that the devices here hold is read once."""
    boxes = {
        device: tuple(
            part.indices(size)[:2] for part, size in zip(index, struct.shape, strict=True)
        )
        for device, index in placement.addressable_devices_indices_map(struct.shape).items()
        if index is not None
    }
    buffers = {
        box: byte_files.empty([stop - start for start, stop in box], struct.dtype)
        for box in boxes.values()
    }

    def read(piece: tuple[tuple[int, ...], Box]) -> None:
        position, box = piece
        values = source.read(position, box)
        for held, buffer in buffers.items():
            _copy_overlap(values, position, box, buffer, held)

    for _ in threads.map(read, _pieces(list(buffers), struct.shape[stack_dims:], source)):
        pass
    on_devices = [jax.device_put(buffers[box], device) for device, box in boxes.items()]
    # Else slow devices would let the buffers of several leaves pile up on the host.
    jax.block_until_ready(on_devices)
    return jax.make_array_from_single_device_arrays(struct.shape, placement, on_devices)


def _copy_overlap(
    values: np.ndarray, position: tuple[int, ...], box: Box, buffer: np.ndarray, held: Intervals
) -> None:
    """Copy what a buffer holds of the values of a box of one matrix."""
    stack, matrix = held[: len(position)], held[len(position) :]
    overlap = [
        (max(part.start, start), min(part.stop, stop))
        for part, (start, stop) in zip(box, matrix, strict=True)
    ]
    in_stack = all(start <= i < stop for i, (start, stop) in zip(position, stack, strict=True))
    if not in_stack or any(start >= stop for start, stop in overlap):
        return
    place = [i - start for i, (start, _) in zip(position, stack, strict=True)]
    target = [
        slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, matrix, strict=True)
    ]
    source = [
        slice(a - part.start, b - part.start) for (a, b), part in zip(overlap, box, strict=True)
    ]
    buffer[(*place, *target)] = values[tuple(source)]


def _pieces(
    boxes: list[Intervals], shape: tuple[int, ...], source: Source
) -> Iterator[tuple[tuple[int, ...], Box]]:
    """What to read, as positions in the stack and boxes of the matrix there."""
    stack_dims = len(boxes[0]) - len(shape)
    matrix_boxes: dict[tuple[int, ...], list[Intervals]] = {}
    for box in boxes:
        for position in itertools.product(*(range(*part) for part in box[:stack_dims])):
            matrix_boxes.setdefault(position, []).append(box[stack_dims:])
    cuts: dict[tuple[Intervals, ...], list[Box]] = {}
    for position, needed in matrix_boxes.items():
        key = tuple(needed)
        if key not in cuts:
            covers = _covers(needed, shape, source.units)
            cuts[key] = [cut for cover in covers for cut in _cut(cover, source.rows)]
        yield from ((position, cut) for cut in cuts[key])


def _covers(
    boxes: list[Intervals], shape: tuple[int, ...], units: tuple[int, ...]
) -> list[Intervals]:
    """Few boxes, whole units, that cover the given ones; these are the same or disjoint."""
    whole = [
        tuple(
            (start // unit * unit, min(math.ceil(stop / unit) * unit, size))
            for (start, stop), size, unit in zip(
                box, shape, (*units, *(1 for _ in shape[len(units) :])), strict=True
            )
        )
        for box in boxes
    ]
    dims = [sorted(set(parts)) for parts in zip(*whole, strict=True)]
    if len(set(whole)) < math.prod(map(len, dims)):
        return list(dict.fromkeys(whole))
    return list(itertools.product(*map(_merged, dims)))


def _merged(intervals: list[Interval]) -> list[Interval]:
    """Sorted intervals, with those that touch or overlap as one."""
    merged: list[Interval] = []
    for start, stop in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _cut(cover: Intervals, dim: int) -> Iterator[Box]:
    """The box in pieces of about `_PIECE` elements, cut along a dim."""
    box = tuple(slice(*part) for part in cover)
    if not box:
        yield box
        return
    first, last = cover[dim]
    row = math.prod(stop - start for start, stop in cover) // max(last - first, 1)
    height = max(_PIECE // max(row, 1) // _ROWS, 1) * _ROWS
    edges = [first, *range(first // _ROWS * _ROWS + height, last, height), last]
    for start, stop in itertools.pairwise(edges):
        yield (*box[:dim], slice(start, stop), *box[dim + 1 :])
