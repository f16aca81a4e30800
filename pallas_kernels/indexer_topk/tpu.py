"""The choice on TPUs: scores of a block of keys go to VMEM as integers, and never leave it.

Grid: rows of the batch, blocks of up to 8 queries, blocks of keys. A query block reads only the key
blocks that its queries see; its queries share each reading. After the last one each query's list
is made (`tpu_choice`). Where entries are hidden, the first grid step is the first key block that
is seen, and the kernel counts entries from there.

Axis letters: as in the package; Q queries of a block, X keys of a block, R rows of 128 entries,
N entries of a page, M pages of a row's table.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import tpu_choice as choice
from pallas_kernels.indexer_topk.keys import FP4_BLOCK, Fp4Keys, Fp8Keys, Keys, PagedKeys, entries
from pallas_kernels.indexer_topk.tpu_scores import LANES, PEAKS, TILE, score_block
from pallas_kernels.mosaic_tpu import in_hbm

_QUERIES = 8
# Long blocks hide more of the time that a product takes to appear, but a prompt sees less of them.
_KEYS, _KEYS_OF_FEW = 4096, 16384
_PIECES = 32  # pages of a block
_VMEM = 48 * 2**20
_MOST_SCORES = _VMEM // 2 // 4
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
    """Decode and prefill are one form: blocks of up to 8 queries."""
    batch, queries = visible_BT.shape
    tiling = _tiling(keys, q_BTIJ.shape[2], queries, k, hidden_BT is not None)
    _check(q_BTIJ, keys, visible_BT, tiling)
    visible_BT = jnp.clip(visible_BT.astype(jnp.int32), 0, entries(keys))
    scalars = [
        layer.astype(jnp.int32)[None],
        *blocks_seen(visible_BT, hidden_BT, tiling.step, tiling.block),
    ]
    if isinstance(keys, PagedKeys):
        scalars.append(keys.table.astype(jnp.int32))
    arrays, specs = _keys_blocks(keys, tiling)
    q_BTIJ, weights_BTI = _whole_heads(q_BTIJ, weights_BTI.astype(jnp.float32), arrays[0].dtype)
    of_queries = lambda *dims: pl.BlockSpec(
        (1, tiling.step, *dims), lambda b, i, j, *_: (b, i, *(0 for _ in dims))
    )
    return pl.pallas_call(
        functools.partial(_kernel, tiling, len(scalars), len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, pl.cdiv(queries, tiling.step), tiling.blocks),
            in_specs=[of_queries(*q_BTIJ.shape[2:]), of_queries(q_BTIJ.shape[2]), *specs],
            out_specs=of_queries(k),
            scratch_shapes=_scratch(tiling, q_BTIJ.shape[2]),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, queries, k), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name="indexer_topk_select",
    )(*scalars, q_BTIJ, weights_BTI, *in_hbm(arrays))


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Sizes that kernel and caller share.

    Attributes:
      k: entries chosen.
      hides: whether entries at the front may be hidden.
      heads: of the index, without padding.
      queries: per row of the batch.
      step: queries of a block.
      block: keys of a block.
      pieces: pages of a block, or 1.
      blocks: of keys.
      places: in a block of keys, of each of which the peaks are kept.
    """

    k: int
    hides: bool
    heads: int
    queries: int
    step: int
    block: int
    pieces: int
    blocks: int
    places: int


def _tiling(keys: Keys, heads: int, queries: int, k: int, hides: bool) -> _Tiling:
    """Blocks are whole tiles, of at least k keys, unless there is only one."""
    up = lambda n: pl.cdiv(n, TILE) * TILE
    room, pieces, per_page = entries(keys), 1, 0
    wanted = max(_KEYS_OF_FEW if queries <= _QUERIES else _KEYS, up(k))
    if isinstance(keys, PagedKeys):
        per_page = keys.pages.shape[2]
        wanted = max(min(wanted, up(_PIECES * per_page)), up(k))
        pieces = pl.cdiv(min(up(room), wanted), per_page)
    block = max(min(up(room), wanted), pieces * per_page)
    places = min(block, max(_KEYS, up(k)))
    step = min(queries, _QUERIES)
    return _Tiling(k, hides, heads, queries, step, block, pieces, pl.cdiv(room, block), places)


def _check(q_BTIJ: Any, keys: Keys, visible_BT: Any, tiling: _Tiling) -> None:
    """Refuse what the kernel cannot do."""
    takes = "indexer_topk.select on TPU takes"
    scores, scalars = (
        tiling.step * tiling.blocks * tiling.block,
        visible_BT.size * (1 + tiling.hides),
    )
    if isinstance(keys, Fp4Keys) and keys.codes.shape[2] % FP4_BLOCK:
        raise Unsupported(f"{takes} Fp4Keys of a multiple of 64 channels.")
    if isinstance(keys, PagedKeys):
        scalars += keys.table.size
        if (n := keys.pages.shape[2]) % TILE and TILE % n:
            raise Unsupported(f"{takes} pages that divide {TILE} or are a multiple, not {n}.")
    if scores > _MOST_SCORES:
        raise Unsupported(f"{takes} {_MOST_SCORES} scores of a block of queries, not {scores}.")
    if scalars > _MOST_SCALARS:
        raise Unsupported(f"{takes} {_MOST_SCALARS} lengths and pages, not {scalars}.")
    if tiling.k > _MOST_CHOSEN:
        raise Unsupported(f"{takes} k up to {_MOST_CHOSEN}, not {tiling.k}.")
    stored = keys.pages if isinstance(keys, PagedKeys) else keys
    for array in (q_BTIJ, *([] if isinstance(stored, Fp8Keys | Fp4Keys) else [stored])):
        if array.dtype not in _DTYPES or array.dtype.itemsize * array.shape[3] > _MOST_KEY_BYTES:
            raise Unsupported(
                f"{takes} queries and keys in bfloat16, float32 or E4M3, of up to"
                f" {_MOST_KEY_BYTES} bytes each, not {array.shape[3]} numbers in {array.dtype}."
            )


def _keys_blocks(keys: Keys, tiling: _Tiling) -> tuple[list[Any], list[Any]]:
    """The arrays that hold keys, and how a block of each is found."""

    def seen(b: Any, i: Any, j: Any, blocks: Any, more: Any) -> Any:
        # Blocks that are not seen are not read: what is here already stays.
        block = jnp.clip(j, 0, jnp.maximum(blocks[b, i] - 1, 0))
        return block + more[1][b, i] if tiling.hides else block

    def at(b: Any, i: Any, j: Any, layer: Any, _: Any, blocks: Any, *more: Any) -> Any:
        return layer[0], b, seen(b, i, j, blocks, more), 0

    def along_lanes(*args: Any) -> Any:
        layer, b, block, _ = at(*args)
        return layer, b, 0, block

    match keys:
        case PagedKeys():
            last = keys.table.shape[1] - 1, keys.pages.shape[1] - 1

            def page(piece: int, *args: Any) -> Any:
                layer, b, block, _ = at(*args)
                table = args[-1]
                entry = jnp.minimum(block * tiling.pieces + piece, last[0])
                return layer, jnp.clip(table[b, entry], 0, last[1]), 0, 0

            shape = (1, 1, *keys.pages.shape[2:])
            maps = [functools.partial(page, piece) for piece in range(tiling.pieces)]
            return [keys.pages] * tiling.pieces, [pl.BlockSpec(shape, index) for index in maps]
        case Fp8Keys():
            codes_spec = pl.BlockSpec((1, 1, tiling.block, keys.codes.shape[3]), at)
            scale_spec = pl.BlockSpec((1, 1, tiling.block // LANES, LANES), at)
            return [keys.codes, keys.scale], [codes_spec, scale_spec]
        case Fp4Keys():
            codes_spec = pl.BlockSpec((1, 1, keys.codes.shape[2], tiling.block), along_lanes)
            scale_spec = pl.BlockSpec((1, 1, tiling.block // LANES, keys.scale.shape[3]), at)
            return [keys.codes, keys.scale], [codes_spec, scale_spec]
        case _:
            return [keys], [pl.BlockSpec((1, 1, tiling.block, keys.shape[3]), at)]


def _whole_heads(
    q_BTIJ: Float[Array, "B T I J"], weights_BTI: Float32[Array, "B T I"], dtype: Any
) -> tuple[Any, Any]:
    """Heads up to whole vectors, of which those added weigh nothing; as wide as keys at least."""
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
    """What is visible, and the number of key blocks that each block of queries sees something of.

    Where entries are hidden, also how many, and the first of these blocks.
    """
    batch, queries = visible_BT.shape

    def of_blocks(most: Any, x_BT: Any, fill: int) -> Any:
        padded = jnp.pad(x_BT, ((0, 0), (0, -queries % step)), constant_values=fill)
        return most(padded.reshape(batch, -1, step), axis=-1)

    if hidden_BT is None:
        return [visible_BT, (of_blocks(jnp.max, visible_BT, 0) + block - 1) // block]
    hidden_BT = jnp.maximum(hidden_BT.astype(jnp.int32), 0)
    # Queries that see nothing have no say.
    sees_BT, none = hidden_BT < visible_BT, jnp.iinfo(jnp.int32).max
    visible_BT = jnp.where(sees_BT, visible_BT, 0)
    end_BN = (of_blocks(jnp.max, visible_BT, 0) + block - 1) // block
    first_BN = of_blocks(jnp.min, jnp.where(sees_BT, hidden_BT, none), none) // block
    first_BN = jnp.minimum(first_BN, end_BN)
    return [visible_BT, end_BN - first_BN, hidden_BT, first_BN]


def _scratch(tiling: _Tiling, heads: int) -> list[Any]:
    """Scores, their maxima, weights along lanes; marks of the chosen, and their number per row."""
    rows = choice.whole_rows(tiling.blocks * tiling.block // LANES)
    return [
        pltpu.VMEM((tiling.step, rows, LANES), jnp.int32),
        pltpu.VMEM((tiling.step, PEAKS, tiling.places // LANES, LANES), jnp.int32),
        pltpu.VMEM((tiling.step, heads, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.bfloat16),
        pltpu.VMEM((LANES, LANES), jnp.float32),
    ]


def _kernel(tiling: _Tiling, scalars: int, arrays: int, *refs: Any) -> None:
    """`refs` are the layer, what `blocks_seen` gives, a table; blocks of arrays; scratch."""
    _, visible_ref, blocks_ref, *more = refs[:scalars]
    q_ref, weights_ref, *key_refs, out_ref = refs[scalars : scalars + arrays + 3]
    scores_ref, peaks_ref, columns_ref, chosen_ref, counts_ref = refs[scalars + arrays + 3 :]
    scale_ref = key_refs.pop() if arrays > tiling.pieces else None
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first, rows = i * tiling.step, tiling.block // LANES
    here = jnp.minimum(tiling.step, tiling.queries - first)
    start = more[1][b, i] * tiling.block if tiling.hides else 0

    def seen(t: Any) -> Any:
        visible = visible_ref[b, first + t]
        return (visible - start, more[0][b, first + t] - start) if tiling.hides else (visible,)

    def each(body: Any) -> None:
        jax.lax.fori_loop(0, here, lambda t, _: body(t, *seen(t)), None)

    @pl.when(j == 0)
    def _start() -> None:
        peaks_ref[...] = jnp.full_like(peaks_ref, choice.NOTHING)
        each(lambda t, *_: _weights_along_lanes(weights_ref, columns_ref, t))

    @pl.when(j < blocks_ref[b, i])
    def _score() -> None:
        keys = key_refs, scale_ref
        into = lambda t: (scores_ref.at[t], peaks_ref.at[t])
        each(
            lambda t, *seen: score_block(
                *(q_ref[0, t], columns_ref.at[t], *keys, *into(t), j * rows, *seen),
                heads=tiling.heads,
                tiles=tiling.block // TILE,
            )
        )

    @pl.when(j == tiling.blocks - 1)
    def _choose() -> None:
        room = chosen_ref, counts_ref
        written = blocks_ref[b, i] * rows
        out = lambda t: out_ref.at[0, pl.ds(t, 1), :]
        each(
            lambda t, *seen: choice.choose(
                scores_ref.at[t], peaks_ref.at[t], *room, out(t), written, *seen, k=tiling.k
            )
        )
        if tiling.hides:
            chosen_Qk = out_ref[0]
            out_ref[0] = jnp.where(chosen_Qk < 0, -1, chosen_Qk + start)


def _weights_along_lanes(weights_ref: Any, columns_ref: Any, t: Int32[Array, ""]) -> None:
    row_1I = weights_ref[0, pl.ds(t, 1), :]
    columns_ref[t] = jnp.broadcast_to(row_1I, (LANES, row_1I.shape[1])).T
