"""Top k on NVIDIA GPUs from Hopper on, by two Mosaic GPU kernels: candidates, and their merge.

Each thread block scores a chunk of entries for one query (`gpu_scores`), keeps the scores in shared
memory and selects the chunk's k best (`gpu_select`). The chunks' lists are merged, 8192 candidates
at a time, until one is left. Only lists go through device memory: 8 bytes per candidate.

Axis letters: as in the package; N rows (B * T queries), H chunks, K entries of a list (k, rounded
up to full blocks), G groups of lists, C candidates of a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.byte_rows import FP4
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import gpu_scores, gpu_select
from pallas_kernels.indexer_topk.gpu_scores import HEADS, TILE
from pallas_kernels.indexer_topk.gpu_select import NOTHING, SIZE
from pallas_kernels.indexer_topk.keys import Keys, entries
from pallas_kernels.mosaic_gpu import PARAMS
from pallas_kernels.paged import Paged

# Thread blocks that fill an H200 once.
_BLOCKS = 128
_FEWEST_ENTRIES = 1024
# Bytes of lists at a time: long prompts are processed in turns.
_LIST_BYTES = 16 * 2**20


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
    """See the package.

    Raises:
      Unsupported: unless queries are bfloat16 or E4M3 and keys bfloat16 or Fp8Keys, pages hold a
        multiple of 64 entries, there are at most 128 heads of dim 64 or 128 (128 with Fp8Keys),
        the capacity is a multiple of 8 entries (for TMA), at least 64, k is at most 4096, and
        hidden_BT is None. Pages may also be in `byte_rows.FP4`.
    """
    if hidden_BT is not None:
        raise Unsupported("The GPU kernel does not take hidden_BT.")
    arrays = gpu_scores.arrays_of(keys)
    capacity = entries(keys)
    _require(q_BTIJ, capacity, k)
    if isinstance(keys, Paged) and keys.codec is not None:
        q_BTIJ = FP4.by_nibble(q_BTIJ)
    batch, queries, heads, _ = q_BTIJ.shape
    rows = batch * queries
    chunk = _chunk(rows, capacity, k)
    fits = max(1, _LIST_BYTES // (8 * pl.cdiv(capacity, chunk) * gpu_select.slots(k)))
    turns = pl.cdiv(rows, min(rows, fits))
    block = pl.cdiv(rows, turns)

    def in_turns(x: Array) -> Array:
        x = x.reshape(rows, *x.shape[2:])
        x = jnp.pad(x, ((0, turns * block - rows), *((0, 0),) * (x.ndim - 1)))
        # Flat: otherwise XLA transposes all queries at once, which needs as much memory as they do.
        return x.reshape(turns, -1)

    row_BT = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], (batch, queries))
    row_and_visible_BT2 = jnp.stack([row_BT, visible_BT.astype(jnp.int32)], axis=-1)
    layer_1 = layer.astype(jnp.int32).reshape(1)

    def select_turn(turn: Any) -> Array:
        q_NIJ = turn[0].reshape(block, heads, -1)
        weights_NI, row_and_visible_N2 = (x.reshape(block, -1) for x in turn[1:])
        # Heads last, as products need them, and padded to full tiles.
        padding = ((0, 0), (0, -heads % HEADS))
        q_NJI = jnp.pad(q_NIJ.astype(jnp.bfloat16).swapaxes(1, 2), ((0, 0), *padding))
        weights_NI = jnp.pad(weights_NI.astype(jnp.float32), padding)
        inputs = q_NJI, weights_NI, row_and_visible_N2, layer_1
        return _merged(*_candidates(inputs, keys, arrays, heads=heads, chunk=chunk, k=k), k)

    chosen = jax.lax.map(
        select_turn, (in_turns(q_BTIJ), in_turns(weights_BTI), in_turns(row_and_visible_BT2))
    )
    return chosen.reshape(turns * block, -1)[:rows, :k].reshape(batch, queries, k)


def _require(q_BTIJ: Any, capacity: int, k: int) -> None:
    """Reject what the kernels do not support."""
    if q_BTIJ.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise Unsupported(f"The GPU kernel takes bfloat16 or E4M3 queries, not {q_BTIJ.dtype}.")
    *_, heads, dim = q_BTIJ.shape
    if heads > 128 or dim not in (64, 128):
        raise Unsupported(
            f"The GPU kernel takes up to 128 heads of dim 64 or 128, not {heads} of {dim}."
        )
    if capacity < TILE or capacity % 8 or gpu_select.slots(k) > SIZE // 2:
        raise Unsupported(
            f"The GPU kernel chooses up to {SIZE // 2} entries from a multiple of 8, at least"
            f" {TILE}, not {k} from {capacity}."
        )


def _chunk(rows: int, capacity: int, k: int) -> int:
    """Entries per thread block: many, unless the blocks would then be too few to fill a GPU."""
    chunk, least = SIZE, max(_FEWEST_ENTRIES, 2 * k)
    while chunk // 2 >= least and (chunk // 2 >= capacity or rows * capacity < _BLOCKS * chunk):
        chunk //= 2
    return chunk


def _candidates(
    inputs: tuple[Array, ...],
    keys: Keys,
    arrays: tuple[Array, ...],
    *,
    heads: int,
    chunk: int,
    k: int,
) -> tuple[Int32[Array, "N H K"], Int32[Array, "N H K"]]:
    """Each chunk's best: indices, ascending, then -1; and their keys, then NOTHING.

    `inputs` are q_NJI in bfloat16, weights_NI in float32, each query's batch row and visible
    entries [N, 2], and the layer [1]. `arrays` are the keys' `gpu_scores.arrays_of`. `heads` does
    not count padding.
    """
    rows, dim, padded = inputs[0].shape
    capacity, width = entries(keys), gpu_select.slots(k)
    out = jax.ShapeDtypeStruct((rows, pl.cdiv(capacity, chunk), width), jnp.int32)
    slots = plgpu.SMEM((width,), jnp.int32)

    def body(q_ref, weights_ref, row_and_visible_ref, layer_ref, *refs):
        *array_refs, entry_out, key_out, score_ref, entry_ref, key_ref = refs
        part, row = jax.lax.axis_index("chunk"), jax.lax.axis_index("row")
        first, visible = part * chunk, row_and_visible_ref[row, 1]
        for ref, empty in ((score_ref, NOTHING), (entry_ref, -1), (key_ref, NOTHING)):
            ref[...] = jnp.full(ref.shape, empty, jnp.int32)

        @pl.when(first < visible)
        def _() -> None:
            score = gpu_scores.score_chunk(
                (array_refs, isinstance(keys, Paged)),
                layer_ref[0],
                row_and_visible_ref[row, 0],
                q_ref.at[row],
                weights_ref.at[row],
                span=(first, jnp.minimum(visible, first + chunk), capacity),
                heads=heads,
            )
            buffers = gpu_scores.buffers(keys, dim, padded)
            pl.run_scoped(lambda **smem: score(score_ref, smem), **buffers)
            gpu_select.select(score_ref, entry_ref, k)
            gpu_select.fetch(score_ref, entry_ref, key_ref)
            entry_ref[...] = _entries(entry_ref[...], first, capacity)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(entry_ref, entry_out.at[row, part])
        plgpu.copy_smem_to_gmem(key_ref, key_out.at[row, part])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(out, out),
        # Adjacent blocks read the same keys.
        grid=(out.shape[1], rows),
        grid_names=("chunk", "row"),
        scratch_types=[plgpu.SMEM((gpu_select.ROWS, gpu_select.COLUMNS), jnp.int32), slots, slots],
        compiler_params=PARAMS,
        kernel_name="indexer_candidates",
    )(*inputs, *arrays)


def _entries(at_K: Array, first: Array, capacity: int) -> Array:
    """Indices of the entries at places of a chunk."""
    entry_K = gpu_scores.start_of(first + (at_K & -TILE), capacity) + (at_K & (TILE - 1))
    return jnp.where(at_K < 0, -1, entry_K)


def _merged(
    entry_NHK: Int32[Array, "N H K"], key_NHK: Int32[Array, "N H K"], k: int
) -> Int32[Array, "N K"]:
    """Merge lists into one: the k best, ascending."""
    rows, lists, width = entry_NHK.shape
    together = SIZE // width
    while lists > 1:
        groups = -(-lists // together)

        def gather(x_NHK: Array, fill: int, groups: int = groups) -> Array:
            missing = groups * together - x_NHK.shape[1]
            x_NHK = jnp.pad(x_NHK, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
            x_NGC = x_NHK.reshape(rows, groups, together * width)
            unused = SIZE - together * width
            return jnp.pad(x_NGC, ((0, 0), (0, 0), (0, unused)), constant_values=fill)

        entry_NGC, key_NGC = gather(entry_NHK, -1), gather(key_NHK, NOTHING)
        at_NGK = _best_of_keys(key_NGC, k)
        pick = lambda x, at: jnp.take_along_axis(x, jnp.maximum(at, 0), axis=2)
        exists_NGK = at_NGK >= 0
        entry_NHK = jnp.where(exists_NGK, pick(entry_NGC, at_NGK), -1)
        key_NHK = jnp.where(exists_NGK, pick(key_NGC, at_NGK), NOTHING)
        lists = groups
    return entry_NHK[:, 0]


def _best_of_keys(key_NGC: Int32[Array, "N G C"], k: int) -> Int32[Array, "N G K"]:
    """Places of the k best of each group of 8192 keys."""
    rows, groups, _ = key_NGC.shape
    width = gpu_select.slots(k)

    def body(key_hbm, at_out, key_ref, at_ref, barrier):
        group, row = jax.lax.axis_index("group"), jax.lax.axis_index("row")
        plgpu.copy_gmem_to_smem(key_hbm.at[row, group], key_ref, barrier)
        plgpu.barrier_wait(barrier)
        gpu_select.select(key_ref, at_ref, k)
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
        ],
        compiler_params=PARAMS,
        kernel_name="indexer_merge",
    )(key_NGC.reshape(rows, groups, gpu_select.ROWS, gpu_select.COLUMNS))
