"""What a grouped kernel on TPUs reads of a weight in each format, and how it multiplies by it.

Few rows are bound by the codes' bytes and their conversion: the products of each block are
multiplied by its scale, not the weights. Many rows dequantise a block once per expert.

Axis letters: R rows of a tile, I input channels, W output channels of a block; of a weight's stack
L layers, E experts, [N, K] the matrix.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul.plan import Plan
from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize import Fp4Weight, Fp8Weight, tpu_codes
from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK

FEW = 16  # rows of a tile up to which products are scaled
_GROUP = FP8_BLOCK // FP4_BLOCK  # blocks of FP4 that one product takes


@dataclasses.dataclass(frozen=True)
class Form:
    """A weight as the kernel takes it.

    Attributes:
      arrays: the stacks.
      specs: the blocks of a step.
      scratch: what is kept while the expert stays.
      prepare: (weights' refs, scratch, block of output channels) fills it.
      add: (sum [R, W], rows [R, I], weights' refs, scratch) adds the product.
    """

    arrays: list[Array]
    specs: list[Any]
    scratch: list[Any]
    prepare: Callable[[Any, Any, Any], None]
    add: Callable[[Any, Any, Any, Any], None]


def bytes_each(w: Any) -> float:
    """Bytes of one weight."""
    if isinstance(w, Fp4Weight):
        return 0.5 + 1 / FP4_BLOCK
    return 1.0 if isinstance(w, Fp8Weight) else float(w.dtype.itemsize)


def unit(w: Any, transposed: bool) -> int:
    """Blocks of output channels count in these."""
    return 256 if isinstance(w, Fp4Weight) and transposed else 128


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes forms for one kernel.

    Attributes:
      plan: rows and steps.
      layer: of the stacks.
      W: output channels of a block.
      dtype: the rows'.
    """

    plan: Plan
    layer: Array
    W: int
    dtype: Any

    def form(self, w: Any, transposed: bool) -> Form:
        """How to read and multiply by a stack [L, E, N, K]; `transposed` as in `Term`."""
        if not isinstance(w, Fp8Weight | Fp4Weight):
            spec = _spec(w, 0 if transposed else self.W, self.W if transposed else 0)
            add = lambda total, x, refs, _: _add(total, x, refs[0], 0 if transposed else 1)
            return Form([w], [spec], [], lambda *_: None, add)
        few = self.plan.rows <= FEW and not transposed
        if isinstance(w, Fp8Weight):
            return (self._fp8_few if few else self._fp8_many)(w, transposed)
        return (self._fp4_few if few else self._fp4_many)(w, transposed)

    def _codes_spec(self, w: Any, transposed: bool) -> Any:
        packed = w.shape[3] // w.codes.shape[2]
        return _spec(w.codes, self.W // packed if transposed else 0, 0 if transposed else self.W)

    def _fp8_scale(self, w: Fp8Weight) -> tuple[Array, Any]:
        """Each step's expert's: in the stack, such small matrices lie as kernels cannot read."""
        # The layer first: from a whole stack, XLA would gather after a copy of it.
        scale_E = jax.lax.dynamic_index_in_dim(w.scale, self.layer, keepdims=False)
        scale_S = scale_E[self.plan.expert_S]
        return scale_S, pl.BlockSpec((None, *scale_S.shape[1:]), lambda n, s, *_: (s, 0, 0))

    def _fp8_few(self, w: Fp8Weight, transposed: bool) -> Form:
        scale_S, scale_spec = self._fp8_scale(w)
        keeps, blocks = tpu_codes.keeps_e4m3(), self.W // FP8_BLOCK
        return Form(
            [w.codes, scale_S],
            [self._codes_spec(w, transposed), scale_spec],
            [pltpu.VMEM((scale_S.shape[1], self.W), jnp.float32)],
            lambda refs, kept, n: _spread(refs[1], kept[0], n * blocks, keeps),
            lambda total, x, refs, kept: _add_fp8_products(total, x, refs[0], kept[0], keeps),
        )

    def _fp8_many(self, w: Fp8Weight, transposed: bool) -> Form:
        if transposed and _divisor(w.shape[2], 512) == FP8_BLOCK < w.shape[2]:
            raise Unsupported(f"The TPU form's gradients do not take {w.shape[2]} FP8 channels.")
        scale_S, scale_spec = self._fp8_scale(w)
        keeps, blocks = tpu_codes.keeps_e4m3(), self.W // FP8_BLOCK
        shape = (self.W, w.shape[2]) if transposed else (w.shape[3], self.W)

        def prepare(refs: Any, kept: Any, n: Any) -> None:
            row, column = (n * blocks, 0) if transposed else (0, n * blocks)
            _spread(refs[1], kept[1], column, keeps)
            _dequantise_fp8(refs[0], kept[1], kept[0], row, keeps)

        return Form(
            [w.codes, scale_S],
            [self._codes_spec(w, transposed), scale_spec],
            [pltpu.VMEM(shape, self.dtype), pltpu.VMEM((scale_S.shape[1], shape[1]), jnp.float32)],
            prepare,
            lambda total, x, _, kept: _add(total, x, kept[0], 1 if transposed else 0),
        )

    def _fp4_few(self, w: Fp4Weight, transposed: bool) -> Form:
        return Form(
            [w.codes, w.scale],
            [self._codes_spec(w, transposed), _spec(w.scale, 0, self.W)],
            [],
            lambda *_: None,
            lambda total, x, refs, _: _add_fp4_products(total, x, refs[0], refs[1]),
        )

    def _fp4_many(self, w: Fp4Weight, transposed: bool) -> Form:
        """Transposed, a block's scales are too few rows for a block of their own: all are read."""
        shape = (self.W, w.shape[2]) if transposed else (w.shape[3], self.W)
        wide = (w.scale.shape[2], shape[1])

        def prepare(refs: Any, kept: Any, n: Any) -> None:
            dense, wide = kept
            wide[...] = tpu_codes.scale_values(refs[1][...]) * tpu_codes.E2M1_UNIT
            row = pl.multiple_of(n * (self.W // FP4_BLOCK), self.W // FP4_BLOCK)
            _dequantise_fp4(refs[0], wide, dense, row if transposed else 0)

        return Form(
            [w.codes, w.scale],
            [self._codes_spec(w, transposed), _spec(w.scale, 0, 0 if transposed else self.W)],
            [pltpu.VMEM(shape, self.dtype), pltpu.VMEM(wide, jnp.float32)],
            prepare,
            lambda total, x, _, kept: _add(total, x, kept[0], 1 if transposed else 0),
        )


def _spec(stack: Array, rows: int, columns: int) -> Any:
    """Blocks along one of a matrix's dims, of this size; 0 stands for the whole of a dim."""
    block = (None, None, rows or stack.shape[2], columns or stack.shape[3])

    def index(n: Any, s: Any, layer: Any, expert: Any, *_: Any) -> Any:
        return layer[0], expert[s], n if rows else 0, n if columns else 0

    return pl.BlockSpec(block, index)


def _divisor(extent: int, most: int) -> int:
    """The largest that counts whole 128s, or the whole extent."""
    sizes = range(most, 0, -128)
    return next((size for size in sizes if extent % size == 0), extent)


def _over(extent: int, step: int, run: Callable[[Any], None]) -> None:
    """`run` at 0, step, 2 step, ..."""
    if extent == step:
        run(0)
    else:
        body = lambda i, _: run(pl.multiple_of(i * step, step))
        jax.lax.fori_loop(0, extent // step, body, None)


def _over_chunks(rows: int, columns: int, run: Callable[[Any, Any, int, int], None]) -> None:
    """Codes in chunks small enough to unroll: (first row, first column, rows, columns)."""
    ck = 1024 if rows % 1024 == 0 else rows
    cn = _divisor(columns, 512)
    _over(columns, cn, lambda n: _over(rows, ck, lambda k: run(k, n, ck, cn)))


def _dot(x: Array, w: Array, dim: int = 0) -> Array:
    """Over `dim` of w."""
    dims = (((1,), (dim,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)


def _add(total_ref: Any, x_ref: Any, w_ref: Any, dim: int) -> None:
    step = _divisor(x_ref.shape[1], 1024)

    def run(k: Any) -> None:
        at = pl.ds(k, step)
        w = w_ref[:, at] if dim else w_ref[at, :]
        total_ref[...] += _dot(x_ref[:, at], w, dim)

    _over(x_ref.shape[1], step, run)


def _add_fp8_products(
    total_ref: Any, x_ref: Any, codes_ref: Any, wide_ref: Any, keeps: bool
) -> None:
    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        total = total_ref[:, columns]
        scale = wide_ref[_part(k, ck, FP8_BLOCK), columns]
        for b in range(ck // FP8_BLOCK):
            at = _part(k + b * FP8_BLOCK, FP8_BLOCK)
            values = tpu_codes.e4m3_values(codes_ref[at, columns], keeps)
            total += _dot(x_ref[:, at], values) * scale[b : b + 1]
        total_ref[:, columns] = total

    _over_chunks(codes_ref.shape[0], codes_ref.shape[1], chunk)


def _add_fp4_products(total_ref: Any, x_ref: Any, codes_ref: Any, scale_ref: Any) -> None:
    """The rows are repeated per block of 32, zero in other blocks: one product sums each apart."""
    R = x_ref.shape[0]

    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        total = total_ref[:, columns]
        scale = _fp4_scale(scale_ref, k, columns, ck)
        for b in range(ck // FP8_BLOCK):
            packed = _part(k + b * FP8_BLOCK, FP8_BLOCK, 2)
            values = tpu_codes.e2m1_values(codes_ref[packed, columns])
            x = x_ref[:, _part(k + b * FP8_BLOCK, FP8_BLOCK)]
            block = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1), FP4_BLOCK)
            apart = [jnp.where(block == i, x, jnp.zeros_like(x)) for i in range(_GROUP)]
            products = _dot(jnp.concatenate(apart), values)
            for i in range(_GROUP):
                row = b * _GROUP + i
                total += products[i * R : (i + 1) * R] * scale[row : row + 1]
        total_ref[:, columns] = total

    _over_chunks(x_ref.shape[1], codes_ref.shape[1], chunk)


def _part(start: Any, size: int, per: int = 1) -> Any:
    """So many channels, of which a row holds `per`; `start` is a multiple of `size`."""
    if isinstance(start, int):
        return pl.ds(start // per, size // per)
    return pl.ds(pl.multiple_of(jax.lax.div(start, per), size // per), size // per)


def _fp4_scale(scale_ref: Any, k: Any, columns: Any, ck: int) -> Array:
    scale = scale_ref[_part(k, ck, FP4_BLOCK), columns]
    return tpu_codes.scale_values(scale) * tpu_codes.E2M1_UNIT


def _spread(scale_ref: Any, wide_ref: Any, first: Any, keeps: bool) -> None:
    """Scales in float32, each repeated for the 128 columns of its block, from block `first` on."""
    scale = tpu_codes.scale_values(scale_ref[...]) * tpu_codes.e4m3_unit(keeps)
    cn = _divisor(wide_ref.shape[1], 512)
    for n in range(0, wide_ref.shape[1], cn):
        wide_ref[:, n : n + cn] = tpu_codes.spread(scale, first + n // FP8_BLOCK, cn)


def _dequantise_fp8(codes_ref: Any, wide_ref: Any, dense_ref: Any, row: Any, keeps: bool) -> None:
    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        for b in range(ck // FP8_BLOCK):
            at = _part(k + b * FP8_BLOCK, FP8_BLOCK)
            scale = wide_ref[pl.ds(row + _part(k, ck, FP8_BLOCK).start + b, 1), columns]
            values = tpu_codes.e4m3_values(codes_ref[at, columns], keeps).astype(jnp.float32)
            dense_ref[at, columns] = (values * scale).astype(dense_ref.dtype)

    _over_chunks(codes_ref.shape[0], codes_ref.shape[1], chunk)


def _dequantise_fp4(codes_ref: Any, wide_ref: Any, dense_ref: Any, first: Any) -> None:
    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        # Powers of two are exact in bfloat16.
        rows = pl.ds(first + _part(k, ck, FP4_BLOCK).start, ck // FP4_BLOCK)
        scale = wide_ref[rows, columns].astype(jnp.bfloat16)
        for b in range(ck // FP8_BLOCK):
            packed = _part(k + b * FP8_BLOCK, FP8_BLOCK, 2)
            values = tpu_codes.e2m1_values(codes_ref[packed, columns])
            for i in range(_GROUP):
                row = b * _GROUP + i
                part = values[i * FP4_BLOCK : (i + 1) * FP4_BLOCK] * scale[row : row + 1]
                at = _part(k + row * FP4_BLOCK, FP4_BLOCK)
                dense_ref[at, columns] = part.astype(dense_ref.dtype)

    _over_chunks(dense_ref.shape[0], dense_ref.shape[1], chunk)
