"""The softmax over windows' tokens inside a kernel: a thread keeps a channel in registers.

Each warpgroup of a block brings its 128 channels of the tokens to shared memory (TMA), a piece of
each window at a time and a few pieces ahead, under a running maximum.

Axis letters: as in gpu.py; N tokens of a piece, of one window and series, D pieces under way.
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

# Bytes of a piece, per warpgroup: two blocks of four share a multiprocessor where pieces are whole
# windows, and one has three pieces under way where they are not.
_PIECE_BYTES, _DEPTH = 16 * 2**10, 3
# Tokens between two looks at the running maximum.
_STEP = 8
# Of what no maximum is less: a piece may have no token that counts.
_LEAST = float(np.finfo(np.float32).min)

# A window's series and piece, token of the piece -> its row of the tile, its place in the window,
# whether it counts.
Place = Callable[[Any, int, Any, Any], tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How the tokens of a block's windows are cut.

    Attributes:
      windows: W.
      tokens: N.
      count: of pieces.
      overlap: series.
      warpgroups: of a block, each with 128 channels.
      copies: that bring a piece.
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
    """Of one series that a piece holds."""
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
      pieces: of what.
      bring: starts copies of a piece to the two tiles it is given, with a barrier.
      place: where tokens are.
      biases: reference to the bias of each series, [M, V].
      warpgroup: which.
      smem: `Pieces.scratch` and `gpu_finish.scratch`.
    """
    depth, line = pieces.depth, smem["line"].at[warpgroup]
    tiles = lambda slot: tuple(smem[name].at[warpgroup, slot] for name in ("kv", "gate"))
    here = lambda slot: smem["here"].at[warpgroup * depth + slot]
    fetch = lambda piece, slot: bring(piece, tiles(slot), here(slot))
    for piece in range(depth):
        fetch(jnp.int32(piece), piece)
    nothing = tuple(_per_thread(value) for value in (_LEAST, 0.0, 0.0))

    def add(window: Any, piece: Any, slot: Any, running: Any) -> Any:
        for series in range(pieces.overlap):
            kv_XV, gate_XV = (tile.at[series] for tile in tiles(slot))
            where = functools.partial(place, window, series, piece)
            some = functools.partial(_add_tokens, kv_XV, gate_XV, biases[series], where, pieces)
            running = jax.lax.fori_loop(0, pieces.tokens // _step(pieces), some, running)
        return running

    def put(window: Any, running: Any) -> None:
        gpu_finish.write(line, window, running[2] / running[1])

    if pieces.count == 1:
        plgpu.barrier_wait(here(0))
        pl.loop(0, pieces.windows)(lambda window: put(window, add(window, 0, 0, nothing)))
        return

    def one(piece: Any, running: Any) -> Any:
        slot = jax.lax.rem(piece, depth)
        plgpu.barrier_wait(here(slot))
        running = add(0, piece, slot, running)

        @pl.when(piece + depth < pieces.count)
        def _() -> None:
            plgpu.commit_smem()  # all threads have read what is overwritten next
            fetch(piece + depth, slot)

        return running

    put(0, jax.lax.fori_loop(0, pieces.count, one, nothing))


def _per_thread(value: float) -> Array:
    """A constant in the layout of what is read, as a loop's carry needs it."""
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
    """Take a few tokens into the running maximum, sum of weights and weighted sum."""
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
    kept = jnp.exp(largest - new)
    total, weighted = total * kept, weighted * kept
    for logit, (at, _, counts) in zip(logits, tokens, strict=True):
        weight = jnp.exp(logit - new)
        total += weight
        weighted += weight * jnp.where(counts, read(kv_ref, at), 0.0)
    return new, total, weighted
