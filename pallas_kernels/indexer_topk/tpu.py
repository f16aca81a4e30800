"""Top k on TPUs: scores are written to VMEM as integers, and never leave it.

The grid is rows of the batch, blocks of up to 8 queries, blocks of keys. A block of queries reads
only the key blocks that its queries see, each once for all queries. After the last one, each
query's list is computed (`tpu_choice`). If entries are hidden, the first step reads the first
visible key block, and the kernel counts entries from there. A block of keys that are rows of bytes
is decoded once for all queries.

Axis letters: as in the package; Q queries per block, X keys per block, R rows of 128 entries,
N entries per page, M pages of a row's table.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import tpu_byte_rows
from pallas_kernels.byte_rows import FP4
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import tpu_choice as choice
from pallas_kernels.indexer_topk.keys import FP4_BLOCK, Fp4Keys, Fp8Keys, Keys, entries
from pallas_kernels.indexer_topk.tpu_scores import PEAKS, TILE, score_block
from pallas_kernels.mosaic_tpu import LANES, in_hbm
from pallas_kernels.paged import Paged

_QUERIES = 8
# Long blocks hide more of a product's latency, but a prompt sees less of each.
_KEYS, _KEYS_OF_FEW = 4096, 16384
_PIECES = 32  # pages per block
_VMEM = 48 * 2**20
_MOST_SCORES = _VMEM // 2 // 4  # half of VMEM
_MOST_SCALARS = 2**17  # half of the scalar memory
_MOST_CHOSEN = 4096
_MOST_KEY_BYTES = 512
_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys: Keys,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    hidden_BT: Int[Array, "B T"] | None = None,
    *,
    k: int,
) -> Int32[Array, "B T k"]:
    """See the package; decode and prefill both run in blocks of up to 8 queries."""
    batch, queries = visible_BT.shape
    tiling = _tiling(keys, q_BTIJ.shape[2], queries, k, hidden_BT is not None)
    _check(q_BTIJ, keys, visible_BT, tiling)
    visible_BT = jnp.clip(visible_BT.astype(jnp.int32), 0, entries(keys))
    scalars = [
        layer.astype(jnp.int32)[None],
        *blocks_seen(visible_BT, hidden_BT, tiling.step, tiling.block),
    ]
    if isinstance(keys, Paged):
        scalars.append(keys.table.astype(jnp.int32))
    arrays, specs = _key_blocks(keys, tiling)
    if coded := isinstance(keys, Paged) and keys.codec is not None:
        q_BTIJ = FP4.by_nibble(q_BTIJ)
    q_BTIJ, weights_BTI = _padded_heads(q_BTIJ, weights_BTI.astype(jnp.float32), arrays[0].dtype)

    def of_queries(*dims: int) -> pl.BlockSpec:
        # The same for all key blocks, so that queries and lists stay in VMEM.
        def query_block(row: Any, query_block: Any, key_block: Any, *_: Any) -> Any:
            return row, query_block, *(0 for _ in dims)

        return pl.BlockSpec((1, tiling.step, *dims), query_block)

    return pl.pallas_call(
        functools.partial(_kernel, tiling, len(scalars), len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, pl.cdiv(queries, tiling.step), tiling.blocks),
            in_specs=[of_queries(*q_BTIJ.shape[2:]), of_queries(q_BTIJ.shape[2]), *specs],
            out_specs=of_queries(k),
            scratch_shapes=_scratch(tiling, q_BTIJ.shape[2], coded=coded),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, queries, k), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name="indexer_topk_select",
    )(*scalars, q_BTIJ, weights_BTI, *in_hbm(arrays))


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Sizes shared by the kernel and its caller.

    Attributes:
      k: entries chosen.
      has_hidden: whether leading entries may be hidden.
      heads: index heads, without padding.
      queries: queries per row of the batch.
      step: queries per block.
      block: keys per block.
      pieces: pages per block, or 1.
      blocks: number of key blocks.
      places: sets that keys are divided into by position, each with its own peaks.
    """

    k: int
    has_hidden: bool
    heads: int
    queries: int
    step: int
    block: int
    pieces: int
    blocks: int
    places: int


def _tiling(keys: Keys, heads: int, queries: int, k: int, has_hidden: bool) -> _Tiling:
    """Choose the sizes: key blocks are full tiles, of at least k keys unless there is only one."""
    up = lambda n: pl.cdiv(n, TILE) * TILE
    capacity, pieces, per_page = entries(keys), 1, 0
    most = max(_KEYS_OF_FEW if queries <= _QUERIES else _KEYS, up(k))
    if isinstance(keys, Paged):
        per_page = keys.pages.shape[2]
        most = max(min(most, up(_PIECES * per_page)), up(k))
        pieces = pl.cdiv(min(up(capacity), most), per_page)
    block = max(min(up(capacity), most), pieces * per_page)
    places = min(block, max(_KEYS, up(k)))
    step = min(queries, _QUERIES)
    blocks = pl.cdiv(capacity, block)
    return _Tiling(k, has_hidden, heads, queries, step, block, pieces, blocks, places)


def _check(q_BTIJ: Any, keys: Keys, visible_BT: Any, tiling: _Tiling) -> None:
    """Reject what the kernel does not support."""
    takes = "indexer_topk.select on TPUs takes"
    capacity = tiling.blocks * tiling.block
    scores = tiling.step * capacity
    scalars = visible_BT.size * (1 + tiling.has_hidden)
    if isinstance(keys, Fp4Keys) and (half := keys.codes.shape[2]) % FP4_BLOCK:
        raise Unsupported(f"{takes} Fp4Keys with a multiple of 64 channels, not {2 * half}.")
    if isinstance(keys, Paged):
        scalars += keys.table.size
        if keys.codec not in (None, FP4):
            raise Unsupported(f"{takes} pages in {FP4}, not in {keys.codec}.")
        n, least = keys.pages.shape[2], 1 if keys.codec is None else 32
        if (n % TILE and TILE % n) or n < least:
            raise Unsupported(
                f"{takes} pages whose size divides {TILE} or is a multiple of it, and of bytes is "
                f"32 or more, not {n}."
            )
    if scores > _MOST_SCORES:
        raise Unsupported(
            f"{takes} up to {_MOST_SCORES} scores per block of queries, not {scores}."
        )
    if capacity > (most := choice.MOST_ROWS * LANES):
        raise Unsupported(f"{takes} pools of up to {most} entries, not {capacity}.")
    if scalars > _MOST_SCALARS:
        raise Unsupported(f"{takes} up to {_MOST_SCALARS} lengths and page numbers, not {scalars}.")
    if tiling.k > _MOST_CHOSEN:
        raise Unsupported(f"{takes} k up to {_MOST_CHOSEN}, not {tiling.k}.")
    arrays: list[Any] = [q_BTIJ]
    if isinstance(keys, Paged):
        arrays += [] if keys.codec else [keys.pages]
    elif not isinstance(keys, Fp8Keys | Fp4Keys):
        arrays.append(keys)
    for array in arrays:
        if array.dtype not in _DTYPES or array.dtype.itemsize * array.shape[3] > _MOST_KEY_BYTES:
            raise Unsupported(
                f"{takes} queries and keys in bfloat16, float32 or E4M3, of up to"
                f" {_MOST_KEY_BYTES} bytes each, not {array.shape[3]} channels in {array.dtype}."
            )


def _key_blocks(keys: Keys, tiling: _Tiling) -> tuple[list[Any], list[Any]]:
    """The arrays of the keys, and their specs; index maps get the scalars of `select`."""

    def visible_block(row: Any, query_block: Any, step: Any, count_ref: Any, more: Any) -> Any:
        # Clamped to the blocks that some query sees: a repeated index fetches nothing.
        block = jnp.clip(step, 0, jnp.maximum(count_ref[row, query_block] - 1, 0))
        return block + more[1][row, query_block] if tiling.has_hidden else block

    def key_block(row: Any, query_block: Any, step: Any, *scalars: Any) -> Any:
        layer_ref, _, count_ref, *more = scalars
        return layer_ref[0], row, visible_block(row, query_block, step, count_ref, more), 0

    def key_block_in_lanes(*args: Any) -> Any:
        layer, row, block, _ = key_block(*args)
        return layer, row, 0, block

    match keys:
        case Paged():
            last_place, last_page = keys.table.shape[1] - 1, keys.pages.shape[1] - 1

            def page(piece: int, *args: Any) -> Any:
                # Clamped: the table may end within a block, and its unseen numbers be garbage.
                layer, row, block, _ = key_block(*args)
                table_ref = args[-1]
                place = jnp.minimum(block * tiling.pieces + piece, last_place)
                return layer, jnp.clip(table_ref[row, place], 0, last_page), 0, 0

            shape = (1, 1, *keys.pages.shape[2:])
            maps = [functools.partial(page, piece) for piece in range(tiling.pieces)]
            return [keys.pages] * tiling.pieces, [pl.BlockSpec(shape, index) for index in maps]
        case Fp8Keys():
            codes_spec = pl.BlockSpec((1, 1, tiling.block, keys.codes.shape[3]), key_block)
            scale_spec = pl.BlockSpec((1, 1, tiling.block // LANES, LANES), key_block)
            return [keys.codes, keys.scale], [codes_spec, scale_spec]
        case Fp4Keys():
            codes_spec = pl.BlockSpec((1, 1, keys.codes.shape[2], tiling.block), key_block_in_lanes)
            rows = tiling.block // LANES
            scale_spec = pl.BlockSpec((1, 1, rows, keys.scale.shape[3]), key_block)
            return [keys.codes, keys.scale], [codes_spec, scale_spec]
        case _:
            return [keys], [pl.BlockSpec((1, 1, tiling.block, keys.shape[3]), key_block)]


def _padded_heads(
    q_BTIJ: Float[Array, "B T I J"], weights_BTI: Float32[Array, "B T I"], dtype: Any
) -> tuple[Any, Any]:
    """Heads padded to full vectors with zero weights, in a dtype at least as wide as the keys'."""
    wide = jnp.dtype(jnp.bfloat16) if dtype == jnp.uint8 else dtype  # FP4 codes are bytes
    if wide.itemsize > q_BTIJ.dtype.itemsize:
        q_BTIJ = q_BTIJ.astype(wide)
    missing = -q_BTIJ.shape[2] % (32 // q_BTIJ.dtype.itemsize)
    if not missing:
        return q_BTIJ, weights_BTI
    q_BTIJ = jnp.pad(q_BTIJ, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return q_BTIJ, jnp.pad(weights_BTI, ((0, 0), (0, 0), (0, missing)))


def blocks_seen(
    visible_BT: Int32[Array, "B T"], hidden_BT: Int[Array, "B T"] | None, step: int, block: int
) -> list[Any]:
    """Visible entries per query, and visible key blocks per block of queries.

    If entries may be hidden, also the hidden entries, and the first visible key block.
    """
    batch, queries = visible_BT.shape

    def of_blocks(reduce: Any, x_BT: Any, fill: int) -> Any:
        padded = jnp.pad(x_BT, ((0, 0), (0, -queries % step)), constant_values=fill)
        return reduce(padded.reshape(batch, -1, step), axis=-1)

    if hidden_BT is None:
        return [visible_BT, (of_blocks(jnp.max, visible_BT, 0) + block - 1) // block]
    hidden_BT = jnp.maximum(hidden_BT.astype(jnp.int32), 0)
    # Queries that see nothing do not count.
    sees_BT, none = hidden_BT < visible_BT, jnp.iinfo(jnp.int32).max
    visible_BT = jnp.where(sees_BT, visible_BT, 0)
    end_BN = (of_blocks(jnp.max, visible_BT, 0) + block - 1) // block
    first_BN = of_blocks(jnp.min, jnp.where(sees_BT, hidden_BT, none), none) // block
    first_BN = jnp.minimum(first_BN, end_BN)
    return [visible_BT, end_BN - first_BN, hidden_BT, first_BN]


def _scratch(tiling: _Tiling, heads: int, *, coded: bool) -> list[Any]:
    """Scores, their peaks, weights along lanes, marks of chosen entries, counts per row, keys."""
    rows = choice.padded_rows(tiling.blocks * tiling.block // LANES)
    return [
        pltpu.VMEM((tiling.step, rows, LANES), jnp.int32),
        pltpu.VMEM((tiling.step, PEAKS, tiling.places // LANES, LANES), jnp.int32),
        pltpu.VMEM((tiling.step, heads, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.bfloat16),
        pltpu.VMEM((LANES, LANES), jnp.float32),
        pltpu.VMEM((1, 1, tiling.block, FP4.channels), jnp.bfloat16) if coded else None,
    ]


def _kernel(tiling: _Tiling, scalars: int, arrays: int, *refs: Any) -> None:
    """`refs`: the layer, results of `blocks_seen`, a page table; blocks of arrays; scratch."""
    _, visible_ref, blocks_ref, *more = refs[:scalars]
    q_ref, weights_ref, *key_refs, out_ref = refs[scalars : scalars + arrays + 3]
    scores_ref, peaks_ref, columns_ref, chosen_ref, counts_ref, decoded_ref = refs[
        scalars + arrays + 3 :
    ]
    scale_ref = key_refs.pop() if arrays > tiling.pieces else None
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first, rows = i * tiling.step, tiling.block // LANES
    queries = jnp.minimum(tiling.step, tiling.queries - first)
    start = more[1][b, i] * tiling.block if tiling.has_hidden else 0

    def bounds(t: Any) -> Any:
        visible = visible_ref[b, first + t]
        return (visible - start, more[0][b, first + t] - start) if tiling.has_hidden else (visible,)

    def each_query(body: Any) -> None:
        jax.lax.fori_loop(0, queries, lambda t, _: body(t, *bounds(t)), None)

    @pl.when(j == 0)
    def _start() -> None:
        peaks_ref[...] = jnp.full_like(peaks_ref, choice.NOTHING)
        each_query(lambda t, *_: _weights_along_lanes(weights_ref, columns_ref, t))

    @pl.when(j < blocks_ref[b, i])
    def _score() -> None:
        keys = _decoded(key_refs, decoded_ref), scale_ref
        outputs = lambda t: (scores_ref.at[t], peaks_ref.at[t])
        each_query(
            lambda t, *bounds: score_block(
                *(q_ref[0, t], columns_ref.at[t], *keys, *outputs(t), j * rows, *bounds),
                heads=tiling.heads,
                tiles=tiling.block // TILE,
            )
        )

    @pl.when(j == tiling.blocks - 1)
    def _choose() -> None:
        written = blocks_ref[b, i] * rows
        out = lambda t: out_ref.at[0, pl.ds(t, 1), :]
        scratch = chosen_ref, counts_ref
        each_query(
            lambda t, *bounds: choice.choose(
                scores_ref.at[t], peaks_ref.at[t], *scratch, out(t), written, *bounds, k=tiling.k
            )
        )
        if tiling.has_hidden:
            chosen_Qk = out_ref[0]
            out_ref[0] = jnp.where(chosen_Qk < 0, -1, chosen_Qk + start)


def _decoded(key_refs: list[Any], decoded_ref: Any) -> list[Any]:
    """Refs to the block's keys as numbers; without `decoded_ref` they are already."""
    if decoded_ref is None:
        return key_refs
    per_piece = key_refs[0].shape[2]
    for piece, ref in enumerate(key_refs):
        to = decoded_ref.at[0, 0, pl.ds(piece * per_piece, per_piece)]
        tpu_byte_rows.decode(ref.at[0, 0], to, FP4)
    return [decoded_ref]


def _weights_along_lanes(weights_ref: Any, columns_ref: Any, t: Int32[Array, ""]) -> None:
    row_1I = weights_ref[0, pl.ds(t, 1), :]
    columns_ref[t] = jnp.broadcast_to(row_1I, (LANES, row_1I.shape[1])).T
