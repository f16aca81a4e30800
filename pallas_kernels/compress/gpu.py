"""Entries on NVIDIA GPUs from Hopper on: tokens are read once, in place, and entries written once.

A block of threads has a warpgroup for every 128 channels of its windows' entries. Each pools its
channels (`gpu_pool`); norm, RoPE, Hadamard transform and rounding follow in registers
(`gpu_finish`). XLA only repeats the rotary table's values so that there is one per channel: in JAX
0.10 and 0.11 a thread cannot index what it reads by its number.

Axis letters: as in the package; W windows of a block, V channels of a warpgroup, D a token's kv and
gate, H tokens of the first windows.
"""

import dataclasses
import functools
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
from pallas_kernels.mosaic_gpu import PARAMS

# A block has up to 1024 threads.
_WARPGROUPS = 8
# References, row of the batch, first entry, columns of a series (of kv, or of the gate) -> function
# that loads a piece, where its tokens are, whether the entry is wanted (None: always).
_Source = Callable[..., tuple[Callable[..., None], gpu_pool.Place, Any]]


def pool(
    kv_BXC: Float[Array, "B X C"],
    gate_BXC: Float[Array, "B X C"],
    bias_MC: Float[Array, "M C"],
    first_B: Int[Array, " B"],
    *,
    overlap: int,
) -> Float32[Array, "B n K"]:
    """See the package.

    Raises:
      Unsupported: entries without a multiple of 128 channels or with over 1024, another dtype than
        bfloat16 and float32.
    """
    _require(bias_MC, overlap, kv_BXC, gate_BXC)
    M, (B, X, _) = bias_MC.shape[0], kv_BXC.shape
    n = X // M - overlap + 1
    dtypes = kv_BXC.dtype, gate_BXC.dtype
    pieces = _pieces(bias_MC, overlap, n, dtypes, each_window=False)
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
    call = _Call(name="compress_pool", source=source, pieces=pieces, dtypes=dtypes, entries=(B, n))
    return call(arrays, bias_MC)


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
    """See the package. Only the first windows, which begin before the chunk, are copied.

    Raises:
      Unsupported: as for `pool`; over 128 rotated channels; FP4 with other than 128 channels.
    """
    _require(bias_MC, overlap, rows_BTC, before_BPC)
    finish = _finish(scale_K, table, eps, rounding, dtype)
    M, (B, T, _) = len(bias_MC), rows_BTC.shape
    n = -(-T // M)
    start_B = start_B.astype(jnp.int32)
    head_BHC = _head(rows_BTC, before_BPC, start_B, M)
    dtypes = rows_BTC.dtype, rows_BTC.dtype
    pieces = _pieces(bias_MC, overlap, n, dtypes, each_window=True)
    call = _Call(
        name="compress_prefill",
        source=_chunk_source(pieces, M, T),
        pieces=pieces,
        dtypes=dtypes,
        entries=(B, n),
        finish=finish,
    )
    norm = scale_K, *map(gpu_finish.in_lanes, table)
    return call((rows_BTC, head_BHC, start_B), bias_MC, norm)


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
    """See the package. Reads a row's entire ring, which is little longer than its windows.

    Raises:
      Unsupported: as for `prefill`.
    """
    _require(bias_MC, overlap, ring_LBRC)
    finish = _finish(scale_K, table, eps, rounding, dtype)
    (M, C), (_, B, R, _) = bias_MC.shape, ring_LBRC.shape
    dtypes = ring_LBRC.dtype, ring_LBRC.dtype
    N = min(R, gpu_pool.most_tokens(*dtypes, overlap))
    pieces = Pieces(1, N, -(-R // N), overlap, C // overlap // CHANNELS, copies=2 * overlap)

    def source(refs: Any, row: Any, entry: Any, columns: Any) -> Any:
        del entry
        ring_ref, layer_ref, window_ref = refs
        window = window_ref[row]
        # The last piece begins early, to end with the ring.
        start = lambda piece: jnp.minimum(piece * N, R - N)

        def bring(piece: Any, tiles: Any, here: Any) -> None:
            for series in range(overlap):
                for half, tile in enumerate(tiles):
                    rows, part = pl.ds(start(piece), N), columns(series, half * C)
                    tokens = ring_ref.at[layer_ref[0], row, rows, part]
                    plgpu.copy_gmem_to_smem(tokens, tile.at[series], here)

        def place(_: Any, series: int, piece: Any, i: Any) -> Any:
            # A multiple of R is added so that the remainder is not negative.
            begins = (window + series - overlap + 1) * M + -(-overlap * M // R) * R
            after = start(piece) + i - jax.lax.rem(begins, R)
            token = jnp.where(after < 0, after + R, after)
            counts = (token < M) & (start(piece) + i >= piece * N)
            return i, jnp.minimum(token, M - 1), counts & (window + series >= overlap - 1)

        return bring, place, window >= 0

    arrays = ring_LBRC, layer.astype(jnp.int32).reshape(1), window_B.astype(jnp.int32)
    call = _Call(
        name="compress_decode",
        source=source,
        pieces=pieces,
        dtypes=dtypes,
        entries=(B, 1),
        finish=finish,
    )
    return call(arrays, bias_MC, (scale_K, *map(gpu_finish.in_lanes, table)))


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
            f"The GPU kernel rotates up to {CHANNELS} channels and rounds entries of {CHANNELS} to"
            f" FP4, not {rotated} of {channels} with rounding {rounding!r}."
        )
    return Finish(channels, rotated, eps, rounding, dtype)


def _pieces(
    bias_MC: Any, overlap: int, entries: int, dtypes: tuple[Any, Any], *, each_window: bool
) -> Pieces:
    """Pieces of several short windows or part of a long one, with one copy in all or per window."""
    M, C = bias_MC.shape
    most = gpu_pool.most_tokens(*dtypes, overlap)
    tokens = max(n for n in range(1, min(M, most) + 1) if M % n == 0)
    windows = min(entries, most // M) if tokens == M else 1
    copies = 2 * overlap * (windows if each_window else 1)
    return Pieces(windows, tokens, M // tokens, overlap, C // overlap // CHANNELS, copies)


def _chunk_source(pieces: Pieces, ratio: int, tokens: int) -> _Source:
    """Windows of a chunk of `tokens` tokens; the first of them are read from the head."""
    overlap, N = pieces.overlap, pieces.tokens
    gate = overlap * pieces.warpgroups * CHANNELS

    def source(refs: Any, row: Any, entry: Any, columns: Any) -> Any:
        rows_ref, head_ref, start_ref = refs
        start = start_ref[row]

        def bring(piece: Any, tiles: Any, here: Any) -> None:
            def copy(ref: Any, first: Any, series: int, window: Any) -> None:
                for half, tile in enumerate(tiles):
                    part = ref.at[row, pl.ds(first, N), columns(series, half * gate)]
                    to = tile.at[series, pl.ds(window * N, N)]
                    plgpu.copy_gmem_to_smem(part, to, here)

            def load(series: int, window: Any) -> None:
                # Windows are counted from that of the chunk's first token, the last in the head.
                index = entry + window + series - overlap + 1
                first = index * ratio + piece * N
                in_head = first + (overlap - 1) * ratio
                pl.when(index <= 0)(lambda: copy(head_ref, in_head, series, window))
                if tokens > ratio:
                    # An incomplete window may read any tokens, but within bounds.
                    in_rows = jnp.minimum(first - jax.lax.rem(start, ratio), tokens - N)
                    pl.when(index > 0)(lambda: copy(rows_ref, in_rows, series, window))

            for series in range(overlap):
                pl.loop(0, pieces.windows)(functools.partial(load, series))

        return bring, _in_order(jax.lax.div(start, ratio) + entry, overlap, N), None

    return source


def _in_order(first: Any, overlap: int, tokens: int) -> gpu_pool.Place:
    """Places of the tokens of a block that begins with window `first`, copied window by window."""

    def place(window: Any, series: int, piece: Any, i: Any) -> Any:
        exists = first + window + series >= overlap - 1
        return window * tokens + i, piece * tokens + i, exists

    return place


def _head(rows_BTC: Any, before_BPC: Any, start_B: Any, ratio: int) -> Float[Array, "B H D"]:
    """Tokens of the windows up to that of the chunk's first token; zeros beyond the chunk."""
    missing = max(0, ratio - rows_BTC.shape[1])
    soon_BMC = jnp.pad(rows_BTC[:, :ratio], ((0, 0), (0, missing), (0, 0)))
    tokens_BXC = jnp.concatenate([before_BPC, soon_BMC], axis=1)
    cut = lambda x_XC, at: jax.lax.dynamic_slice_in_dim(x_XC, at, before_BPC.shape[1])
    return jax.vmap(cut)(tokens_BXC, ratio - start_B % ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """One kernel.

    Attributes:
      name: name of the kernel.
      source: where a block's tokens come from.
      pieces: how they are cut.
      dtypes: dtypes of kv and gate.
      entries: B and n.
      finish: what follows pooling; if None, the sums are written.
    """

    name: str
    source: _Source
    pieces: Pieces
    dtypes: tuple[Any, Any]
    entries: tuple[int, int]
    finish: Finish | None = None

    def __call__(
        self, arrays: tuple[Array, ...], bias_MC: Float[Array, "M C"], norm: tuple[Array, ...] = ()
    ) -> Float[Array, "B n K"]:
        """The entries, from the arrays of `source`, the bias and the arrays of `finish`."""
        (B, n), W, warpgroups = self.entries, self.pieces.windows, self.pieces.warpgroups
        dtype = self.finish.dtype if self.finish else jnp.float32

        def body(*refs: Any, **smem: Any) -> None:
            *inputs, out_BnK = refs
            sources, bias = inputs[: len(arrays)], inputs[len(arrays)]
            row, warpgroup = jax.lax.axis_index("row"), jax.lax.axis_index("warpgroup")
            entry = jnp.minimum(jax.lax.axis_index("block") * W, n - W)
            span, entries_WV = (row, entry), smem["entries"].at[warpgroup]
            self._make(sources, bias, inputs[len(arrays) + 1 :], span, entries_WV, smem)
            plgpu.commit_smem()
            there = out_BnK.at[row, pl.ds(entry, W), pl.ds(warpgroup * CHANNELS, CHANNELS)]
            plgpu.copy_smem_to_gmem(entries_WV, there)
            plgpu.wait_smem_to_gmem(0)

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((B, n, warpgroups * CHANNELS), dtype),
            grid=(B, -(-n // W)),
            grid_names=("row", "block"),
            num_threads=warpgroups,
            thread_name="warpgroup",
            scratch_types={
                **self.pieces.scratch(*self.dtypes),
                **gpu_finish.scratch(W, warpgroups),
                "entries": plgpu.SMEM((warpgroups, W, CHANNELS), dtype),
            },
            compiler_params=PARAMS,
            kernel_name=self.name,
        )(*arrays, bias_MC, *norm)

    def _make(
        self, sources: Any, bias_MC: Any, norm: Any, span: Any, entries_WV: Any, smem: Any
    ) -> None:
        """Compute one warpgroup's channels of a block's entries."""
        pieces, warpgroup = self.pieces, jax.lax.axis_index("warpgroup")
        channels = pieces.warpgroups * CHANNELS

        def columns(series: int, left: int = 0) -> Any:
            return pl.ds(left + series * channels + warpgroup * CHANNELS, CHANNELS)

        bring, place, wanted = self.source(sources, *span, columns)

        def make() -> None:
            biases = [bias_MC.at[:, columns(series)] for series in range(pieces.overlap)]
            gpu_pool.run(pieces, bring, place, biases, warpgroup, smem)
            if self.finish:
                x_F = self.finish(norm, span, warpgroup, smem)
            else:
                x_F = gpu_finish.read(smem["line"].at[warpgroup], 0, pieces.windows * CHANNELS)
            entries_WV[...] = x_F.astype(entries_WV.dtype).reshape(entries_WV.shape)

        if wanted is None:
            make()
            return
        pl.when(wanted)(make)

        @pl.when(jnp.logical_not(wanted))
        def _() -> None:
            entries_WV[...] = jnp.zeros(entries_WV.shape, entries_WV.dtype)
