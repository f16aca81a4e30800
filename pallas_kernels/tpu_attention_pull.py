"""The gradient of attention for one block of queries, inside a kernel.

The logarithm of the sum of a row's weights is found first; then the gradient is pulled back through
one block of keys after the other (`softmax.pull` has the formulas). Logits are computed anew and
never leave the chip; they are to base 2, which the chip's exponential is.

Keys are rows here and queries columns, so that what belongs to a query is a row of lanes, and only
one of the five products needs a transpose.

Axis letters: as in `tpu_attention_backward`; E entries of a step, X keys of any kind.
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

LOG2_E = math.log2(math.e)
ENTRIES = 512
# So many entries go with the window: a step of few keys costs as much as one of many.
FEW = 256
_LANES = 128
_TOGETHER = 512
_ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Which entries of the pool the rows of a block see.

    Attributes:
      array: [B, N, _, _], what tells; a block [_, _] of it is at hand.
      scratch: shapes of what `begin` fills.
      begin: takes the block and the scratch; returns 1 + the last entry that any row sees.
      of: takes the block, the scratch, the query of each row [1, R], the first of some entries and
        their count E; returns which of them any row sees [E, 1], and which each row sees [E, R].
      skip: takes the block; returns the first entry that any row sees. None: 0.
    """

    array: Any
    scratch: tuple[Any, ...]
    begin: Callable[..., Any]
    of: Callable[..., tuple[Any, Any]]
    skip: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a chunk.

    Attributes:
      block: queries of a block, Q.
      heads: of a query.
      blocks: N.
      group: blocks of a group.
      parts: P; they take groups in turn.
      window: tokens that a query sees.
      near: keys of a block's window, Y.
      entries: room in the pool, S, or 0.
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
        return self.block * self.heads

    @property
    def width(self) -> int:
        """Entries of a step, E."""
        return min(ENTRIES, self.entries)

    @property
    def groups(self) -> int:
        return pl.cdiv(self.blocks, self.group)

    @property
    def group_keys(self) -> int:
        """A."""
        return (self.group - 1) * self.block + self.near

    def at(self, part: Any, step: Any) -> Any:
        """The block that a part takes in a step."""
        turn, place = jax.lax.div(step, self.group), jax.lax.rem(step, self.group)
        return (turn * self.parts + part) * self.group + place


class Inputs(NamedTuple):
    """Arrays, their blocks' specs, or refs; sink is to base 2, query that of each row."""

    q: Any  # [R, K]
    grad: Any  # [R, K]
    out: Any  # [R, K]
    sink: Any  # [1, R]
    query: Any  # [1, R]
    window: Any  # [Y, K]
    low: Any  # [1, R], the first key of the chunk's window that each row may see, or None: 0
    seen: Any  # a block of `Seen.array`
    pool: Any  # [S, K]; None without a pool, as `seen`


class Outputs(NamedTuple):
    """Gradients; those of window, pool and sink are to be added up."""

    q: Any  # [R, K]
    window: Any  # [A, K] float32
    pool: Any  # [S, K] float32
    sink: Any  # [1, R] float32


class Scratch(NamedTuple):
    """What a block needs."""

    q: Any  # [R, K] float32, the sum of its gradient
    logits: Any  # [_, E, R], those of the pool; None: they are computed twice
    seen: Any


def kernel(
    layer_1: Any,
    start_B: Any,
    inputs: Inputs,
    outputs: Outputs,
    scratch: Scratch,
    *,
    sizes: Sizes,
    seen: Seen | None,
    scale: float,
) -> None:
    """A grid step: part, row of the batch, block."""
    part, b, step = (pl.program_id(axis) for axis in range(3))
    first = sizes.at(part, step) * sizes.block
    pl.when(jax.lax.rem(step, sizes.group) == 0)(lambda: _clear(outputs.window))
    rows = _Rows(inputs.q, inputs.grad, _row_sums(inputs.grad, inputs.out), scale)
    keys_XK, mask_XR = _near(inputs, first, start_B[b], sizes.window)
    pool = None if seen is None else _Pool(sizes, seen, rows, inputs, outputs, scratch)
    far = pool if sizes.entries > FEW else None
    begin, steps = 0, 0
    if pool is not None:
        pl.when(step == 0)(lambda: _clear(outputs.pool))
        end = pool.seen.begin(inputs.seen, scratch.seen)
        steps = jax.lax.div(end + sizes.width - 1, sizes.width)
        if pool.seen.skip is not None:
            begin = jax.lax.div(pool.seen.skip(inputs.seen), sizes.width)
        if far is None:
            more_EK, more_ER = pool.read(0)
            keys_XK = jnp.concatenate([keys_XK, more_EK])
            mask_XR = jnp.concatenate([mask_XR, more_ER])

    sink = inputs.sink[...], jnp.ones(inputs.sink.shape, jnp.float32)
    logits_XR, whole = rows.measure(keys_XK, mask_XR, sink)
    if far is not None:
        whole = jax.lax.fori_loop(begin, steps, far.measure, whole)
    log_total_1R = whole[0] + jnp.log2(whole[1])

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
    """What a block's rows bring to each set of keys."""

    q_ref: Any
    grad_ref: Any
    delta_1R: Any  # gradient . output
    scale: float

    def logits(
        self, keys_XK: Float[Array, "X K"], mask_XR: Bool[Array, "X R"], rows: slice = _ALL
    ) -> Float32[Array, "X _"]:
        """To base 2."""
        logits_XR = _dot(keys_XK, self.q_ref[rows], 1, 1) * (self.scale * LOG2_E)
        return jnp.where(mask_XR[:, rows], logits_XR, -jnp.inf)

    def measure(
        self, keys_XK: Float[Array, "X K"], mask_XR: Bool[Array, "X R"], whole: Any
    ) -> tuple[Float32[Array, "X R"], Any]:
        """Logits; and the largest and the sum of weights [1, R], with those of more keys.

        Some rows at a time, so that the products of the next can run beside the weights of these.
        """
        size = self.q_ref.shape[0]
        most = size if size % _TOGETHER else _TOGETHER
        found = []
        for at in range(0, size, most):
            rows = slice(at, at + most)
            before_1R, total_1R = whole[0][:, rows], whole[1][:, rows]
            logits_XR = self.logits(keys_XK, mask_XR, rows)
            largest_1R = jnp.maximum(before_1R, jnp.max(logits_XR, axis=0, keepdims=True))
            added_1R = jnp.sum(jnp.exp2(logits_XR - largest_1R), axis=0, keepdims=True)
            total_1R = total_1R * jnp.exp2(before_1R - largest_1R) + added_1R
            found.append((logits_XR, largest_1R, total_1R))
        logits, largest, total = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
        return logits, (largest, total)

    def pull(
        self,
        keys_XK: Float[Array, "X K"],
        logits_XR: Float32[Array, "X R"],
        log_total_1R: Float32[Array, "1 R"],
    ) -> tuple[Float32[Array, "R K"], Float32[Array, "X K"]]:
        """Gradients of the rows' queries from these keys, and of the keys."""
        weights_XR = jnp.exp2(logits_XR - log_total_1R)
        towards_XR = _dot(keys_XK, self.grad_ref[...], 1, 1) - self.delta_1R
        slopes_XR = (weights_XR * towards_XR * self.scale).astype(keys_XK.dtype)
        keys_grad_XK = _dot(weights_XR.astype(keys_XK.dtype), self.grad_ref[...], 1, 0)
        keys_grad_XK += _dot(slopes_XR, self.q_ref[...], 1, 0)
        return _dot(slopes_XR, keys_XK, 0, 0), keys_grad_XK


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Entries of the pool, E at a time; the last ones reach back to stay inside."""

    sizes: Sizes
    seen: Seen
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
        """Entries and which of them each row sees."""
        start, width = self.start(e), self.sizes.width
        query_1R = self.inputs.query[...]
        any_E1, mask_ER = self.seen.of(self.inputs.seen, self.scratch.seen, query_1R, start, width)
        if self.sizes.entries % width:
            index_E1 = start + jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0)
            mask_ER &= index_E1 >= e * width
        return _where_seen(self.inputs.pool[pl.ds(start, width)], any_E1), mask_ER

    def measure(self, e: Any, whole: Any) -> Any:
        logits_ER, whole = self.rows.measure(*self.read(e), whole)
        if self.scratch.logits is not None:
            self.scratch.logits[e] = logits_ER
        return whole

    def pull(self, e: Any, log_total_1R: Any) -> Any:
        """Add to the gradients of queries and pool; what it takes is returned for the next."""
        keys_EK, mask_ER = self.read(e)
        kept = self.scratch.logits
        logits_ER = self.rows.logits(keys_EK, mask_ER) if kept is None else kept[e]
        q_grad_RK, keys_grad_EK = self.rows.pull(keys_EK, logits_ER, log_total_1R)
        self.scratch.q[...] += q_grad_RK
        self.outputs.pool[pl.ds(self.start(e), self.sizes.width)] += keys_grad_EK
        return log_total_1R


def _dot(a: Any, b: Any, a_dim: int, b_dim: int) -> Float32[Array, "_ _"]:
    contract = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _row_sums(a_ref: Any, b_ref: Any) -> Float32[Array, "1 R"]:
    """Of products, as a row of lanes."""
    x_RK = a_ref[...].astype(jnp.float32) * b_ref[...].astype(jnp.float32)
    if x_RK.shape[1] % _LANES == 0:
        parts = [x_RK[:, at : at + _LANES] for at in range(0, x_RK.shape[1], _LANES)]
        x_RK = functools.reduce(jnp.add, parts)
    return jnp.sum(x_RK.T, axis=0, keepdims=True)


def _near(
    inputs: Inputs, first: Any, start: Any, window: int
) -> tuple[Float[Array, "Y K"], Bool[Array, "Y R"]]:
    """Key y is at start - window + first + y; query j of the block sees j < y <= j + window."""
    query_1R = inputs.query[...]
    y_Y1 = jax.lax.broadcasted_iota(jnp.int32, (inputs.window.shape[0], 1), 0)
    exists_Y1 = y_Y1 >= jnp.maximum(window - start - first, 1)
    mask_YR = (y_Y1 > query_1R) & (y_Y1 <= query_1R + window) & exists_Y1
    seen_Y1 = exists_Y1 & (y_Y1 <= jnp.max(query_1R) + window)
    if inputs.low is not None:
        mask_YR &= first + y_Y1 >= inputs.low[...]
        seen_Y1 = by_any(mask_YR)
    return _where_seen(inputs.window[...], seen_Y1), mask_YR


def lowest(
    first_BT: Int[Array, "B T"], start_B: Int[Array, " B"], window: int
) -> Int[Array, "B T"]:
    """The first key of a chunk's window that may be seen; key e is at start - window + e."""
    start_B1 = start_B.astype(jnp.int32)[:, None]
    # Before the chunk's end, so that nothing overflows.
    first_BT = jnp.clip(first_BT.astype(jnp.int32), 0, start_B1 + first_BT.shape[1])
    return jnp.maximum(first_BT - start_B1 + window, 0)


def by_any(mask_XR: Bool[Array, "X R"]) -> Bool[Array, "X 1"]:
    return jnp.max(mask_XR.astype(jnp.int32), axis=1, keepdims=True) > 0


def _where_seen(keys_XK: Float[Array, "X K"], seen_X1: Bool[Array, "X 1"]) -> Float[Array, "X K"]:
    """Garbage must not reach a product: 0 * NaN is NaN."""
    return jnp.where(seen_X1, keys_XK, jnp.zeros((), keys_XK.dtype))


def _clear(ref: Any) -> None:
    ref[...] = jnp.zeros_like(ref)
