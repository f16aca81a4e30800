"""The entries of a chunk on TPUs: tokens are read once, and only entries are written.

Grid: rows of the batch, blocks of windows, columns of 128 channels. The last column of a block
finishes its entries.

Axis letters: as in the package; V channels of a column (128), W windows of a block, G windows of a
group, U = 2 * overlap columns read at a time: kv of each series, then gate.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compress.tpu_finish import finish, in_pairs
from pallas_kernels.compress.tpu_pool import SUBLANES, pool
from pallas_kernels.mosaic_tpu import LANES, resident

_BLOCK_BYTES = 2**21  # of tokens, read in each step of the grid
_VMEM = 32 * 2**20
_UNIT = 16  # a block's windows are a multiple of this
_GROUP = 32  # short windows at a time: four registers, which hide each other's latency
_FINISHED = 64  # entries finished at a time


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Sizes: M, windows per entry, columns of K, windows per block, windows per group."""

    ratio: int
    overlap: int
    columns: int
    windows: int
    group: int

    @property
    def units(self) -> int:
        return 2 * self.overlap

    @property
    def before(self) -> int:
        """P."""
        return self.overlap * self.ratio


def prefill(
    rows_BTC: Float[Array, "B T C2"],
    before_BPC: Float[Array, "B P C2"],
    start_B: Int[Array, " B"],
    bias_MC: Float[Array, "M C"],
    scale_K: Float[Array, " K"],
    table: tuple[Float[Array, "B n Q"], Float[Array, "B n Q"]],
    *,
    overlap: int,
    eps: float,
    rounding: str,
    dtype: Any,
) -> Float[Array, "B n K"]:
    """See the package."""
    (batch, tokens, _), ratio, dim = rows_BTC.shape, len(bias_MC), len(scale_K)
    entries, rotated = pl.cdiv(tokens, ratio), 2 * table[0].shape[2]
    tiling = _tiling(ratio, overlap, dim, entries)
    table, table_specs = _along_lanes(table, tiling)
    per_window = lambda columns: pltpu.VMEM((columns, tiling.windows, LANES), jnp.float32)
    head = pltpu.VMEM((tiling.units, tiling.before + tiling.group * ratio, LANES), jnp.float32)
    settings = {"rotated": rotated, "eps": eps, "rounding": rounding, "dtype": dtype}
    return pl.pallas_call(
        functools.partial(_kernel, tiling, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(entries, tiling.windows), tiling.columns),
            in_specs=[
                *_token_specs(tiling, rows_BTC.shape[2]),
                resident(*bias_MC.shape),
                resident(1, dim),
                *table_specs,
            ],
            out_specs=_per_block(tiling, dim),
            scratch_shapes=[head, per_window(tiling.columns), per_window(2)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, entries, dim), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name="compress_prefill",
    )(
        start_B.astype(jnp.int32),
        *([rows_BTC] * (tiling.units + 1)),
        before_BPC,
        bias_MC,
        scale_K[None],
        *table,
    )


def _tiling(ratio: int, overlap: int, dim: int, entries: int) -> _Tiling:
    window_bytes = 2 * overlap * ratio * LANES * 4
    most = max(_UNIT, _BLOCK_BYTES // window_bytes // _UNIT * _UNIT)
    windows = min(most, pl.cdiv(entries, SUBLANES) * SUBLANES)
    group = math.gcd(windows, _GROUP) if ratio % SUBLANES else 2
    return _Tiling(ratio, overlap, dim // LANES, windows, group)


# Index maps: (row of the batch, block of windows, column of channels, prefetched starts) -> block.
def _token_specs(tiling: _Tiling, channels: int) -> list[pl.BlockSpec]:
    """A column of each unit, the tokens before the block, and those before the chunk."""

    def column_of_unit(u: int, row: Any, block: Any, column: Any, start_ref: Any) -> Any:
        return row, block, u * tiling.columns + column

    def before_block(row: Any, block: Any, column: Any, start_ref: Any) -> Any:
        # Clamped: block 0 uses `before_chunk` instead. Where windows begin with their block, none
        # is used: the index stays at 0, so that nothing more is read.
        used = (tiling.overlap > 1) | (start_ref[row] % tiling.ratio != 0)
        index = jnp.maximum(block * (tiling.windows // tiling.overlap) - 1, 0)
        return row, jnp.where(used, index, 0), 0

    def before_chunk(row: Any, block: Any, column: Any, start_ref: Any) -> Any:
        return row, 0, 0

    column_shape = (1, tiling.windows * tiling.ratio, LANES)
    units = [functools.partial(column_of_unit, u) for u in range(tiling.units)]
    before_shape = (1, tiling.before, channels)
    return [
        *(pl.BlockSpec(column_shape, unit) for unit in units),
        pl.BlockSpec(before_shape, before_block),
        pl.BlockSpec(before_shape, before_chunk),
    ]


def _along_lanes(table: Any, tiling: _Tiling) -> tuple[Any, list[pl.BlockSpec]]:
    """The table with entries along lanes, if a block's entries fill whole lanes.

    XLA lays out arrays of few channels that way; the other way takes four times the memory.
    """
    if tiling.windows % LANES:
        return table, [_per_block(tiling, part.shape[2]) for part in table]

    def entries_along_lanes(row: Any, block: Any, column: Any, start_ref: Any) -> Any:
        return row, 0, block

    shape = lambda part: (1, part.shape[2], tiling.windows)
    spec = lambda part: pl.BlockSpec(shape(part), entries_along_lanes)
    return [jnp.swapaxes(part, 1, 2) for part in table], [spec(part) for part in table]


def _per_block(tiling: _Tiling, width: int) -> pl.BlockSpec:
    """A block's windows; the same for all columns, the last of which writes the entries."""

    def windows(row: Any, block: Any, column: Any, start_ref: Any) -> Any:
        return row, block, 0

    return pl.BlockSpec((1, tiling.windows, width), windows)


def _kernel(tiling: _Tiling, settings: dict[str, Any], start_ref: Any, *refs: Any) -> None:
    unit_refs, refs = refs[: tiling.units], refs[tiling.units :]
    earlier_ref, before_ref, bias_ref, scale_ref, *table_refs, out_ref = refs[:-3]
    head_ref, pooled_ref, pairs_ref = refs[-3:]
    b, j, c = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    ratio, G = tiling.ratio, tiling.group
    past = start_ref[b] % ratio  # tokens of the first window that precede the chunk
    lanes = lambda u: pl.ds(pl.multiple_of((u * tiling.columns + c) * LANES, LANES), LANES)
    bias = lambda s, at, rows: bias_ref[pl.ds(at, rows), lanes(s)]
    pool_group = functools.partial(pool, bias=bias, ratio=ratio, overlap=tiling.overlap, windows=G)

    def first_group() -> None:
        """Pool the first group, with the tokens before the block."""
        for u, unit_ref in enumerate(unit_refs):
            for here, ref in ((j == 0, before_ref), (j > 0, earlier_ref)):

                @pl.when(here)
                def _(u: int = u, ref: Any = ref) -> None:
                    head_ref[u, : tiling.before] = ref[0, :, lanes(u)]

            head_ref[u, tiling.before :] = unit_ref[0, : G * ratio]
        read = lambda u, at, *size: head_ref.at[u][_rows(ratio - past + at, *size)]
        first = jax.lax.div(start_ref[b], ratio) + j * tiling.windows
        pooled_ref[c, :G] = pool_group(read, first=first)

    def group(g: Any, _: Any) -> None:
        base = g * G * ratio - (tiling.overlap - 1) * ratio - past
        read = lambda u, at, *size: unit_refs[u].at[0][_rows(base + at, *size)]
        pooled_ref[c, pl.ds(g * G, G)] = pool_group(read)

    in_block = (past == 0) & (tiling.overlap == 1)
    pl.when(~in_block)(first_group)
    jax.lax.fori_loop(jnp.where(in_block, 0, 1), tiling.windows // G, group, None)

    @pl.when(c == tiling.columns - 1)
    def _() -> None:
        _finish_block(tiling, settings, scale_ref, table_refs, pooled_ref, pairs_ref, out_ref)


def _rows(start: Any, count: int, stride: int) -> Any:
    return pl.ds(start, count, stride=stride)


def _finish_block(
    tiling: _Tiling,
    settings: dict[str, Any],
    scale_ref: Any,
    table_refs: list[Any],
    pooled_ref: Any,
    pairs_ref: Any,
    out_ref: Any,
) -> None:
    for i, table_ref in enumerate(table_refs):
        pairs_ref[i] = in_pairs(table_ref[0], 1 if tiling.windows % LANES else 0)
    rows = math.gcd(tiling.windows, _FINISHED)

    def finish_rows(i: Any, _: Any) -> None:
        at = pl.ds(i * rows, rows)
        columns = [pooled_ref[column, at] for column in range(tiling.columns)]
        pairs = pairs_ref[0, at], pairs_ref[1, at]
        out_ref[0, at] = finish(columns, scale_ref[...], *pairs, **settings)

    jax.lax.fori_loop(0, tiling.windows // rows, finish_rows, None)
