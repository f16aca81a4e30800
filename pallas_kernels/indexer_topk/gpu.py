"""The choice on NVIDIA GPUs from Hopper on: Mosaic GPU kernels, which pass lists from hand to hand.

Each block of threads scores a chunk of entries for one query: tiles of keys come by TMA, tensor
cores multiply them with the query's heads, and the scores stay in shared memory, where the chunk's
k best are chosen (`gpu_select`). Lists of chunks are merged, 8192 candidates at a time, until one
is left. Device memory sees only lists: 8 bytes per candidate.

Axis letters: as in the package; N rows (B * T queries), H chunks, K entries of a list (whole
blocks), X entries of a tile (64).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import gpu_select
from pallas_kernels.indexer_topk.gpu_select import NOTHING, SIZE

_TILE, _HEADS = 64, 64
# With two blocks of threads on a multiprocessor, six tiles of 16 KiB are under way.
_DEPTH = 3
# Blocks of threads that fill an H200 once.
_BLOCKS = 128
_FEWEST_ENTRIES = 1024
# Bytes of lists at a time: longer prompts are taken in turns.
_LIST_BYTES = 16 * 2**20
_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
) -> Int32[Array, "B T k"]:
    """As the package says.

    Raises:
      Unsupported: unless queries and keys are bfloat16, heads at most 128, their dim 64,
        128, 192 or 256, entries at least 64 and k at most 4096.
    """
    _require(q_BTIJ, keys_LBSJ, k)
    batch, queries, heads, _ = q_BTIJ.shape
    entries = keys_LBSJ.shape[2]
    chunk = _chunk(batch * queries, entries, k)
    lists = -(-entries // chunk)
    fits = max(1, _LIST_BYTES // (8 * lists * gpu_select.slots(k)))
    block = min(batch * queries, fits)
    blocks = -(-batch * queries // block)
    missing = blocks * block - batch * queries

    def cut_up(x: Array) -> Array:
        x = x.reshape(batch * queries, *x.shape[2:])
        x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(blocks, block, *x.shape[1:])

    row_BT = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], (batch, queries))
    where_BT2 = jnp.stack([row_BT, visible_BT.astype(jnp.int32)], axis=-1)
    # Heads last, as a product of tiles wants them, and as many as its tiles hold.
    few = ((0, 0), (0, 0), (0, -heads % _HEADS))
    q_BTJI = jnp.pad(q_BTIJ.swapaxes(2, 3), ((0, 0), *few))
    weights_BTI = jnp.pad(weights_BTI.astype(jnp.float32), few)
    inputs = cut_up(q_BTJI), cut_up(weights_BTI), cut_up(where_BT2)
    layer_1 = layer.astype(jnp.int32).reshape(1)

    def one(block: Any) -> Any:
        entry_NHK, key_NHK = _candidates(*block, keys_LBSJ, layer_1, heads=heads, chunk=chunk, k=k)
        return _merged(entry_NHK, key_NHK, k)

    if blocks == 1:
        chosen = one(jax.tree.map(lambda x: x[0], inputs))
    else:
        chosen = jax.lax.map(one, inputs)
    return chosen.reshape(blocks * block, -1)[: batch * queries, :k].reshape(batch, queries, k)


def _require(q_BTIJ: Any, keys_LBSJ: Any, k: int) -> None:
    dtypes = [getattr(x, "dtype", type(x).__name__) for x in (q_BTIJ, keys_LBSJ)]
    if dtypes != [jnp.bfloat16] * 2:
        raise Unsupported(f"The GPU kernel takes bfloat16 queries and keys, not {dtypes}.")
    *_, heads, dim = q_BTIJ.shape
    if heads > 128 or dim % 64 or dim > 256:
        raise Unsupported(
            f"The GPU kernel takes up to 128 heads of a dim of 64, 128, 192 or 256, not {heads} of"
            f" {dim}."
        )
    if keys_LBSJ.shape[2] < _TILE or gpu_select.slots(k) > SIZE // 2:
        raise Unsupported(
            f"The GPU kernel chooses up to {SIZE // 2} of at least {_TILE} entries, not {k} of"
            f" {keys_LBSJ.shape[2]}."
        )


def _chunk(rows: int, entries: int, k: int) -> int:
    """Entries that one block of threads scores: many, unless so few blocks would idle a GPU."""
    chunk, least = SIZE, max(_FEWEST_ENTRIES, 2 * k)
    while chunk // 2 >= least and (chunk // 2 >= entries or rows * entries < _BLOCKS * chunk):
        chunk //= 2
    return chunk


def _candidates(
    q_NJI: Float[Array, "N J I"],
    weights_NI: Float[Array, "N I"],
    where_N2: Int32[Array, "N 2"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer_1: Int32[Array, "1"],
    *,
    heads: int,
    chunk: int,
    k: int,
) -> tuple[Int32[Array, "N H K"], Int32[Array, "N H K"]]:
    """Each chunk's best: entries, ascending, then -1; and their keys, then NOTHING."""
    rows, dim, padded = q_NJI.shape
    width = gpu_select.slots(k)
    chunks = -(-keys_LBSJ.shape[2] // chunk)
    out = jax.ShapeDtypeStruct((rows, chunks, width), jnp.int32)

    def body(q_ref, weights_ref, where_ref, keys_ref, layer_ref, entry_out, key_out, *scratch):
        score_ref, entry_ref, key_ref = scratch
        first, row = jax.lax.axis_index("chunk") * chunk, jax.lax.axis_index("row")
        visible = where_ref[row, 1]
        keys_SJ = keys_ref.at[layer_ref[0], where_ref[row, 0]]
        score_ref[...] = jnp.full(score_ref.shape, NOTHING, jnp.int32)
        entry_ref[...] = jnp.full(entry_ref.shape, -1, jnp.int32)
        key_ref[...] = jnp.full(key_ref.shape, NOTHING, jnp.int32)

        @pl.when(first < visible)
        def _() -> None:
            end = jnp.minimum(visible, first + chunk)
            scores = functools.partial(
                _score_chunk, q_ref.at[row], weights_ref.at[row], keys_SJ, score_ref, first, end, heads
            )
            pl.run_scoped(lambda **smem: scores(smem), **_streams(dim, padded))
            choose = functools.partial(gpu_select.select, score_ref, entry_ref, key_ref, k)
            pl.run_scoped(lambda **work: choose(work), **gpu_select.scratch(digits=True))
            entry_ref[...] = _entries(entry_ref[...], first, keys_SJ.shape[0])

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(entry_ref, entry_out.at[row, jax.lax.axis_index("chunk")])
        plgpu.copy_smem_to_gmem(key_ref, key_out.at[row, jax.lax.axis_index("chunk")])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(out, out),
        # Neighbours read the same keys.
        grid=(chunks, rows),
        grid_names=("chunk", "row"),
        scratch_types=[
            plgpu.SMEM((gpu_select.ROWS, gpu_select.COLUMNS), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
        ],
        compiler_params=_PARAMS,
        kernel_name="indexer_candidates",
    )(q_NJI, weights_NI, where_N2, keys_LBSJ, layer_1)


def _streams(dim: int, heads: int) -> dict[str, Any]:
    smem = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=gpu_select.TILED)
    return {
        "q_JI": smem((dim, heads)),
        "weights_I": plgpu.SMEM((heads,), jnp.float32),
        "tiles_DXJ": smem((_DEPTH, _TILE, dim)),
        "here": plgpu.Barrier(num_arrivals=2),
        "tile_here_D": plgpu.Barrier(num_barriers=_DEPTH),
    }


def _score_chunk(
    q_JI: Any,
    weights_I: Any,
    keys_SJ: Any,
    score_ref: Any,
    first: Array,
    end: Array,
    heads: int,
    smem: Any,
) -> None:
    """Score entries first, ..., end - 1 into score_ref, row by row."""
    tiles = (end - first + _TILE - 1) // _TILE

    def fetch(tile: Any) -> None:
        slot = jax.lax.rem(tile, _DEPTH)
        start = _start(first + tile * _TILE, keys_SJ.shape[0])
        rows = keys_SJ.at[pl.ds(start, _TILE)]
        plgpu.copy_gmem_to_smem(rows, smem["tiles_DXJ"].at[slot], smem["tile_here_D"].at[slot])

    plgpu.copy_gmem_to_smem(q_JI, smem["q_JI"], smem["here"])
    plgpu.copy_gmem_to_smem(weights_I, smem["weights_I"], smem["here"])
    for tile in range(_DEPTH):
        pl.when(tile < tiles)(functools.partial(fetch, jnp.int32(tile)))
    plgpu.barrier_wait(smem["here"])
    by_column = plgpu.Layout.WGMMA.reduce(0)
    weights = gpu_select.load(smem["weights_I"], by_column)

    @pl.loop(0, tiles)
    def _(tile: Array) -> None:
        slot = jax.lax.rem(tile, _DEPTH)
        plgpu.barrier_wait(smem["tile_here_D"].at[slot])
        key_X = _tile_keys(smem["tiles_DXJ"].at[slot], smem["q_JI"], weights, heads)
        nominal = first + tile * _TILE
        entry_X = _start(nominal, keys_SJ.shape[0]) + _iota_rows()
        # The last tile may reach back over entries of the one before.
        counts_X = (entry_X >= nominal) & (entry_X < end)
        half = pl.ds(jax.lax.rem(tile, 2) * _TILE, _TILE)
        score_ref[tile // 2, half] = jnp.where(counts_X, key_X, NOTHING)
        pl.when(tile + _DEPTH < tiles)(functools.partial(fetch, tile + _DEPTH))


def _iota_rows() -> Array:
    rows = jax.lax.broadcasted_iota(jnp.int32, (_TILE,), 0)
    return plgpu.layout_cast(rows, plgpu.Layout.WGMMA.reduce(1))


def _start(nominal: Any, entries: int) -> Any:
    """Where the tile lies whose first entry should be this: the last one reaches back."""
    return jnp.minimum(nominal, entries - _TILE)


def _tile_keys(keys_XJ: Any, q_JI: Any, weights_I: Array, heads: int) -> Array:
    """Scores of a tile as sortable keys."""

    def multiply(dots_ref: Any) -> Array:
        plgpu.wgmma(dots_ref, keys_XJ, q_JI)
        return dots_ref[...]

    shape = (_TILE, q_JI.shape[1])
    dots_XI = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    terms_XI = jnp.maximum(dots_XI, 0.0) * jax.lax.broadcast_in_dim(weights_I, shape, (1,))
    if heads < shape[1]:
        # An infinite key makes NaN of heads that are not there.
        terms_XI = jnp.where(gpu_select.iota(shape, 1) < heads, terms_XI, 0.0)
    return gpu_select.sortable(jnp.sum(terms_XI, axis=1))


def _entries(at_K: Array, first: Array, entries: int) -> Array:
    """Entries of places in a chunk."""
    entry_K = _start(first + (at_K & -_TILE), entries) + (at_K & (_TILE - 1))
    return jnp.where(at_K < 0, -1, entry_K)


def _merged(
    entry_NHK: Int32[Array, "N H K"], key_NHK: Int32[Array, "N H K"], k: int
) -> Int32[Array, "N K"]:
    """One list of many: the best k, ascending."""
    rows, lists, width = entry_NHK.shape
    together = SIZE // width
    while lists > 1:
        groups = -(-lists // together)

        def gather(x_NHK: Array, fill: int, groups: int = groups) -> Array:
            missing = groups * together - x_NHK.shape[1]
            x_NHK = jnp.pad(x_NHK, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
            x_NGC = x_NHK.reshape(rows, groups, together * width)
            short = SIZE - together * width
            return jnp.pad(x_NGC, ((0, 0), (0, 0), (0, short)), constant_values=fill)

        entry_NGC, key_NGC = gather(entry_NHK, -1), gather(key_NHK, NOTHING)
        at_NGK = _best_of_keys(key_NGC, k)
        pick = lambda x, at: jnp.take_along_axis(x, jnp.maximum(at, 0), axis=2)
        there_NGK = at_NGK >= 0
        entry_NHK = jnp.where(there_NGK, pick(entry_NGC, at_NGK), -1)
        key_NHK = jnp.where(there_NGK, pick(key_NGC, at_NGK), NOTHING)
        lists = groups
    return entry_NHK[:, 0]


def _best_of_keys(key_NGC: Int32[Array, "N G C"], k: int) -> Int32[Array, "N G K"]:
    """Places of the k best keys of each 8192."""
    rows, groups, _ = key_NGC.shape
    width = gpu_select.slots(k)

    def body(key_hbm, at_out, key_ref, at_ref, here, *work):
        group, row = jax.lax.axis_index("group"), jax.lax.axis_index("row")
        plgpu.copy_gmem_to_smem(key_hbm.at[row, group], key_ref, here)
        plgpu.barrier_wait(here)
        scratch = dict(zip(gpu_select.scratch(digits=False), work, strict=True))
        gpu_select.select(key_ref, at_ref, None, k, scratch)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at_ref, at_out.at[row, group])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, groups, width), jnp.int32),
        grid=(groups, rows),
        grid_names=("group", "row"),
        scratch_types=[
            plgpu.SMEM((gpu_select.ROWS, gpu_select.COLUMNS), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.Barrier(),
            *gpu_select.scratch(digits=False).values(),
        ],
        compiler_params=_PARAMS,
        kernel_name="indexer_merge",
    )(key_NGC.reshape(rows, groups, gpu_select.ROWS, gpu_select.COLUMNS))
