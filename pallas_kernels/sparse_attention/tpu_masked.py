"""A block's queries against all entries up to the last one listed, under a mask.

Entries that are rows of bytes are decoded step by step, once for all queries of the block.

Axis letters: Q queries, H heads, K channels, W channels or bytes of an entry, Y keys of the window,
E = 1024 entries per step, R = Q x H rows, C = 128 lanes, N = E / C.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import tpu_byte_rows
from pallas_kernels.byte_rows import FP8
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.sparse_attention.tpu_gather import Source, packing
from pallas_kernels.sparse_attention.tpu_softmax import logits

STEP = 1024
_TILES = STEP // LANES


class Scratch(NamedTuple):
    """Scratch memory of a block.

    Attributes:
      entries: [2, E, W], the entries of this step and of the next.
      decoded: [E, K], those of this step; None if entries are numbers already.
      listed: [Q, capacity / C, C], above 0 where the query lists the entry.
      largest, total, value: [R, 1], [R, 1] and [R, K], state of the running softmax.
    """

    entries: Any
    decoded: Any
    listed: Any
    largest: Any
    total: Any
    value: Any


def scratch(q_block: tuple[int, int, int], capacity: int, pool: Any, dtype: Any) -> Scratch:
    """Scratch shapes.

    Args:
      q_block: shape of a block of queries [Q, H, K].
      capacity: most entries that are read, a multiple of STEP.
      pool: the pool's array, `Stored.array`.
      dtype: dtype of the queries.
    """
    queries, heads, dim = q_block
    rows = queries * heads
    decoded = pltpu.VMEM((STEP, dim), dtype) if pool.dtype == jnp.uint8 else None
    return Scratch(
        entries=pltpu.VMEM((2, STEP, pool.shape[3]), pool.dtype),
        decoded=decoded,
        listed=pltpu.VMEM((queries, capacity // LANES, LANES), jnp.float32),
        largest=pltpu.VMEM((rows, 1), jnp.float32),
        total=pltpu.VMEM((rows, 1), jnp.float32),
        value=pltpu.VMEM((rows, dim), jnp.float32),
    )


def mark_listed(indices_ref: Any, scratch: Scratch) -> None:
    """Fill `listed`, by a matmul of one-hot matrices: of each listed entry's tile and its lane."""
    queries, tiles = scratch.listed.shape[:2]
    k = indices_ref.shape[2]
    one_hot = lambda size, at_1k: (
        (jax.lax.broadcasted_iota(jnp.int32, (size, k), 0) == at_1k)
        .astype(jnp.float32)
        .astype(jnp.bfloat16)
    )

    def query(t: Any, _: Any) -> None:
        index_1k = indices_ref[0, pl.ds(t, 1)]
        # -1 is in tile -1, which does not exist.
        tile, lane = one_hot(tiles, index_1k >> 7), one_hot(LANES, index_1k & (LANES - 1))
        scratch.listed[t] = logits(tile, lane, 1.0)

    jax.lax.fori_loop(0, queries, query, None)


class Entries(NamedTuple):
    """The pool of one batch row, and what is needed to read it.

    Attributes:
      source: where to read.
      last: the last entry listed, -1 for none; below the capacity of `scratch`.
      scratch: scratch with `listed` filled.
      sems: two DMA semaphores.
    """

    source: Source
    last: Any
    scratch: Scratch
    sems: Any


def attend(
    q_RK: Float[Array, "R K"],
    sink_H1: Float[Array, "H 1"],
    window: tuple[Float[Array, "Y K"], Bool[Array, "Q Y"]],
    entries: Entries,
    scale: float,
) -> Float[Array, "R K"]:
    """Attend to the window and to the listed entries.

    Rows are query by query. The window's keys are finite, and come with which of them each query
    sees.
    """
    source, last, scratch, sems = entries
    heads, queries = sink_H1.shape[0], scratch.listed.shape[0]
    per_row = lambda x_QX: jnp.repeat(x_QX, heads, axis=0)
    scratch.largest[...] = jnp.tile(sink_H1, (queries, 1))
    scratch.total[...] = jnp.ones(scratch.total.shape, jnp.float32)
    scratch.value[...] = jnp.zeros(scratch.value.shape, jnp.float32)
    steps = jax.lax.div(last + STEP, STEP)
    fetch = lambda i: _copy(source, scratch.entries, sems, i, "start")
    pl.when(steps > 0)(lambda: fetch(jnp.int32(0)))
    window_YK, near_QY = window
    _add(q_RK, window_YK, per_row(near_QY), scratch, scale)

    def step(i: Any, _: Any) -> None:
        pl.when(i + 1 < steps)(lambda: fetch(i + 1))
        listed_QNC = scratch.listed[:, pl.ds(pl.multiple_of(i * _TILES, _TILES), _TILES)]
        _copy(source, scratch.entries, sems, i, "wait")
        entries_ref = scratch.entries.at[i % 2]
        if scratch.decoded is not None:
            tpu_byte_rows.decode(entries_ref, scratch.decoded, FP8)
            entries_ref = scratch.decoded
        keys_EK = _zero_unlisted(entries_ref[...], jnp.max(listed_QNC, axis=0))
        mask_RE = jnp.concatenate([per_row(listed_QNC[:, n]) > 0.0 for n in range(_TILES)], axis=1)
        _add(q_RK, keys_EK, mask_RE, scratch, scale)

    jax.lax.fori_loop(0, steps, step, None)
    return scratch.value[...] / scratch.total[...]


def _copy(source: Source, to_ref: Any, sems: Any, i: Any, do: str) -> None:
    """Start the copies of a step's entries, or wait for them; the pool's last step may be short."""

    def copy(first: Any, at: Any, rows: int) -> None:
        to = to_ref.at[i % 2, pl.ds(at, rows)]
        rows_ref = source.ref.at[pl.ds(first, rows)]
        getattr(pltpu.make_async_copy(rows_ref, to, sems.at[i % 2]), do)()

    if source.page:
        per_word = packing(source.ref.dtype)
        words, step = min(source.page, STEP // per_word), STEP // per_word
        last = source.offsets_ref.shape[3] * source.page - words

        def copy_piece(p: Any, _: Any) -> None:
            # Beyond the pool, where nothing is listed, the last piece is copied again.
            word = source.at(jnp.minimum(i * step + p * words, last))
            rows = words * per_word
            copy(pl.multiple_of(word * per_word, rows), pl.multiple_of(p * rows, rows), rows)

        jax.lax.fori_loop(0, step // words, copy_piece, None)
        return
    at, (full_steps, rest) = pl.multiple_of(i * STEP, STEP), divmod(source.ref.shape[0], STEP)
    if full_steps:
        pl.when(i < full_steps)(lambda: copy(at, 0, STEP))
    if rest:
        pl.when(i == full_steps)(lambda: copy(at, 0, rest))


def _zero_unlisted(keys_EK: Any, seen_NC: Any) -> Any:
    """Keep garbage in entries that no query lists out of products: 0 * NaN is NaN."""
    seen_CN = seen_NC.T > 0.0
    zero = jnp.zeros((), keys_EK.dtype)
    tiles = [
        jnp.where(seen_CN[:, n : n + 1], keys_EK[n * LANES : (n + 1) * LANES], zero)
        for n in range(_TILES)
    ]
    return jnp.concatenate(tiles, axis=0)


def _add(q_RK: Any, keys_XK: Any, mask_RX: Any, scratch: Scratch, scale: float) -> None:
    """One step of the running softmax; the sink keeps its maximum finite."""
    logits_RX = jnp.where(mask_RX, logits(q_RK, keys_XK, scale), -jnp.inf)
    before_R1 = scratch.largest[...]
    largest_R1 = jnp.maximum(before_R1, jnp.max(logits_RX, axis=1, keepdims=True))
    weights_RX = jnp.exp(logits_RX - largest_R1)
    shrunk_R1 = jnp.exp(before_R1 - largest_R1)
    scratch.largest[...] = largest_R1
    scratch.total[...] = scratch.total[...] * shrunk_R1 + jnp.sum(weights_RX, axis=1, keepdims=True)
    value_RK = jnp.dot(
        weights_RX.astype(keys_XK.dtype), keys_XK, preferred_element_type=jnp.float32
    )
    scratch.value[...] = scratch.value[...] * shrunk_R1 + value_RK
