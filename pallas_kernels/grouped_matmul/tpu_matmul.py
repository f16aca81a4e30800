"""A matmul of sorted rows with their experts' matrices on TPUs, read from the stacks in place.

The grid iterates over blocks of output channels, and within each over the plan's steps: while the
expert stays the same, its block stays in VMEM, dequantised once. A block has all input channels.

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
_BLOCK_BYTES = {True: 9 * 2**19, False: 8 * 2**20}  # a step's weights, by whether rows are few
_HELD_BYTES = 36 * 2**20  # two steps' weights and what is dequantised
_MOST_BYTES = 52 * 2**20  # these and two steps' rows


@dataclasses.dataclass(frozen=True)
class Term:
    """Rows times the transpose of a matrix [N, K], or times the matrix itself.

    Attributes:
      rows: index of the array of rows.
      weight: [L, E, N, K] in any format.
      total: index of the sum that it is added to.
      transposed: whether to multiply by the matrix itself, with N as input channels.
    """

    rows: int
    weight: Any
    total: int = 0
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.weight.shape[3 if self.transposed else 2]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.weight.shape[2 if self.transposed else 3]


# (sums [R, W] in float32, a number per row [R, 1]) -> arrays to write [R, W], one to sum [R, W].
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
    """The sums of the terms per row, with the row's expert; arbitrary for rows without one.

    Args:
      plan: rows and steps.
      layer: index of the layer in the stacks.
      rows: arrays [P, I] of sorted rows, whole tiles.
      terms: products, all with the same number of output channels.
      name: name of the kernel.
      finish: what to write, given the sums.
      number_M1R: a number per row, passed to `finish`.
      outputs: how many arrays `finish` returns.
      summed: whether `finish` also returns something to sum over the output channels.

    Returns:
      Arrays [P, O] in the dtype of the rows, then the sums [M, 1, R] if there are any.
    """
    O, R, dtype = terms[0].outputs, plan.rows, rows[0].dtype
    W = _columns(terms, R, rows, name)
    number_M1R = jnp.zeros((plan.tiles, 1, R), jnp.float32) if number_M1R is None else number_M1R
    reader = tpu_weights.Reader(plan, layer, W, dtype)
    weights = [reader.form(t.weight, t.transposed) for t in terms]
    scalars = layer.reshape(1).astype(jnp.int32), *plan.scalars
    arrays = in_hbm([w.arrays for w in weights])
    out_specs, out_shape = _written(plan, O, W, dtype, outputs, summed=summed)
    totals = 1 + max(t.total for t in terms)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(O // W, plan.steps),
        in_specs=[
            _of_tile((None, 1, R), lambda _, tile: (tile, 0, 0)),
            [_of_tile((R, x.shape[1]), lambda _, tile: (tile, 0)) for x in rows],
            [w.specs for w in weights],
        ],
        out_specs=out_specs,
        scratch_shapes=[[pltpu.VMEM((R, W), jnp.float32)] * totals, [w.scratch for w in weights]],
    )
    results = pl.pallas_call(
        functools.partial(_step, terms=terms, forms=weights, finish=finish),
        grid_spec=spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name=name,
    )(*scalars, number_M1R, list(rows), arrays)
    return [*results[:-1], jnp.sum(results[-1], axis=0)] if summed else list(results)


# A block is copied only when its index changes: consecutive steps on one tile read its rows once,
# and a tile of results stays in VMEM until the last of the experts that share it has written its
# rows.
def _of_tile(block: tuple[int | None, ...], index: Callable[[Any, Any], Any]) -> pl.BlockSpec:
    """A step's block of an array cut into tiles; `index` takes (output channels, tile)."""

    def of_step(
        channels: Any, step: Any, layer_ref: Any, expert_ref: Any, tile_ref: Any, *_: Any
    ) -> Any:
        return index(channels, tile_ref[step])

    return pl.BlockSpec(block, of_step)


def _written(
    plan: Plan, width: int, block: int, dtype: Any, outputs: int, *, summed: bool
) -> tuple[list[Any], list[Any]]:
    """Specs and shapes of what `grouped` writes.

    Sums come last, one per block of output channels: blocks may be on different cores.
    """
    R = plan.rows
    specs: list[Any] = [_of_tile((R, block), lambda channels, tile: (tile, channels))] * outputs
    shapes = [jax.ShapeDtypeStruct((plan.tiles * R, width), dtype)] * outputs
    if summed:
        specs.append(_of_tile((None, None, 1, R), lambda channels, tile: (channels, tile, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((width // block, plan.tiles, 1, R), jnp.float32))
    return specs, shapes


class Products:
    """Sums of products for one kernel to compute, after other kernels for low-rank updates."""

    def __init__(self, plan: Plan, layer: Int[Array, ""]) -> None:
        self.plan, self.layer = plan, layer
        self.rows: list[Array] = []
        self.terms: list[Term] = []

    def add_rows(self, x_PI: Float[Array, "P I"]) -> int:
        """Add an array of rows; returns its index."""
        self.rows.append(x_PI)
        return len(self.rows) - 1

    def add_term(
        self, rows: int, weight: lora.Weight, total: int, *, transposed: bool = False
    ) -> Array | None:
        """Add a `Term`; returns the rows between the factors of a low-rank update."""
        if not isinstance(weight, lora.LoraWeight):
            self.terms.append(Term(rows, weight, total, transposed))
            return None
        low_Pr = self.low_rank(self.rows[rows], weight, transposed=transposed)
        self.terms.append(Term(rows, weight.base, total, transposed))
        second = weight.a if transposed else _swapped(weight.b)
        self.terms.append(Term(self.add_rows(low_Pr), second, total, transposed=True))
        return low_Pr

    def low_rank(
        self, x_PI: Float[Array, "P I"], weight: lora.LoraWeight, *, transposed: bool = False
    ) -> Float[Array, "P r"]:
        """Rows times the first factor of an update and its scale."""
        term = Term(0, _swapped(weight.b) if transposed else weight.a)
        scaled = lambda sums, _: ([sums[0] * weight.scale], None)
        return grouped(
            self.plan, self.layer, [x_PI], [term], name="experts_low_rank", finish=scaled
        )[0]

    def run(self, name: str, **settings: Any) -> list[Array]:
        """Call `grouped` on the rows and terms."""
        return grouped(self.plan, self.layer, self.rows, self.terms, name=name, **settings)


def _swapped(b_LENr: Array) -> Array:
    """The rank before the channels, as XLA lays out such narrow arrays."""
    return jnp.swapaxes(b_LENr, 2, 3)


def _columns(terms: Sequence[Term], R: int, rows: Sequence[Array], name: str) -> int:
    """Channels per block; an even number of blocks, for chips of two cores."""
    O, few, itemsize = terms[0].outputs, R <= tpu_weights.FEW, rows[0].dtype.itemsize
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
    row_bytes = 2 * R * itemsize * sum(x.shape[1] for x in rows)
    if W * (2 * block + dense) + row_bytes > _MOST_BYTES:
        raise Unsupported(
            f"The TPU form has no room in VMEM for {name} with rows of {rows[0].shape[1]}."
        )
    return W


def _step(
    layer_ref: Any,
    expert_ref: Any,  # [S]
    tile_ref: Any,  # [S]
    low_ref: Any,  # [S]
    high_ref: Any,  # [S]
    number_ref: Any,  # [1, R]
    row_refs: Any,  # [R, I] each
    weight_refs: Any,
    *refs: Any,  # outputs [R, W]; sums [R, W] float32; scratch of the weights
    terms: Sequence[Term],
    forms: Sequence[Any],
    finish: Finish,
) -> None:
    *out_refs, sum_refs, scratch_refs = refs
    n, s = pl.program_id(0), pl.program_id(1)
    new_expert = (s == 0) | (expert_ref[s] != expert_ref[jnp.maximum(s - 1, 0)])
    for form, weight, scratch in zip(forms, weight_refs, scratch_refs, strict=True):
        pl.when(new_expert)(functools.partial(form.prepare, weight, scratch, n))
    for sum_ref in sum_refs:
        sum_ref[...] = jnp.zeros_like(sum_ref)
    for term, form, weight, scratch in zip(terms, forms, weight_refs, scratch_refs, strict=True):
        form.add(sum_refs[term.total], row_refs[term.rows], weight, scratch)

    R = number_ref.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (R, R), 0)
    diagonal = row == jax.lax.broadcasted_iota(jnp.int32, (R, R), 1)
    number_R1 = jnp.sum(jnp.where(diagonal, number_ref[...], 0.0), axis=1, keepdims=True)
    outputs, to_sum = finish([sum_ref[...] for sum_ref in sum_refs], number_R1)
    of_expert = lambda row: (row >= low_ref[s]) & (row < high_ref[s])
    for out_ref, out in zip(out_refs, outputs, strict=False):
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        merged = jnp.where(of_expert(row), out, out_ref[...].astype(jnp.float32))
        out_ref[...] = merged.astype(out_ref.dtype)
    if to_sum is not None:
        column = jnp.sum(to_sum, axis=1, keepdims=True)
        line = jnp.sum(jnp.where(diagonal, column, 0.0), axis=0, keepdims=True)
        row = jax.lax.broadcasted_iota(jnp.int32, line.shape, 1)
        out_refs[-1][...] = jnp.where(of_expert(row), line, out_refs[-1][...])
