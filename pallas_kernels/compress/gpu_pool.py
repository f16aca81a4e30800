"""The softmax over windows' tokens inside a kernel: a thread keeps a channel in registers.

Each warpgroup of a block loads its 128 channels of the tokens into shared memory (TMA), a piece of
each window at a time and a few pieces ahead, and keeps a running maximum.

Axis letters: as in gpu.py; N tokens of a piece, of one window and series, D pieces in flight.
"""

import dataclasses
import functools
from collections.abc import Callable
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels.compress import gpu_finish
from pallas_kernels.compress.gpu_finish import CHANNELS

# Bytes of a piece, per warpgroup: two blocks of four warpgroups fit on a multiprocessor if pieces
# are whole windows; if not, one block has three pieces in flight.
_PIECE_BYTES, _DEPTH = 16 * 2**10, 3
# Tokens between updates of the running maximum.
_STEP = 8
# Finite start of the running maximum: a piece may have no tokens that count.
_LEAST = float(np.finfo(np.float32).min)

# Window, series, piece, token of the piece -> its row in the tile, its position in the window,
# whether it counts.
Place = Callable[[Any, int, Any, Any], tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How the tokens of a block's windows are cut.

    Attributes:
      windows: W.
      tokens: N.
      count: number of pieces.
      overlap: number of series.
      warpgroups: warpgroups per block, each with 128 channels.
      copies: copies per piece.
    """

    windows: int
    tokens: int
    count: int
    overlap: int
    warpgroups: int
    copies: int

    @property
    def depth(self) -> int:
        return min(self.count, _DEPTH)

    def scratch(self, kv: Any, gate: Any) -> dict[str, Any]:
        """Shared memory and barriers."""
        tile = self.warpgroups, self.depth, self.overlap, self.windows * self.tokens, CHANNELS
        here = plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.warpgroups * self.depth)
        return {"kv": plgpu.SMEM(tile, kv), "gate": plgpu.SMEM(tile, gate), "here": here}


def most_tokens(kv: Any, gate: Any, overlap: int) -> int:
    """The most tokens of one series that fit into a piece."""
    return _PIECE_BYTES // (overlap * CHANNELS * (kv.itemsize + gate.itemsize))


def run(
    pieces: Pieces,
    bring: Callable[[Any, Any, Any], None],
    place: Place,
    biases: list[Any],
    warpgroup: Array,
    smem: Any,
) -> None:
    """Leave a warpgroup's pooled windows in its `line`.

    Args:
      pieces: how the tokens are cut.
      bring: (piece, the tiles of kv and gate, barrier) starts the copies of a piece.
      place: where tokens are.
      biases: references to the bias of each series, [M, V].
      warpgroup: index of the warpgroup.
      smem: buffers of `Pieces.scratch` and `gpu_finish.scratch`.
    """
    depth, line = pieces.depth, smem["line"].at[warpgroup]
    tiles = lambda slot: tuple(smem[name].at[warpgroup, slot] for name in ("kv", "gate"))
    here = lambda slot: smem["here"].at[warpgroup * depth + slot]
    fetch = lambda piece, slot: bring(piece, tiles(slot), here(slot))
    for piece in range(depth):
        fetch(jnp.int32(piece), piece)
    initial = tuple(_per_thread(value) for value in (_LEAST, 0.0, 0.0))

    def add(window: Any, piece: Any, slot: Any, running: Any) -> Any:
        for series in range(pieces.overlap):
            kv_XV, gate_XV = (tile.at[series] for tile in tiles(slot))
            where = functools.partial(place, window, series, piece)
            add_some = functools.partial(_add_tokens, kv_XV, gate_XV, biases[series], where, pieces)
            running = jax.lax.fori_loop(0, pieces.tokens // _step(pieces), add_some, running)
        return running

    def put(window: Any, running: Any) -> None:
        gpu_finish.write(line, window, running[2] / running[1])

    if pieces.count == 1:
        plgpu.barrier_wait(here(0))
        pl.loop(0, pieces.windows)(lambda window: put(window, add(window, 0, 0, initial)))
        return

    def add_piece(piece: Any, running: Any) -> Any:
        slot = jax.lax.rem(piece, depth)
        plgpu.barrier_wait(here(slot))
        running = add(0, piece, slot, running)

        @pl.when(piece + depth < pieces.count)
        def _() -> None:
            plgpu.commit_smem()  # all threads have read what is overwritten next
            fetch(piece + depth, slot)

        return running

    put(0, jax.lax.fori_loop(0, pieces.count, add_piece, initial))


def _per_thread(value: float) -> Array:
    """A constant in the layout of what is read, as a loop carry must be."""
    constant = jnp.full((CHANNELS,), value, jnp.float32)
    return plgpu.layout_cast(constant, plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def _step(pieces: Pieces) -> int:
    return gcd(pieces.tokens, _STEP)


def _add_tokens(
    kv_ref: Any,
    gate_ref: Any,
    bias_ref: Any,
    place: Callable[[Any], tuple[Any, Any, Any]],
    pieces: Pieces,
    step: Any,
    running: tuple[Float32[Array, " V"], ...],
) -> tuple[Float32[Array, " V"], ...]:
    """Add a few tokens to the running maximum, sum of weights and weighted sum."""
    count = _step(pieces)
    largest, total, weighted = running
    tokens = [place(step * count + i) for i in range(count)]
    read = lambda ref, at: ref[at].astype(jnp.float32)
    logits = [read(gate_ref, at) + read(bias_ref, of_window) for at, of_window, _ in tokens]
    logits = [
        jnp.where(counts, logit, -jnp.inf)
        for logit, (_, _, counts) in zip(logits, tokens, strict=True)
    ]
    new = functools.reduce(jnp.maximum, logits, largest)
    rescale = jnp.exp(largest - new)
    total, weighted = total * rescale, weighted * rescale
    for logit, (at, _, counts) in zip(logits, tokens, strict=True):
        weight = jnp.exp(logit - new)
        total += weight
        weighted += weight * jnp.where(counts, read(kv_ref, at), 0.0)
    return new, total, weighted
