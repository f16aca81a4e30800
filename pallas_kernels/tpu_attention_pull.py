"""The gradient of attention for one block of queries, inside a kernel.

First the log of the sum of each row's weights is computed; then the gradient is pulled back through
one block of keys at a time (`softmax.pull` has the formulas). Logits are recomputed and never leave
the chip; they are in base 2, like the chip's exponential.

Keys are rows here and queries columns: per-query values are then a row of lanes, and only one of
the five products needs a transpose.

Axis letters: as in `tpu_attention_backward`; E entries per step, X keys of any kind.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract

LOG2_E = math.log2(math.e)
ENTRIES = 512
# Up to this many entries are joined to the window: a step of few keys costs as much as one of many.
FEW = 256
_TOGETHER = 512
_ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which entries of the pool the rows of a block see.

    Attributes:
      array: [B, N, _, _], describes it; the functions get a ref to one block [_, _].
      scratch: shapes of the scratch that `prepare` fills.
      prepare: takes the block and the scratch; returns 1 + the last entry that any row sees.
      masks: takes the block, the scratch, the query of each row [1, R], a first entry and a count
        E; returns which of these entries any row sees [E, 1], and which each row sees [E, R].
      first: takes the block; returns the first entry that any row sees. None: 0.
    """

    array: Any
    scratch: tuple[Any, ...]
    prepare: Callable[..., Any]
    masks: Callable[..., tuple[Any, Any]]
    first: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a chunk and its blocks.

    Attributes:
      block: queries per block, Q.
      heads: heads per query.
      blocks: number of blocks, N.
      group: blocks per group.
      parts: number of parts, P, which take groups in turn.
      window: tokens that a query sees.
      near: keys of a block's window, Y.
      entries: capacity of the pool, S; 0 without one.
    """

    block: int
    heads: int
    blocks: int
    group: int
    parts: int
    window: int
    near: int
    entries: int

    @property
    def rows(self) -> int:
        """Rows per block, R."""
        return self.block * self.heads

    @property
    def width(self) -> int:
        """Entries per step, E."""
        return min(ENTRIES, self.entries)

    @property
    def groups(self) -> int:
        """Number of groups, G."""
        return pl.cdiv(self.blocks, self.group)

    @property
    def group_keys(self) -> int:
        """Keys of a group's window, A."""
        return (self.group - 1) * self.block + self.near

    def block_at(self, part: Any, step: Any) -> Any:
        """The block that a part processes in a step."""
        turn, place = jax.lax.div(step, self.group), jax.lax.rem(step, self.group)
        return (turn * self.parts + part) * self.group + place


class Inputs(NamedTuple):
    """The kernel's arrays, their BlockSpecs, or refs; `sink` is in base 2."""

    q: Any  # [R, K]
    grad: Any  # [R, K]
    out: Any  # [R, K]
    sink: Any  # [1, R]
    query: Any  # [1, R], the query of each row
    window: Any  # [Y, K]
    low: Any  # [1, R], the first key of the chunk's window that each row may see, or None: 0
    visible: Any  # a block of `Visibility.array`
    pool: Any  # [S, K]; None without a pool, like `visible`


class Outputs(NamedTuple):
    """Gradients; those of window, pool and sink are partial sums."""

    q: Any  # [R, K]
    window: Any  # [A, K] float32
    pool: Any  # [S, K] float32
    sink: Any  # [1, R] float32


class Scratch(NamedTuple):
    """Scratch memory of a block."""

    q: Any  # [R, K] float32, the sum of the queries' gradient
    logits: Any  # [_, E, R], logits of the pool; None: they are computed twice
    visible: Any


def kernel(
    layer_1: Any,
    start_B: Any,
    inputs: Inputs,
    outputs: Outputs,
    scratch: Scratch,
    *,
    sizes: Sizes,
    visibility: Visibility | None,
    scale: float,
) -> None:
    """One grid step; the grid is parts, rows of the batch, blocks of a part."""
    part, b, step = (pl.program_id(axis) for axis in range(3))
    first = sizes.block_at(part, step) * sizes.block
    pl.when(jax.lax.rem(step, sizes.group) == 0)(lambda: _clear(outputs.window))
    rows = _Rows(inputs.q, inputs.grad, _row_sums(inputs.grad, inputs.out), scale)
    keys_XK, mask_XR = _window_keys(inputs, first, start_B[b], sizes.window)
    pool = None
    if visibility is not None:
        pool = _Pool(sizes, visibility, rows, inputs, outputs, scratch)
    far = pool if sizes.entries > FEW else None
    begin, steps = 0, 0
    if pool is not None:
        pl.when(step == 0)(lambda: _clear(outputs.pool))
        end = pool.visibility.prepare(inputs.visible, scratch.visible)
        steps = jax.lax.div(end + sizes.width - 1, sizes.width)
        if pool.visibility.first is not None:
            begin = jax.lax.div(pool.visibility.first(inputs.visible), sizes.width)
        if far is None:
            entries_EK, mask_ER = pool.read(0)
            keys_XK = jnp.concatenate([keys_XK, entries_EK])
            mask_XR = jnp.concatenate([mask_XR, mask_ER])

    sink = inputs.sink[...], jnp.ones(inputs.sink.shape, jnp.float32)
    logits_XR, running = rows.measure(keys_XK, mask_XR, sink)
    if far is not None:
        running = jax.lax.fori_loop(begin, steps, far.measure, running)
    log_total_1R = running[0] + jnp.log2(running[1])

    scratch.q[...], keys_grad_XK = rows.pull(keys_XK, logits_XR, log_total_1R)
    at = pl.multiple_of(jax.lax.rem(first, sizes.group * sizes.block), 8)
    outputs.window[pl.ds(at, sizes.near)] += keys_grad_XK[: sizes.near]
    if far is not None:
        jax.lax.fori_loop(begin, steps, far.pull, log_total_1R)
    elif pool is not None:
        outputs.pool[...] += keys_grad_XK[sizes.near :]
    outputs.q[...] = scratch.q[...].astype(outputs.q.dtype)
    outputs.sink[...] = -jnp.exp2(inputs.sink[...] - log_total_1R) * rows.delta_1R


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A block's rows, as every set of keys needs them."""

    q_ref: Any
    grad_ref: Any
    delta_1R: Any  # grad . output
    scale: float

    def logits(
        self, keys_XK: Float[Array, "X K"], mask_XR: Bool[Array, "X R"], rows: slice = _ALL
    ) -> Float32[Array, "X _"]:
        """Logits in base 2."""
        logits_XR = contract(keys_XK, self.q_ref[rows], 1, 1) * (self.scale * LOG2_E)
        return jnp.where(mask_XR[:, rows], logits_XR, -jnp.inf)

    def measure(
        self, keys_XK: Float[Array, "X K"], mask_XR: Bool[Array, "X R"], running: Any
    ) -> tuple[Float32[Array, "X R"], Any]:
        """Logits, and the running maximum and sum of weights [1, R], updated with these keys.

        A few rows at a time, so that the next rows' products overlap with these rows' weights.
        """
        size = self.q_ref.shape[0]
        most = size if size % _TOGETHER else _TOGETHER
        slices = []
        for at in range(0, size, most):
            rows = slice(at, at + most)
            before_1R, total_1R = running[0][:, rows], running[1][:, rows]
            logits_XR = self.logits(keys_XK, mask_XR, rows)
            largest_1R = jnp.maximum(before_1R, jnp.max(logits_XR, axis=0, keepdims=True))
            added_1R = jnp.sum(jnp.exp2(logits_XR - largest_1R), axis=0, keepdims=True)
            total_1R = total_1R * jnp.exp2(before_1R - largest_1R) + added_1R
            slices.append((logits_XR, largest_1R, total_1R))
        logits, largest, total = (jnp.concatenate(x, axis=1) for x in zip(*slices, strict=True))
        return logits, (largest, total)

    def pull(
        self,
        keys_XK: Float[Array, "X K"],
        logits_XR: Float32[Array, "X R"],
        log_total_1R: Float32[Array, "1 R"],
    ) -> tuple[Float32[Array, "R K"], Float32[Array, "X K"]]:
        """These keys' part of the queries' gradient, and the gradient of the keys."""
        weights_XR = jnp.exp2(logits_XR - log_total_1R)
        towards_XR = contract(keys_XK, self.grad_ref[...], 1, 1) - self.delta_1R
        slopes_XR = (weights_XR * towards_XR * self.scale).astype(keys_XK.dtype)
        keys_grad_XK = contract(weights_XR.astype(keys_XK.dtype), self.grad_ref[...], 1, 0)
        keys_grad_XK += contract(slopes_XR, self.q_ref[...], 1, 0)
        return contract(slopes_XR, keys_XK, 0, 0), keys_grad_XK


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Entries of the pool, E at a time; the last step reaches back to stay inside the pool."""

    sizes: Sizes
    visibility: Visibility
    rows: _Rows
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch

    def start(self, e: Any) -> Any:
        if self.sizes.entries == self.sizes.width:
            return 0
        last = self.sizes.entries - self.sizes.width
        return pl.multiple_of(jnp.minimum(e * self.sizes.width, last), 16)

    def read(self, e: Any) -> tuple[Float[Array, "E K"], Bool[Array, "E R"]]:
        """The entries of a step, and which of them each row sees."""
        start, width = self.start(e), self.sizes.width
        query_1R = self.inputs.query[...]
        any_E1, mask_ER = self.visibility.masks(
            self.inputs.visible, self.scratch.visible, query_1R, start, width
        )
        if self.sizes.entries % width:
            index_E1 = start + jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0)
            mask_ER &= index_E1 >= e * width
        return where_seen(self.inputs.pool[pl.ds(start, width)], any_E1), mask_ER

    def measure(self, e: Any, running: Any) -> Any:
        logits_ER, running = self.rows.measure(*self.read(e), running)
        if self.scratch.logits is not None:
            self.scratch.logits[e] = logits_ER
        return running

    def pull(self, e: Any, log_total_1R: Any) -> Any:
        """Add to the gradients of queries and pool; the loop carries `log_total_1R` unchanged."""
        keys_EK, mask_ER = self.read(e)
        saved = self.scratch.logits
        logits_ER = self.rows.logits(keys_EK, mask_ER) if saved is None else saved[e]
        q_grad_RK, keys_grad_EK = self.rows.pull(keys_EK, logits_ER, log_total_1R)
        self.scratch.q[...] += q_grad_RK
        self.outputs.pool[pl.ds(self.start(e), self.sizes.width)] += keys_grad_EK
        return log_total_1R


def _row_sums(a_ref: Any, b_ref: Any) -> Float32[Array, "1 R"]:
    """Sums over the channels of a * b, as a row of lanes."""
    x_RK = a_ref[...].astype(jnp.float32) * b_ref[...].astype(jnp.float32)
    if x_RK.shape[1] % LANES == 0:
        parts = [x_RK[:, at : at + LANES] for at in range(0, x_RK.shape[1], LANES)]
        x_RK = functools.reduce(jnp.add, parts)
    return jnp.sum(x_RK.T, axis=0, keepdims=True)


def _window_keys(
    inputs: Inputs, first: Any, start: Any, window: int
) -> tuple[Float[Array, "Y K"], Bool[Array, "Y R"]]:
    """The block's window, and which of its keys each row sees.

    Key y is at position start - window + first + y; query j of the block sees j < y <= j + window.
    """
    query_1R = inputs.query[...]
    y_Y1 = jax.lax.broadcasted_iota(jnp.int32, (inputs.window.shape[0], 1), 0)
    exists_Y1 = y_Y1 >= jnp.maximum(window - start - first, 1)
    mask_YR = (y_Y1 > query_1R) & (y_Y1 <= query_1R + window) & exists_Y1
    seen_Y1 = exists_Y1 & (y_Y1 <= jnp.max(query_1R) + window)
    if inputs.low is not None:
        mask_YR &= first + y_Y1 >= inputs.low[...]
        seen_Y1 = any_row_sees(mask_YR)
    return where_seen(inputs.window[...], seen_Y1), mask_YR


def lowest_key(
    first_BT: Int[Array, "B T"], start_B: Int[Array, " B"], window: int
) -> Int[Array, "B T"]:
    """The first key of a chunk's window that each query may see; key e is at start - window + e."""
    start_B1 = start_B.astype(jnp.int32)[:, None]
    # At most the chunk's end, so that nothing overflows.
    first_BT = jnp.clip(first_BT.astype(jnp.int32), 0, start_B1 + first_BT.shape[1])
    return jnp.maximum(first_BT - start_B1 + window, 0)


def any_row_sees(mask_XR: Bool[Array, "X R"]) -> Bool[Array, "X 1"]:
    return jnp.max(mask_XR.astype(jnp.int32), axis=1, keepdims=True) > 0


def where_seen(keys_XK: Float[Array, "X K"], seen_X1: Bool[Array, "X 1"]) -> Float[Array, "X K"]:
    """Keep garbage out of products: 0 * NaN is NaN."""
    return jnp.where(seen_X1, keys_XK, jnp.zeros((), keys_XK.dtype))


def _clear(ref: Any) -> None:
    ref[...] = jnp.zeros_like(ref)
