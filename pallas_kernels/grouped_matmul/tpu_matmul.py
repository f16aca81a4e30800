"""A matmul of sorted rows with their experts' matrices on TPUs, read from whole stacks.

The grid goes through blocks of output channels, and within each through the plan's steps: while
the expert stays, so does its block, dequantised once. All input channels are in a block.

Axis letters: P sorted rows, I input channels, O output channels, M tiles, R rows of a tile,
W output channels of a block; of a weight's stack L layers, E experts, [N, K] the matrix.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import lora, tpu_weights
from pallas_kernels.grouped_matmul.plan import Plan
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import in_hbm

_VMEM_BYTES = 56 * 2**20
_BLOCK_BYTES = {True: 9 * 2**19, False: 8 * 2**20}  # of a step's weights, by whether rows are few
_HELD_BYTES = 36 * 2**20  # of two steps' weights and what is dequantised
_MOST_BYTES = 52 * 2**20  # of these and two steps' rows


@dataclasses.dataclass(frozen=True)
class Term:
    """Rows times the transpose of a matrix [N, K], or times the matrix.

    Attributes:
      rows: which of the arrays of rows.
      weight: [L, E, N, K] in any format.
      total: the sum that it is part of.
      transposed: times the matrix: N are the input channels.
    """

    rows: int
    weight: Any
    total: int = 0
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.weight.shape[3 if self.transposed else 2]

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.weight.shape[2 if self.transposed else 3]


# (sums [R, W] in float32, the row's number [R, 1]) -> what to write [R, W], what to sum up [R, W].
Finish = Callable[[Sequence[Array], Array], tuple[Sequence[Array], Array | None]]


def grouped(
    plan: Plan,
    layer: Int[Array, ""],
    rows: Sequence[Array],
    terms: Sequence[Term],
    *,
    name: str,
    finish: Finish = lambda sums, _: (sums, None),
    number_M1R: Float[Array, "M 1 R"] | None = None,
    outputs: int = 1,
    summed: bool = False,
) -> list[Array]:
    """The terms' sums per row with the row's expert; rows without one hold anything.

    Args:
      plan: rows and steps.
      layer: of the stacks.
      rows: arrays [P, I] of sorted rows, whole tiles.
      terms: they give equally many channels.
      name: the kernel's.
      finish: what becomes of the sums.
      number_M1R: a number per row for it.
      outputs: how many arrays it gives.
      summed: whether it gives something to sum over the output channels.

    Returns:
      Arrays [P, O] in the dtype of the rows, then the sums [M, 1, R].
    """
    O, R, dtype = terms[0].outputs, plan.rows, rows[0].dtype
    W, held = _columns(terms, R, dtype.itemsize)
    if held + 2 * R * dtype.itemsize * sum(x.shape[1] for x in rows) > _MOST_BYTES:
        raise Unsupported(f"The TPU form has no room for {name} with rows of {rows[0].shape[1]}.")
    number_M1R = jnp.zeros((plan.tiles, 1, R), jnp.float32) if number_M1R is None else number_M1R
    reader = tpu_weights.Reader(plan, layer, W, dtype)
    weights = [reader.form(t.weight, t.transposed) for t in terms]
    row = lambda width: pl.BlockSpec((R, width), lambda n, s, l, e, t, *_: (t[s], 0))
    out_specs, out_shape = _written(plan, O, W, dtype, outputs, summed=summed)
    totals = 1 + max(t.total for t in terms)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(O // W, plan.steps),
        in_specs=[
            pl.BlockSpec((None, 1, R), lambda n, s, l, e, t, *_: (t[s], 0, 0)),
            [row(x.shape[1]) for x in rows],
            [w.specs for w in weights],
        ],
        out_specs=out_specs,
        scratch_shapes=[[pltpu.VMEM((R, W), jnp.float32)] * totals, [w.scratch for w in weights]],
    )
    got = pl.pallas_call(
        functools.partial(_step, terms=terms, forms=weights, finish=finish),
        grid_spec=spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name=name,
    )(
        layer.reshape(1).astype(jnp.int32),
        plan.expert_S,
        plan.tile_S,
        plan.low_S,
        plan.high_S,
        number_M1R,
        list(rows),
        in_hbm([w.arrays for w in weights]),
    )
    return [*got[:-1], jnp.sum(got[-1], axis=0)] if summed else list(got)


def _written(
    plan: Plan, width: int, block: int, dtype: Any, outputs: int, *, summed: bool
) -> tuple[list[Any], list[Any]]:
    """Blocks and shapes of what `grouped` gives, sums last: one for each block of columns."""
    R = plan.rows
    column = pl.BlockSpec((R, block), lambda n, s, l, e, t, *_: (t[s], n))
    specs: list[Any] = [column] * outputs
    shapes = [jax.ShapeDtypeStruct((plan.tiles * R, width), dtype)] * outputs
    if summed:
        index = lambda n, s, l, e, t, *_: (n, t[s], 0, 0)
        specs.append(pl.BlockSpec((None, None, 1, R), index))
        shapes.append(jax.ShapeDtypeStruct((width // block, plan.tiles, 1, R), jnp.float32))
    return specs, shapes


class Products:
    """Sums of products to be made by one kernel, low-rank updates by kernels before it."""

    def __init__(self, plan: Plan, layer: Int[Array, ""]) -> None:
        self.plan, self.layer = plan, layer
        self.rows: list[Array] = []
        self.terms: list[Term] = []

    def take(self, x_PI: Float[Array, "P I"]) -> int:
        """Give it rows; returns how to name them."""
        self.rows.append(x_PI)
        return len(self.rows) - 1

    def add(
        self, rows: int, weight: lora.Weight, total: int, *, transposed: bool = False
    ) -> Array | None:
        """A term, as `Term`; returns the rows in the middle of a low-rank update."""
        if not isinstance(weight, lora.LoraWeight):
            self.terms.append(Term(rows, weight, total, transposed))
            return None
        low_Pr = self.low_rank(self.rows[rows], weight, transposed=transposed)
        self.terms.append(Term(rows, weight.base, total, transposed))
        second = weight.a if transposed else _swapped(weight.b)
        self.terms.append(Term(self.take(low_Pr), second, total, transposed=True))
        return low_Pr

    def low_rank(
        self, x_PI: Float[Array, "P I"], weight: lora.LoraWeight, *, transposed: bool = False
    ) -> Float[Array, "P r"]:
        """Rows times the first factor of an update, and its scale."""
        term = Term(0, _swapped(weight.b) if transposed else weight.a)
        scaled = lambda sums, _: ([sums[0] * weight.scale], None)
        return grouped(
            self.plan, self.layer, [x_PI], [term], name="experts_low_rank", finish=scaled
        )[0]

    def run(self, name: str, **settings: Any) -> list[Array]:
        """As `grouped`."""
        return grouped(self.plan, self.layer, self.rows, self.terms, name=name, **settings)


def _swapped(b_LENr: Array) -> Array:
    """The rank before the channels: XLA keeps an array so narrow that way round."""
    return jnp.swapaxes(b_LENr, 2, 3)


def _columns(terms: Sequence[Term], R: int, itemsize: int) -> tuple[int, float]:
    """As many channels as fit, an even number of blocks for chips of two cores; bytes they take."""
    O, few = terms[0].outputs, R <= tpu_weights.FEW
    block = sum(t.inputs * tpu_weights.bytes_each(t.weight) for t in terms)
    quantised = lambda t: not isinstance(t.weight, jax.Array)
    dense = sum(
        t.inputs * itemsize for t in terms if quantised(t) and not (few and not t.transposed)
    )
    most = int(min(_BLOCK_BYTES[few] / block, _HELD_BYTES / (2 * block + dense)))
    unit = max(tpu_weights.unit(t.weight, t.transposed) for t in terms)
    sizes = [size for size in range(unit, O + 1, unit) if O % size == 0]
    even = [size for size in sizes if O // size % 2 == 0] or sizes
    W = max((size for size in even if size <= most), default=even[0] if even else O)
    return W, W * (2 * block + dense)


def _step(
    layer_ref: Any,
    expert_ref: Any,  # [S]
    tile_ref: Any,  # [S]
    low_ref: Any,  # [S]
    high_ref: Any,  # [S]
    number_ref: Any,  # [1, R]
    row_refs: Any,  # [R, I] each
    weight_refs: Any,
    *refs: Any,  # outputs [R, W]; sums [R, W] float32; what the weights keep
    terms: Sequence[Term],
    forms: Sequence[Any],
    finish: Finish,
) -> None:
    *out_refs, sum_refs, kept_refs = refs
    n, s = pl.program_id(0), pl.program_id(1)
    new = (s == 0) | (expert_ref[s] != expert_ref[jnp.maximum(s - 1, 0)])
    for form, weight, kept in zip(forms, weight_refs, kept_refs, strict=True):
        pl.when(new)(functools.partial(form.prepare, weight, kept, n))
    for sum_ref in sum_refs:
        sum_ref[...] = jnp.zeros_like(sum_ref)
    for term, form, weight, kept in zip(terms, forms, weight_refs, kept_refs, strict=True):
        form.add(sum_refs[term.total], row_refs[term.rows], weight, kept)

    R = number_ref.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (R, R), 0)
    diagonal = row == jax.lax.broadcasted_iota(jnp.int32, (R, R), 1)
    number_R1 = jnp.sum(jnp.where(diagonal, number_ref[...], 0.0), axis=1, keepdims=True)
    outputs, to_sum = finish([sum_ref[...] for sum_ref in sum_refs], number_R1)
    ours = lambda row: (row >= low_ref[s]) & (row < high_ref[s])
    for out_ref, out in zip(out_refs, outputs, strict=False):
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        kept = jnp.where(ours(row), out, out_ref[...].astype(jnp.float32))
        out_ref[...] = kept.astype(out_ref.dtype)
    if to_sum is not None:
        column = jnp.sum(to_sum, axis=1, keepdims=True)
        line = jnp.sum(jnp.where(diagonal, column, 0.0), axis=0, keepdims=True)
        row = jax.lax.broadcasted_iota(jnp.int32, line.shape, 1)
        out_refs[-1][...] = jnp.where(ours(row), line, out_refs[-1][...])
