"""Pooling on NVIDIA GPUs from Hopper on: tokens are read once, and only entries are written.

A block of threads brings the tokens of a few windows to shared memory (TMA) and keeps a running
softmax per channel in registers.

Axis letters: as in the package; W windows of a block, O series, V channels of a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.implementations import Unsupported

# A warpgroup's threads, each of which keeps a channel.
_CHANNELS = 128
# Tokens of a block, of all series: 64 KiB of bfloat16, so that three blocks share a multiprocessor.
_TOKENS = 128
# Tokens between two looks at the running maximum.
_STEP = 8


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
    _require(kv_BXC, gate_BXC, bias_MC, overlap)
    (M, C), (B, X, _) = bias_MC.shape, kv_BXC.shape
    K, n = C // overlap, X // M - overlap + 1
    W = min(n, max(1, _TOKENS // (M * overlap)))
    tile = (overlap, W * M, _CHANNELS)
    return plgpu.kernel(
        functools.partial(_pool_windows, windows=W, overlap=overlap),
        out_type=jax.ShapeDtypeStruct((B, n, K), jnp.float32),
        grid=(B, -(-n // W), K // _CHANNELS),
        grid_names=("row", "block", "channels"),
        scratch_types=[
            plgpu.SMEM(tile, kv_BXC.dtype),
            plgpu.SMEM(tile, gate_BXC.dtype),
            plgpu.Barrier(num_arrivals=2 * overlap),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="compress_pool",
    )(kv_BXC, gate_BXC, bias_MC, first_B.astype(jnp.int32))


def _require(kv_BXC: Any, gate_BXC: Any, bias_MC: Any, overlap: int) -> None:
    M, C = bias_MC.shape
    if C // overlap % _CHANNELS or M > _TOKENS:
        raise Unsupported(
            f"The GPU kernel takes windows of up to {_TOKENS} tokens and entries of a multiple of"
            f" {_CHANNELS} channels, not of {M} and {C // overlap}."
        )
    dtypes = [x.dtype for x in (kv_BXC, gate_BXC, bias_MC)]
    if not set(dtypes) <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        raise Unsupported(f"The GPU kernel takes bfloat16 and float32, not {dtypes}.")


def _pool_windows(
    kv_BXC: Any,
    gate_BXC: Any,
    bias_MC: Any,
    first_B: Any,
    out_BnK: Any,
    kv_OXV: Any,
    gate_OXV: Any,
    here: Any,
    *,
    windows: int,
    overlap: int,
) -> None:
    M, (_, n, K) = bias_MC.shape[0], out_BnK.shape
    row = jax.lax.axis_index("row")
    # The last block reaches back; what it shares with the one before, both write alike.
    entry = jnp.minimum(jax.lax.axis_index("block") * windows, n - windows)
    channel = jax.lax.axis_index("channels") * _CHANNELS
    columns = [pl.ds(series * K + channel, _CHANNELS) for series in range(overlap)]
    for series in range(overlap):
        tokens = pl.ds((entry + series) * M, windows * M)
        for source, tile in ((kv_BXC, kv_OXV), (gate_BXC, gate_OXV)):
            plgpu.copy_gmem_to_smem(source.at[row, tokens, columns[series]], tile.at[series], here)
    plgpu.barrier_wait(here)
    first = first_B[row] + entry

    @pl.loop(0, windows)
    def _(window: Array) -> None:
        running = tuple(_per_thread(value) for value in (-jnp.inf, 0.0, 0.0))
        # A window's own tokens first: then the maximum is a number when the others may be missing.
        for series in reversed(range(overlap)):
            add = functools.partial(
                _add_tokens,
                kv_OXV.at[series],
                gate_OXV.at[series],
                bias_MC.at[:, columns[series]],
                window * M,
                first + window + series >= overlap - 1,
            )
            running = jax.lax.fori_loop(0, M // math.gcd(M, _STEP), add, running)
        _, total, weighted = running
        out_BnK[row, entry + window, pl.ds(channel, _CHANNELS)] = weighted / total


def _per_thread(value: float) -> Array:
    """A constant in the layout of what is read, as a loop's carry needs it."""
    constant = jnp.full((_CHANNELS,), value, jnp.float32)
    return plgpu.layout_cast(constant, plgpu.Layout.WG_STRIDED((_CHANNELS,), vec_size=1))


def _add_tokens(
    kv_XV: Any, gate_XV: Any, bias_MV: Any, start: Any, exists: Any, step: Any, running: Any
) -> Any:
    """Take a few tokens into the running maximum, sum of weights and weighted sum."""
    count = math.gcd(bias_MV.shape[0], _STEP)
    largest, total, weighted = running
    of_window = [step * count + i for i in range(count)]
    read = lambda ref, at: ref[at].astype(jnp.float32)
    logits = [read(gate_XV, start + at) + read(bias_MV, at) for at in of_window]
    logits = [jnp.where(exists, logit, -jnp.inf) for logit in logits]
    new = functools.reduce(jnp.maximum, logits, largest)
    kept = jnp.exp(largest - new)
    total, weighted = total * kept, weighted * kept
    for at, logit in zip(of_window, logits, strict=True):
        weight = jnp.exp(logit - new)
        total += weight
        weighted += weight * jnp.where(exists, read(kv_XV, start + at), 0.0)
    return new, total, weighted
