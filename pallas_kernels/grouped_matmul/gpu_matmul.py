"""Products of tiles of sorted rows with their experts' matrices, two at a time.

Two of a block's four warpgroups load tiles into shared memory, one for each product; the other two
multiply, each half of the rows or, if a tile has only 64, half of the columns. Only the step's rows
are written, in pieces of 2^i rows, as TMA copies have fixed sizes.

Axis letters: as in gpu.py; K input channels, N output channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import lora
from pallas_kernels.grouped_matmul.gpu_weights import CHANNELS, STAGES, Format, arrays_of
from pallas_kernels.mosaic_gpu import PARAMS, TILED, along, load

COLUMNS = 128
OUT_COLUMNS = 2 * COLUMNS
TILING = 8  # tiles begin at multiples of this many rows
_UNIT = 64  # rows that a warpgroup multiplies at once
_SLOTS = 3
_LAYOUT = plgpu.Layout.WGMMA
_PREFIX = ("first_", "second_")

# Two sums in registers, a number per row -> what to write, one array per offset of the columns.
_Finish = Callable[[Array, Array, Array | None], list[Array]]


def tile_rows(rows: int, experts: int) -> int:
    """Rows per tile: 64, or 128 if experts have that many."""
    return 64 if rows < 96 * experts else 128


def hidden(
    steps: Any,
    x_PD: Float[Array, "P D"],
    w1_LEFD: lora.Weight,
    w3_LEFD: lora.Weight,
    layer: Int[Array, ""],
    weight_P: Float[Array, " P"] | None,
    *,
    limit: float,
) -> Float[Array, "P F"]:
    """Gate and up, clamped SwiGLU, times the rows' weights if given."""

    def finish(gate: Array, up: Array, weight: Array | None) -> list[Array]:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        active = gate / (1.0 + jnp.exp(-gate)) * up
        return [active if weight is None else active * weight]

    _, _, F, D = w1_LEFD.shape
    call = _Call(steps.rows, D, F, Format(type(w1_LEFD), COLUMNS), (0, 0), COLUMNS, finish)
    weights = (arrays_of(w1_LEFD), arrays_of(w3_LEFD))
    return call(steps, x_PD, weights, layer, weight_P, "experts_hidden")


def out(
    steps: Any, hidden_PF: Float[Array, "P F"], w2_LEDF: lora.Weight, layer: Int[Array, ""]
) -> Float[Array, "P D"]:
    """Down; the two products of a block are adjacent columns."""
    _, _, D, F = w2_LEDF.shape
    finish = lambda left, right, _: [left, right]
    form, offsets = Format(type(w2_LEDF), COLUMNS), (0, COLUMNS)
    call = _Call(steps.rows, F, D, form, offsets, OUT_COLUMNS, finish)
    weights = (arrays_of(w2_LEDF),) * 2
    return call(steps, hidden_PF, weights, layer, None, "experts_out")


@dataclasses.dataclass(frozen=True)
class _Call:
    """One kernel.

    Attributes:
      rows: rows per tile.
      channels: K.
      outputs: N.
      form: format of the matrices.
      offsets: offset of each product's columns from the block's first.
      columns: columns per block.
      finish: turns sums into results.
    """

    rows: int
    channels: int
    outputs: int
    form: Format
    offsets: tuple[int, int]
    columns: int
    finish: _Finish

    def __call__(
        self,
        steps: Any,
        x_PK: Float[Array, "P K"],
        weights: Any,
        layer: Int[Array, ""],
        number_P: Float[Array, " P"] | None,
        name: str,
    ) -> Float[Array, "P N"]:
        plan = (steps.expert_S, steps.row_S, steps.count_S)
        arrays = (x_PK, weights, layer.astype(jnp.int32)[None], number_P, plan)
        leaves, tree = jax.tree.flatten(arrays)

        def body(*refs: Any, **smem: Any) -> None:
            inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
            step = jax.lax.axis_index("step")
            expert_S, row_S, count_S = inputs[4]
            count = count_S[step]

            @pl.when(count > 0)
            def _() -> None:
                self._step(inputs, refs[len(leaves)], expert_S[step], row_S[step], count, smem)

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((x_PK.shape[0], self.outputs), x_PK.dtype),
            # Columns are innermost: blocks that run together read the same rows.
            grid=(len(steps.expert_S), self.outputs // self.columns),
            grid_names=("step", "columns"),
            num_threads=4,
            thread_name="warpgroup",
            scratch_types=self._scratch(),
            compiler_params=PARAMS,
            kernel_name=name,
        )(*leaves)

    @property
    def _steps(self) -> int:
        return self.channels // CHANNELS

    @property
    def _results(self) -> tuple[int, int]:
        """Rows and columns of one warpgroup's part of a product."""
        return _UNIT, COLUMNS * self.rows // (2 * _UNIT)

    def _scratch(self) -> dict[str, Any]:
        return {
            "x": plgpu.SMEM((_SLOTS, self.rows, CHANNELS), jnp.bfloat16, transforms=TILED),
            "tiled": plgpu.SMEM((2, _UNIT, _UNIT), jnp.bfloat16, transforms=TILED),
            "plain": plgpu.SMEM((2, _UNIT, _UNIT), jnp.bfloat16),
            "here": plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
            **self.form.scratch(_SLOTS, _PREFIX[0]),
            **self.form.scratch(_SLOTS, _PREFIX[1]),
        }

    def _step(
        self, arrays: Any, out: Any, expert: Array, row: Array, count: Array, smem: Any
    ) -> None:
        """What the four warpgroups of a block do."""
        x, weights, layer, number, _ = arrays
        first = jax.lax.axis_index("columns") * self.columns
        warpgroup = jax.lax.axis_index("warpgroup")
        for i in range(2):

            @pl.when(warpgroup == 2 + i)
            def _(i: int = i) -> None:
                plgpu.set_max_registers(88, action="decrease")
                at = lambda k: (layer[0], expert, k * CHANNELS, first + self.offsets[i])
                rows = x.at[pl.ds(row & -TILING, self.rows)] if i == 0 else None
                self._bring(weights[i], at, rows, _PREFIX[i], smem)

        @pl.when(warpgroup < 2)
        def _() -> None:
            plgpu.set_max_registers(168, action="increase")
            self._multiply(warpgroup, out, first, row, count, number, smem)

    def _bring(self, arrays: Any, at: Any, rows: Any, prefix: str, smem: Any) -> None:
        """Load tiles of one matrix, and of the rows if given, into the slots of shared memory."""
        buffers = {key[len(prefix) :]: ref for key, ref in smem.items() if key.startswith(prefix)}
        form = self.form
        if form.quantised:
            for k in range(min(STAGES - 1, self._steps)):
                form.stage(arrays, at(jnp.int32(k)), jnp.int32(k), buffers)

        @pl.loop(0, self._steps)
        def _(k: Array) -> None:
            slot = jax.lax.rem(k, _SLOTS)
            here = smem["here"].at[slot]
            pl.when(k >= _SLOTS)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
            if rows is not None:
                tile = rows.at[:, pl.ds(k * CHANNELS, CHANNELS)]
                plgpu.copy_gmem_to_smem(tile, smem["x"].at[slot], here)
            if not form.quantised:
                form.fetch(arrays, at(k), buffers["tile"].at[slot], here)
                return
            ahead, stage = k + STAGES - 1, jax.lax.rem(k, STAGES)
            start = lambda: form.stage(arrays, at(ahead), jax.lax.rem(ahead, STAGES), buffers)
            pl.when(ahead < self._steps)(start)
            plgpu.barrier_wait(buffers["staged"].at[stage])
            form.dequantise(arrays, at(k), stage, buffers["tile"].at[slot], buffers)
            # Also keeps the next copies from overwriting codes that are still being read.
            plgpu.commit_smem()
            plgpu.barrier_arrive(here)

    def _multiply(
        self,
        warpgroup: Array,
        out_ref: Any,
        first: Array,
        row: Array,
        count: Array,
        number_ref: Any,
        smem: Any,
    ) -> None:
        """Compute both products and write the step's rows of the results to device memory."""
        height, width = self._results
        by_rows = width == COLUMNS
        top = warpgroup * _UNIT if by_rows else 0
        left = 0 if by_rows else warpgroup * width

        def accumulate(*sums: Any) -> tuple[Array, ...]:
            @pl.loop(0, self._steps)
            def _(k: Array) -> None:
                slot = jax.lax.rem(k, _SLOTS)
                plgpu.barrier_wait(smem["here"].at[slot])
                x = smem["x"].at[slot, pl.ds(top, height)]
                for prefix, total in zip(_PREFIX, sums, strict=True):
                    tile = smem[prefix + "tile"].at[slot]
                    plgpu.wgmma(total, x, self.form.operand(tile, pl.ds(left, width)))
                # The products before these two are done: their slot is free.
                plgpu.wgmma_wait(2)
                before = jax.lax.rem(k + _SLOTS - 1, _SLOTS)
                pl.when((k > 0) & (k - 1 + _SLOTS < self._steps))(
                    lambda: plgpu.barrier_arrive(smem["free"].at[before])
                )

            return tuple(total[...] for total in sums)

        accumulator = plgpu.WGMMAAccumulatorRef((height, width), jnp.float32)
        sums: Any = pl.run_scoped(accumulate, accumulator, accumulator)
        start, skipped = (row & -TILING) + top, row & (TILING - 1)
        number = None
        if number_ref is not None:
            number = load(number_ref.at[pl.ds(start, height)], _LAYOUT.reduce(1))
            number = along(number, (height, width), 0)
        span = [jnp.clip(end - top, 0, height) for end in (skipped, skipped + count)]
        tiled, plain = smem["tiled"].at[warpgroup], smem["plain"].at[warpgroup]
        for i, result in enumerate(self.finish(sums[0], sums[1], number)):
            for piece in range(0, width, _UNIT):
                column = first + self.offsets[i] + left + piece
                there = out_ref.at[:, pl.ds(column, _UNIT)]
                result_piece = result[:, piece : piece + _UNIT].astype(jnp.bfloat16)
                _write(result_piece, tiled, plain, there, start, span)
        plgpu.wait_smem_to_gmem(0)


def _write(result: Array, tiled: Any, plain: Any, out: Any, start: Array, span: Any) -> None:
    """Write rows span[0] to span[1] of a piece to `out`, where the piece's first is row `start`.

    The registers of a product write tiles without bank conflicts, but only untiled shared memory
    allows copies of any number of rows: results go through both.
    """
    tiled[...] = result
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()
    copied = plgpu.Layout.SMEM_GMEM_COPY(plain.shape, jnp.bfloat16, 128)
    plain[...] = plgpu.layout_cast(tiled[...], copied)
    plgpu.commit_smem()
    first, last = span
    count, size = last - first, _UNIT
    while size:
        # Larger pieces come first.
        done = first + (count & ~(2 * size - 1))

        def copy(done: Array = done, size: int = size) -> None:
            there = out.at[pl.ds(start + done, size)]
            plgpu.copy_smem_to_gmem(plain.at[pl.ds(done, size)], there)

        pl.when((count & size) != 0)(copy)
        size //= 2
