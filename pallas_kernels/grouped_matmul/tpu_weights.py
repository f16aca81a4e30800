"""What a grouped TPU kernel reads of a weight in each format, and how it multiplies by it.

With few rows, reading and converting the codes is the bottleneck: each block's products are
multiplied by its scale, rather than the weights. With many rows, a block is dequantised once per
expert.

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
from pallas_kernels.quantize import Fp4Weight, Fp8Weight, tpu_codes, tpu_tiles
from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK

FEW = 16  # products are scaled in tiles of up to this many rows
_GROUP = FP8_BLOCK // FP4_BLOCK  # FP4 blocks per product


@dataclasses.dataclass(frozen=True)
class Form:
    """A weight as the kernel reads it.

    Attributes:
      arrays: the stacks.
      specs: a step's blocks of them.
      scratch: buffers kept while the expert stays the same.
      prepare: (refs of `arrays`, scratch, block of output channels) fills the scratch.
      add: (sum [R, W], rows [R, I], refs of `arrays`, scratch) adds the product to the sum.
    """

    arrays: list[Array]
    specs: list[Any]
    scratch: list[Any]
    prepare: Callable[[Any, Any, Any], None]
    add: Callable[[Any, Any, Any, Any], None]


def bytes_each(w: Any) -> float:
    """Bytes per weight."""
    if isinstance(w, Fp4Weight):
        return 0.5 + 1 / FP4_BLOCK
    return 1.0 if isinstance(w, Fp8Weight) else float(w.dtype.itemsize)


def unit(w: Any, transposed: bool) -> int:
    """Blocks of output channels are multiples of this."""
    return 256 if isinstance(w, Fp4Weight) and transposed else 128


@dataclasses.dataclass(frozen=True)
class Reader:
    """Builds the forms of one kernel's weights.

    Attributes:
      plan: rows and steps.
      layer: index of the layer in the stacks.
      W: output channels per block.
      dtype: dtype of the rows.
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
            return self._fp8_few(w) if few else self._fp8_many(w, transposed)
        return self._fp4_few(w) if few else self._fp4_many(w, transposed)

    def _codes_spec(self, w: Any, transposed: bool = False) -> Any:
        packed = w.shape[3] // w.codes.shape[2]
        return _spec(w.codes, self.W // packed if transposed else 0, 0 if transposed else self.W)

    def _fp8_scale(self, w: Fp8Weight) -> tuple[Array, Any]:
        """Each step's expert's scales: kernels cannot read the stack's layout of small matrices."""
        # Slice the layer first: to gather from the entire stack, XLA would copy it.
        scale_E = jax.lax.dynamic_index_in_dim(w.scale, self.layer, keepdims=False)
        scale_S = scale_E[self.plan.expert_S]
        of_step = lambda channels, step, *_: (step, 0, 0)
        return scale_S, pl.BlockSpec((None, *scale_S.shape[1:]), of_step)

    def _fp8_few(self, w: Fp8Weight) -> Form:
        scale_S, scale_spec = self._fp8_scale(w)
        native, blocks = tpu_codes.has_native_e4m3(), self.W // FP8_BLOCK
        return Form(
            [w.codes, scale_S],
            [self._codes_spec(w), scale_spec],
            [pltpu.VMEM((scale_S.shape[1], self.W), jnp.float32)],
            lambda refs, scratch, n: _spread(refs[1], scratch[0], n * blocks, native),
            lambda total, x, refs, scratch: _add_fp8_products(
                total, x, refs[0], scratch[0], native
            ),
        )

    def _fp8_many(self, w: Fp8Weight, transposed: bool) -> Form:
        if transposed and divisor(w.shape[2], 512) == FP8_BLOCK < w.shape[2]:
            raise Unsupported(f"The TPU form's gradients do not take {w.shape[2]} FP8 channels.")
        scale_S, scale_spec = self._fp8_scale(w)
        native, blocks = tpu_codes.has_native_e4m3(), self.W // FP8_BLOCK
        shape = (self.W, w.shape[2]) if transposed else (w.shape[3], self.W)

        def prepare(refs: Any, scratch: Any, n: Any) -> None:
            row, column = (n * blocks, 0) if transposed else (0, n * blocks)
            _spread(refs[1], scratch[1], column, native)
            _dequantise_fp8(refs[0], scratch[1], scratch[0], row, native)

        return Form(
            [w.codes, scale_S],
            [self._codes_spec(w, transposed), scale_spec],
            [pltpu.VMEM(shape, self.dtype), pltpu.VMEM((scale_S.shape[1], shape[1]), jnp.float32)],
            prepare,
            lambda total, x, _, scratch: _add(total, x, scratch[0], 1 if transposed else 0),
        )

    def _fp4_few(self, w: Fp4Weight) -> Form:
        return Form(
            [w.codes, w.scale],
            [self._codes_spec(w), _spec(w.scale, 0, self.W)],
            [],
            lambda *_: None,
            lambda total, x, refs, _: _add_fp4_products(total, x, refs[0], refs[1]),
        )

    def _fp4_many(self, w: Fp4Weight, transposed: bool) -> Form:
        """Transposed, all scales are read: a block's scales are too few rows for a block."""
        shape = (self.W, w.shape[2]) if transposed else (w.shape[3], self.W)
        wide = (w.scale.shape[2], shape[1])

        def prepare(refs: Any, scratch: Any, n: Any) -> None:
            dense, wide = scratch
            wide[...] = tpu_codes.scale_values(refs[1][...]) * tpu_codes.E2M1_UNIT
            row = pl.multiple_of(n * (self.W // FP4_BLOCK), self.W // FP4_BLOCK)
            _dequantise_fp4(refs[0], wide, dense, row if transposed else 0)

        return Form(
            [w.codes, w.scale],
            [self._codes_spec(w, transposed), _spec(w.scale, 0, 0 if transposed else self.W)],
            [pltpu.VMEM(shape, self.dtype), pltpu.VMEM(wide, jnp.float32)],
            prepare,
            lambda total, x, _, scratch: _add(total, x, scratch[0], 1 if transposed else 0),
        )


def _spec(stack: Array, rows: int, columns: int) -> Any:
    """Blocks of this size along one of a matrix's dims; 0 means all of a dim."""
    block = (None, None, rows or stack.shape[2], columns or stack.shape[3])

    def expert_block(channels: Any, step: Any, layer_ref: Any, expert_ref: Any, *_: Any) -> Any:
        # The same for all steps of an expert: copied once.
        along = channels if rows else 0, channels if columns else 0
        return layer_ref[0], expert_ref[step], *along

    return pl.BlockSpec(block, expert_block)


def divisor(extent: int, most: int) -> int:
    """The largest divisor that is a multiple of 128, up to `most`; or the extent itself."""
    sizes = range(most, 0, -128)
    return next((size for size in sizes if extent % size == 0), extent)


def _over(extent: int, step: int, run: Callable[[Any], None]) -> None:
    """Call `run` with 0, step, 2 * step, ..."""
    if extent == step:
        run(0)
    else:
        body = lambda i, _: run(pl.multiple_of(i * step, step))
        jax.lax.fori_loop(0, extent // step, body, None)


def _over_chunks(rows: int, columns: int, run: Callable[[Any, Any, int, int], None]) -> None:
    """Call `run(first row, first column, rows, columns)` for chunks small enough to unroll."""
    ck = 1024 if rows % 1024 == 0 else rows
    cn = divisor(columns, 512)
    _over(columns, cn, lambda n: _over(rows, ck, lambda k: run(k, n, ck, cn)))


def _add(total_ref: Any, x_ref: Any, w_ref: Any, dim: int) -> None:
    step = divisor(x_ref.shape[1], 1024)

    def run(k: Any) -> None:
        at = pl.ds(k, step)
        w = w_ref[:, at] if dim else w_ref[at, :]
        total_ref[...] += tpu_tiles.dot(x_ref[:, at], w, transposed=dim == 1)

    _over(x_ref.shape[1], step, run)


def _add_fp8_products(
    total_ref: Any, x_ref: Any, codes_ref: Any, wide_ref: Any, native: bool
) -> None:
    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        total = total_ref[:, columns]
        scale = wide_ref[_part(k, ck, FP8_BLOCK), columns]
        for b in range(ck // FP8_BLOCK):
            at = _part(k + b * FP8_BLOCK, FP8_BLOCK)
            values = tpu_codes.e4m3_values(codes_ref[at, columns], native)
            total += tpu_tiles.dot(x_ref[:, at], values) * scale[b : b + 1]
        total_ref[:, columns] = total

    _over_chunks(codes_ref.shape[0], codes_ref.shape[1], chunk)


def _add_fp4_products(total_ref: Any, x_ref: Any, codes_ref: Any, scale_ref: Any) -> None:
    R = x_ref.shape[0]

    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        total = total_ref[:, columns]
        scale = _fp4_scale(scale_ref, k, columns, ck)
        for b in range(ck // FP8_BLOCK):
            packed = _part(k + b * FP8_BLOCK, FP8_BLOCK, 2)
            values = tpu_codes.e2m1_values(codes_ref[packed, columns])
            x = x_ref[:, _part(k + b * FP8_BLOCK, FP8_BLOCK)]
            products = tpu_tiles.dot(tpu_codes.rows_per_block(x), values)
            for i in range(_GROUP):
                row = b * _GROUP + i
                total += products[i * R : (i + 1) * R] * scale[row : row + 1]
        total_ref[:, columns] = total

    _over_chunks(x_ref.shape[1], codes_ref.shape[1], chunk)


def _part(start: Any, size: int, per: int = 1) -> Any:
    """Rows of `size` channels from `start` on, `per` to a row; `start` is a multiple of `size`."""
    if isinstance(start, int):
        return pl.ds(start // per, size // per)
    return pl.ds(pl.multiple_of(jax.lax.div(start, per), size // per), size // per)


def _fp4_scale(scale_ref: Any, k: Any, columns: Any, ck: int) -> Array:
    scale = scale_ref[_part(k, ck, FP4_BLOCK), columns]
    return tpu_codes.scale_values(scale) * tpu_codes.E2M1_UNIT


def _spread(scale_ref: Any, wide_ref: Any, first: Any, native: bool) -> None:
    """Scales in float32, from block `first` on, each repeated for its block's 128 columns."""
    scale = tpu_codes.scale_values(scale_ref[...]) * tpu_codes.e4m3_unit(native)
    cn = divisor(wide_ref.shape[1], 512)
    for n in range(0, wide_ref.shape[1], cn):
        wide_ref[:, n : n + cn] = tpu_codes.spread(scale, first + n // FP8_BLOCK, cn)


def _dequantise_fp8(codes_ref: Any, wide_ref: Any, dense_ref: Any, row: Any, native: bool) -> None:
    def chunk(k: Any, n: Any, ck: int, cn: int) -> None:
        columns = pl.ds(n, cn)
        for b in range(ck // FP8_BLOCK):
            at = _part(k + b * FP8_BLOCK, FP8_BLOCK)
            scale = wide_ref[pl.ds(row + _part(k, ck, FP8_BLOCK).start + b, 1), columns]
            values = tpu_codes.e4m3_values(codes_ref[at, columns], native).astype(jnp.float32)
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
