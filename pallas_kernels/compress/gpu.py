"""Entries on NVIDIA GPUs from Hopper on: tokens are read once, where they lie, and entries written.

A block of threads has a warpgroup for every 128 channels of its windows' entries. Each pools its
own (`gpu_pool`); norm, RoPE, Hadamard transform and rounding follow in registers (`gpu_finish`).
XLA only writes the rotary table's values twice each, as long as channels: a thread cannot choose
what it reads by its own number, in JAX 0.10 or 0.11.

Axis letters: as in the package; W windows of a block, V channels of a warpgroup, D a token's kv and
gate, H tokens of the first windows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.compress import gpu_finish, gpu_pool
from pallas_kernels.compress.gpu_finish import CHANNELS, Finish
from pallas_kernels.compress.gpu_pool import Pieces
from pallas_kernels.implementations import Unsupported

# A block has up to 1024 threads.
_WARPGROUPS = 8
# References, row of the batch, first entry, columns of a series (of kv, or of the gate) -> how a
# piece is brought, where its tokens are, and whether the entry is wanted if it may not be.
_Source = Callable[..., tuple[Callable[..., None], gpu_pool.Place, Any]]


def pool(
    kv_BXC: Float[Array, "B X C"],
    gate_BXC: Float[Array, "B X C"],
    bias_MC: Float[Array, "M C"],
    first_B: Int[Array, " B"],
    *,
    overlap: int,
) -> Float32[Array, "B n K"]:
    """As the package says.

    Raises:
      Unsupported: unless entries have a multiple of 128 channels, 1024 at most, in bfloat16 or
        float32.
    """
    _require(bias_MC, overlap, kv_BXC, gate_BXC)
    M, (B, X, _) = bias_MC.shape[0], kv_BXC.shape
    n = X // M - overlap + 1
    pieces = _pieces(bias_MC, overlap, n, (kv_BXC.dtype, gate_BXC.dtype), each_window=False)
    N = pieces.tokens

    def source(refs: Any, row: Any, entry: Any, columns: Any) -> Any:
        def bring(piece: Any, tiles: Any, here: Any) -> None:
            for series in range(overlap):
                tokens = pl.ds((entry + series) * M + piece * N, pieces.windows * N)
                for ref, tile in zip(refs[:2], tiles, strict=True):
                    part = ref.at[row, tokens, columns(series)]
                    plgpu.copy_gmem_to_smem(part, tile.at[series], here)

        return bring, _in_order(refs[2][row] + entry, overlap, N), None

    arrays = kv_BXC, gate_BXC, first_B.astype(jnp.int32)
    dtypes = kv_BXC.dtype, gate_BXC.dtype
    return _entries("compress_pool", source, arrays, bias_MC, pieces, (B, n), dtypes)


def prefill(
    rows_BTC: Float[Array, "B T D"],
    before_BPC: Float[Array, "B P D"],
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
    """As the package says. Only the first windows, which begin before the chunk, are copied.

    Raises:
      Unsupported: as for `pool`; more than 128 turned channels; FP4 of other than 128 channels.
    """
    _require(bias_MC, overlap, rows_BTC, before_BPC)
    finish = _finish(scale_K, table, eps, rounding, dtype)
    (M, C), (B, T, _) = bias_MC.shape, rows_BTC.shape
    n = -(-T // M)
    start_B = start_B.astype(jnp.int32)
    head_BHC = _head(rows_BTC, before_BPC, start_B, M)
    pieces = _pieces(bias_MC, overlap, n, (rows_BTC.dtype,) * 2, each_window=True)
    N = pieces.tokens

    def source(refs: Any, row: Any, entry: Any, columns: Any) -> Any:
        rows_ref, head_ref, start_ref = refs
        start = start_ref[row]

        def bring(piece: Any, tiles: Any, here: Any) -> None:
            def copy(ref: Any, first: Any, series: int, window: Any) -> None:
                for half, tile in enumerate(tiles):
                    part = ref.at[row, pl.ds(first, N), columns(series, half * C)]
                    to = tile.at[series, pl.ds(window * N, N)]
                    plgpu.copy_gmem_to_smem(part, to, here)

            def one(series: int, window: Any) -> None:
                # Windows count from that of the chunk's first token, which the head ends with.
                index = entry + window + series - overlap + 1
                first = index * M + piece * N
                in_head = first + (overlap - 1) * M
                pl.when(index <= 0)(lambda: copy(head_ref, in_head, series, window))
                if n > 1:
                    # What an incomplete window reads does not matter, but must be there.
                    in_rows = jnp.minimum(first - jax.lax.rem(start, M), T - N)
                    pl.when(index > 0)(lambda: copy(rows_ref, in_rows, series, window))

            for series in range(overlap):
                pl.loop(0, pieces.windows)(lambda window, series=series: one(series, window))

        return bring, _in_order(jax.lax.div(start, M) + entry, overlap, N), None

    arrays, dtypes = (rows_BTC, head_BHC, start_B), (rows_BTC.dtype,) * 2
    norm = scale_K, *map(gpu_finish.in_lanes, table)
    return _entries(
        "compress_prefill", source, arrays, bias_MC, pieces, (B, n), dtypes, (finish, norm)
    )


def decode(
    ring_LBRC: Float[Array, "L B R D"],
    layer: Int[Array, ""],
    window_B: Int[Array, " B"],
    bias_MC: Float[Array, "M C"],
    scale_K: Float[Array, " K"],
    table: tuple[Float[Array, "B 1 Q"], Float[Array, "B 1 Q"]],
    *,
    overlap: int,
    eps: float,
    rounding: str,
    dtype: Any,
) -> Float[Array, "B 1 K"]:
    """As the package says. Reads the whole ring of a row, which is little longer than its windows.

    Raises:
      Unsupported: as for `prefill`.
    """
    _require(bias_MC, overlap, ring_LBRC)
    finish = _finish(scale_K, table, eps, rounding, dtype)
    (M, C), (_, B, R, _) = bias_MC.shape, ring_LBRC.shape
    dtypes = (ring_LBRC.dtype,) * 2
    N = min(R, gpu_pool.most_tokens(*dtypes, overlap))
    pieces = Pieces(1, N, -(-R // N), overlap, C // overlap // CHANNELS, copies=2 * overlap)

    def source(refs: Any, row: Any, entry: Any, columns: Any) -> Any:
        del entry
        ring_ref, layer_ref, window_ref = refs
        window = window_ref[row]
        # The last piece reaches back.
        start = lambda piece: jnp.minimum(piece * N, R - N)

        def bring(piece: Any, tiles: Any, here: Any) -> None:
            for series in range(overlap):
                for half, tile in enumerate(tiles):
                    at = layer_ref[0], row, pl.ds(start(piece), N), columns(series, half * C)
                    plgpu.copy_gmem_to_smem(ring_ref.at[at], tile.at[series], here)

        def place(_: Any, series: int, piece: Any, i: Any) -> Any:
            # A whole number of rings is added lest the remainder be negative.
            begins = (window + series - overlap + 1) * M + -(-overlap * M // R) * R
            after = start(piece) + i - jax.lax.rem(begins, R)
            token = jnp.where(after < 0, after + R, after)
            counts = (token < M) & (start(piece) + i >= piece * N)
            return i, jnp.minimum(token, M - 1), counts & (window + series >= overlap - 1)

        return bring, place, window >= 0

    arrays = ring_LBRC, layer.astype(jnp.int32).reshape(1), window_B.astype(jnp.int32)
    norm = scale_K, *map(gpu_finish.in_lanes, table)
    return _entries(
        "compress_decode", source, arrays, bias_MC, pieces, (B, 1), dtypes, (finish, norm)
    )


def _require(bias_MC: Any, overlap: int, *tokens: Any) -> None:
    channels = bias_MC.shape[1] // overlap
    if channels % CHANNELS or channels > _WARPGROUPS * CHANNELS:
        raise Unsupported(
            f"The GPU kernel takes entries of a multiple of {CHANNELS} channels, up to"
            f" {_WARPGROUPS * CHANNELS}, not of {channels}."
        )
    dtypes = [x.dtype for x in (bias_MC, *tokens)]
    if not set(dtypes) <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        raise Unsupported(f"The GPU kernel takes bfloat16 and float32, not {dtypes}.")


def _finish(scale_K: Any, table: Any, eps: float, rounding: str, dtype: Any) -> Finish:
    channels, rotated = len(scale_K), 2 * table[0].shape[-1]
    if rotated > CHANNELS or (rounding == "fp4" and channels != CHANNELS):
        raise Unsupported(
            f"The GPU kernel turns up to {CHANNELS} channels and rounds entries of {CHANNELS} to"
            f" FP4, not {rotated} of {channels} with rounding {rounding!r}."
        )
    return Finish(channels, rotated, eps, rounding, dtype)


def _pieces(
    bias_MC: Any, overlap: int, entries: int, dtypes: tuple[Any, Any], *, each_window: bool
) -> Pieces:
    """Of whole windows if they are short, of one window otherwise; by one copy, or one for each."""
    M, C = bias_MC.shape
    most = gpu_pool.most_tokens(*dtypes, overlap)
    tokens = max(n for n in range(1, min(M, most) + 1) if M % n == 0)
    windows = min(entries, most // M) if tokens == M else 1
    copies = 2 * overlap * (windows if each_window else 1)
    return Pieces(windows, tokens, M // tokens, overlap, C // overlap // CHANNELS, copies)


def _in_order(first: Any, overlap: int, tokens: int) -> gpu_pool.Place:
    """Where a block's tokens are whose first window is `first`, copied window by window."""

    def place(window: Any, series: int, piece: Any, i: Any) -> Any:
        exists = first + window + series >= overlap - 1
        return window * tokens + i, piece * tokens + i, exists

    return place


def _head(rows_BTC: Any, before_BPC: Any, start_B: Any, ratio: int) -> Float[Array, "B H D"]:
    """Tokens of the windows up to that of the chunk's first token; beyond the chunk zero."""
    missing = max(0, ratio - rows_BTC.shape[1])
    soon_BMC = jnp.pad(rows_BTC[:, :ratio], ((0, 0), (0, missing), (0, 0)))
    tokens_BXC = jnp.concatenate([before_BPC, soon_BMC], axis=1)
    cut = lambda x_XC, at: jax.lax.dynamic_slice_in_dim(x_XC, at, before_BPC.shape[1])
    return jax.vmap(cut)(tokens_BXC, ratio - start_B % ratio)


def _entries(
    name: str,
    source: _Source,
    arrays: tuple[Array, ...],
    bias_MC: Float[Array, "M C"],
    pieces: Pieces,
    entries: tuple[int, int],
    dtypes: tuple[Any, Any],
    finishing: tuple[Finish, tuple[Array, ...]] | None = None,
) -> Float[Array, "B n K"]:
    """Run the kernel.

    Args:
      name: of the kernel.
      source: of a block's tokens.
      arrays: its own.
      bias_MC: as in the package.
      pieces: of a block's tokens.
      entries: B and n.
      dtypes: of kv and gate.
      finishing: with its arrays; without, sums are written as they are.
    """
    (B, n), W, K = entries, pieces.windows, pieces.warpgroups * CHANNELS
    finish, norm = finishing or (None, ())
    dtype = finish.dtype if finish else jnp.float32

    def body(*refs: Any, **smem: Any) -> None:
        *inputs, out_BnK = refs
        sources, bias_ref, norm_refs = (
            inputs[: len(arrays)],
            inputs[len(arrays)],
            inputs[len(arrays) + 1 :],
        )
        row, warpgroup = jax.lax.axis_index("row"), jax.lax.axis_index("warpgroup")
        entry = jnp.minimum(jax.lax.axis_index("block") * W, n - W)
        columns = lambda series, left=0: pl.ds(left + series * K + warpgroup * CHANNELS, CHANNELS)
        bring, place, wanted = source(sources, row, entry, columns)
        entries_WV = smem["entries"].at[warpgroup]

        def make() -> None:
            biases = [bias_ref.at[:, columns(series)] for series in range(pieces.overlap)]
            gpu_pool.run(pieces, bring, place, biases, warpgroup, smem)
            if finish:
                x_F = finish(norm_refs, (row, entry), warpgroup, smem)
            else:
                x_F = gpu_finish.read(smem["line"].at[warpgroup], 0, W * CHANNELS)
            entries_WV[...] = x_F.astype(dtype).reshape(W, CHANNELS)

        if wanted is None:
            make()
        else:
            pl.when(wanted)(make)

            @pl.when(jnp.logical_not(wanted))
            def _() -> None:
                entries_WV[...] = jnp.zeros((W, CHANNELS), dtype)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(entries_WV, out_BnK.at[row, pl.ds(entry, W), columns(0)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, n, K), dtype),
        grid=(B, -(-n // W)),
        grid_names=("row", "block"),
        num_threads=pieces.warpgroups,
        thread_name="warpgroup",
        scratch_types={
            **pieces.scratch(*dtypes),
            **gpu_finish.scratch(W, pieces.warpgroups),
            "entries": plgpu.SMEM((pieces.warpgroups, W, CHANNELS), dtype),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
    )(*arrays, bias_MC, *norm)
