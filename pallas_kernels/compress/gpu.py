"""Pooling on NVIDIA GPUs from Hopper on: tokens are read once, where they lie.

A block of threads brings the tokens of a few windows to shared memory (TMA) and keeps a running
softmax per channel in registers. What follows, on one row where there were M, is XLA's: the norm
needs all channels of an entry, and a fused pass over entries moves a fraction of the tokens' bytes.

Axis letters: as in the package; W windows of a block, O series, V channels of a block, D a token's
kv and gate, H tokens of the first windows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.compress import reference
from pallas_kernels.implementations import Unsupported

# A warpgroup's threads, each of which keeps a channel.
_CHANNELS = 128
# Tokens of a block, of all series: 64 KiB of bfloat16, so that three blocks share a multiprocessor.
_TOKENS = 128
# Tokens between two looks at the running maximum.
_STEP = 8
# Rows of a ring that one copy brings, and bytes of it that shared memory holds.
_RING_ROWS, _RING_BYTES = 256, 216 * 2**10


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
      Unsupported: unless entries have a multiple of 128 channels and windows at most 128 tokens,
        in bfloat16 or float32.
    """
    _require(bias_MC, overlap, kv_BXC, gate_BXC)
    M, (B, X, _) = bias_MC.shape[0], kv_BXC.shape
    n = X // M - overlap + 1

    def copies(refs: Any, row: Any, entry: Any, columns: Any, tiles: Any, here: Any) -> Any:
        windows = tiles[0].shape[1] // M
        for series in range(overlap):
            tokens = pl.ds((entry + series) * M, windows * M)
            for source, tile in zip(refs[:2], tiles, strict=True):
                part = source.at[row, tokens, columns(series)]
                plgpu.copy_gmem_to_smem(part, tile.at[series], here)
        return refs[2][row]

    arrives = lambda windows: 2 * overlap
    arrays = kv_BXC, gate_BXC, first_B.astype(jnp.int32)
    return _pool_blocks(copies, arrives, arrays, bias_MC, (B, n), overlap)


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
      Unsupported: as for `pool`.
    """
    _require(bias_MC, overlap, rows_BTC, before_BPC)
    (M, C), (B, T, _) = bias_MC.shape, rows_BTC.shape
    n = -(-T // M)
    start_B = start_B.astype(jnp.int32)
    head_BHC = _head(rows_BTC, before_BPC, start_B, M)

    def copies(refs: Any, row: Any, entry: Any, columns: Any, tiles: Any, here: Any) -> Any:
        rows_ref, head_ref, start_ref = refs
        start = start_ref[row]

        def copy(source: Any, first: Any, place: Any) -> None:
            series, window = place
            to = pl.ds(window * M, M)
            for half, tile in enumerate(tiles):
                part = source.at[row, pl.ds(first, M), columns(series, half * C)]
                plgpu.copy_gmem_to_smem(part, tile.at[series, to], here)

        def bring(series: int, window: Any) -> None:
            # Windows count from that of the chunk's first token; those up to it are in the head.
            index = entry + window + series - overlap + 1
            place = series, window
            pl.when(index <= 0)(lambda: copy(head_ref, (index + overlap - 1) * M, place))
            if n > 1:
                # What an incomplete window reads does not matter, but must be there.
                first = jnp.minimum(index * M - jax.lax.rem(start, M), T - M)
                pl.when(index > 0)(lambda: copy(rows_ref, first, place))

        for series in range(overlap):
            pl.loop(0, tiles[0].shape[1] // M)(functools.partial(bring, series))
        return jax.lax.div(start, M)

    arrives = lambda windows: 2 * overlap * windows
    arrays = rows_BTC, head_BHC, start_B
    pooled_BnK = _pool_blocks(copies, arrives, arrays, bias_MC, (B, n), overlap)
    return reference._finish(pooled_BnK.astype(dtype), scale_K, table, eps, rounding)


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
      Unsupported: as for `pool`, and where the ring is too long for shared memory.
    """
    _require(bias_MC, overlap, ring_LBRC)
    C, (_, B, R, _) = bias_MC.shape[1], ring_LBRC.shape
    tile = (overlap, R, _CHANNELS)
    if R > _RING_ROWS or 2 * math.prod(tile) * ring_LBRC.dtype.itemsize > _RING_BYTES:
        raise Unsupported(
            f"The GPU kernel takes rings of up to {_RING_ROWS} rows, {_RING_BYTES} bytes of them"
            f" per {_CHANNELS} channels, not {R} of {ring_LBRC.dtype} for {overlap} windows."
        )
    K = C // overlap
    pooled_BK = plgpu.kernel(
        functools.partial(_pool_ring, overlap=overlap),
        out_type=jax.ShapeDtypeStruct((B, K), jnp.float32),
        grid=(B, K // _CHANNELS),
        grid_names=("row", "channels"),
        scratch_types=_scratch(tile, ring_LBRC.dtype, ring_LBRC.dtype, 2 * overlap),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="compress_decode",
    )(ring_LBRC, layer.astype(jnp.int32).reshape(1), window_B.astype(jnp.int32), bias_MC)
    pooled_B1K = pooled_BK[:, None].astype(dtype)
    entry_B1K = reference._finish(pooled_B1K, scale_K, table, eps, rounding)
    return jnp.where((window_B >= 0)[:, None, None], entry_B1K, jnp.zeros((), dtype))


def _require(bias_MC: Any, overlap: int, *tokens: Any) -> None:
    M, C = bias_MC.shape
    if C // overlap % _CHANNELS or M > _TOKENS:
        raise Unsupported(
            f"The GPU kernel takes windows of up to {_TOKENS} tokens and entries of a multiple of"
            f" {_CHANNELS} channels, not of {M} and {C // overlap}."
        )
    dtypes = [x.dtype for x in (bias_MC, *tokens)]
    if not set(dtypes) <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        raise Unsupported(f"The GPU kernel takes bfloat16 and float32, not {dtypes}.")


def _head(rows_BTC: Any, before_BPC: Any, start_B: Any, ratio: int) -> Float[Array, "B H D"]:
    """Tokens of the windows up to that of the chunk's first token; beyond the chunk zero."""
    missing = max(0, ratio - rows_BTC.shape[1])
    soon_BMC = jnp.pad(rows_BTC[:, :ratio], ((0, 0), (0, missing), (0, 0)))
    tokens_BXC = jnp.concatenate([before_BPC, soon_BMC], axis=1)
    cut = lambda x_XC, at: jax.lax.dynamic_slice_in_dim(x_XC, at, before_BPC.shape[1])
    return jax.vmap(cut)(tokens_BXC, ratio - start_B % ratio)


def _scratch(tile: tuple[int, ...], kv: Any, gate: Any, arrivals: int) -> list[Any]:
    return [plgpu.SMEM(tile, kv), plgpu.SMEM(tile, gate), plgpu.Barrier(num_arrivals=arrivals)]


def _pool_blocks(
    copies: Callable[..., Any],
    arrives: Callable[[int], int],
    arrays: tuple[Array, ...],
    bias_MC: Float[Array, "M C"],
    entries: tuple[int, int],
    overlap: int,
) -> Float32[Array, "B n K"]:
    """Entries of many windows.

    Args:
      copies: starts bringing a block's tokens to shared memory; gives the row's first window.
      arrives: how many copies that is, of so many windows.
      arrays: its own.
      bias_MC: as in the package.
      entries: B and n.
      overlap: as in the package.
    """
    (M, C), (B, n) = bias_MC.shape, entries
    K, W = C // overlap, min(n, max(1, _TOKENS // (M * overlap)))

    def body(bias_ref: Any, *refs: Any) -> None:
        *sources, out_BnK, kv_OXV, gate_OXV, here = refs
        row, channel = jax.lax.axis_index("row"), jax.lax.axis_index("channels") * _CHANNELS
        columns = lambda series, half=0: pl.ds(half + series * K + channel, _CHANNELS)
        # The last block reaches back; what it shares with the one before, both write alike.
        entry = jnp.minimum(jax.lax.axis_index("block") * W, n - W)
        first = copies(sources, row, entry, columns, (kv_OXV, gate_OXV), here) + entry
        plgpu.barrier_wait(here)

        @pl.loop(0, W)
        def _(window: Array) -> None:
            row_of = lambda series, token: window * M + token
            exists = lambda series: first + window + series >= overlap - 1
            biases = [bias_ref.at[:, columns(series)] for series in range(overlap)]
            entry_V = _pool_window(kv_OXV, gate_OXV, biases, row_of, exists)
            out_BnK[row, entry + window, pl.ds(channel, _CHANNELS)] = entry_V

    tile = (overlap, W * M, _CHANNELS)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, n, K), jnp.float32),
        grid=(B, -(-n // W), K // _CHANNELS),
        grid_names=("row", "block", "channels"),
        scratch_types=_scratch(tile, arrays[0].dtype, arrays[1].dtype, arrives(W)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="compress_pool",
    )(bias_MC, *arrays)


def _pool_ring(
    ring_LBRC: Any,
    layer_1: Any,
    window_B: Any,
    bias_MC: Any,
    out_BK: Any,
    kv_ORV: Any,
    gate_ORV: Any,
    here: Any,
    *,
    overlap: int,
) -> None:
    (M, C), (K, R) = bias_MC.shape, (out_BK.shape[1], ring_LBRC.shape[2])
    row, channel = jax.lax.axis_index("row"), jax.lax.axis_index("channels") * _CHANNELS
    window = window_B[row]
    columns = [series * K + channel for series in range(overlap)]

    @pl.when(window < 0)
    def _() -> None:
        out_BK[row, pl.ds(channel, _CHANNELS)] = _per_thread(0.0)

    @pl.when(window >= 0)
    def _() -> None:
        for series, column in enumerate(columns):
            for half, tile in enumerate((kv_ORV, gate_ORV)):
                part = ring_LBRC.at[layer_1[0], row, :, pl.ds(half * C + column, _CHANNELS)]
                plgpu.copy_gmem_to_smem(part, tile.at[series], here)
        plgpu.barrier_wait(here)
        # A whole number of rings is added lest the remainder be negative.
        begins = lambda series: (window + series - overlap + 1) * M + -(-M // R) * R
        row_of = lambda series, token: jax.lax.rem(begins(series) + token, R)
        exists = lambda series: window + series >= overlap - 1
        biases = [bias_MC.at[:, pl.ds(column, _CHANNELS)] for column in columns]
        entry_V = _pool_window(kv_ORV, gate_ORV, biases, row_of, exists)
        out_BK[row, pl.ds(channel, _CHANNELS)] = entry_V


def _pool_window(
    kv_OXV: Any,
    gate_OXV: Any,
    biases: list[Any],
    row_of: Callable[[int, Any], Any],
    exists: Callable[[int], Any],
) -> Float32[Array, " V"]:
    """One entry's channels.

    Args:
      kv_OXV: reference to tokens of each series.
      gate_OXV: as kv_OXV.
      biases: reference to the bias of each series, [M, V].
      row_of: where in X a token of a series is.
      exists: whether a series' window does.
    """
    running = tuple(_per_thread(value) for value in (-jnp.inf, 0.0, 0.0))
    steps = biases[0].shape[0] // _tokens_of_step(biases[0])
    # A window's own tokens first: then the maximum is a number when the others may be missing.
    for series in reversed(range(len(biases))):
        add = functools.partial(
            _add_tokens,
            kv_OXV.at[series],
            gate_OXV.at[series],
            biases[series],
            functools.partial(row_of, series),
            exists(series),
        )
        running = jax.lax.fori_loop(0, steps, add, running)
    return running[2] / running[1]


def _per_thread(value: float) -> Array:
    """A constant in the layout of what is read, as a loop's carry needs it."""
    constant = jnp.full((_CHANNELS,), value, jnp.float32)
    return plgpu.layout_cast(constant, plgpu.Layout.WG_STRIDED((_CHANNELS,), vec_size=1))


def _tokens_of_step(bias_MV: Any) -> int:
    return math.gcd(bias_MV.shape[0], _STEP)


def _add_tokens(
    kv_XV: Any,
    gate_XV: Any,
    bias_MV: Any,
    row_of: Callable[[Any], Any],
    exists: Any,
    step: Any,
    running: Any,
) -> Any:
    """Take a few tokens into the running maximum, sum of weights and weighted sum."""
    count = _tokens_of_step(bias_MV)
    largest, total, weighted = running
    tokens = [step * count + i for i in range(count)]
    read = lambda ref, at: ref[at].astype(jnp.float32)
    logits = [read(gate_XV, row_of(token)) + read(bias_MV, token) for token in tokens]
    logits = [jnp.where(exists, logit, -jnp.inf) for logit in logits]
    new = functools.reduce(jnp.maximum, logits, largest)
    kept = jnp.exp(largest - new)
    total, weighted = total * kept, weighted * kept
    for token, logit in zip(tokens, logits, strict=True):
        weight = jnp.exp(logit - new)
        total += weight
        weighted += weight * jnp.where(exists, read(kv_XV, row_of(token)), 0.0)
    return new, total, weighted
