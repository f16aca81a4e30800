"""Compressors: token windows to entries, for attention (CSA, HCA) and for CSA's indexer.

Axis letters: L layers of a stack, B batch, T tokens, D hidden, M ratio, C channels (overlap * K),
K entry channels, R ring rows, S pool entries, X tokens of the windows, n entries of a chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import compress
from v4jax import cache, layers
from v4jax.config import LayerKind, ModelConfig
from v4jax.context import Context
from v4jax.params import Declare


class Compressor(nnx.Module):
    """Projections, positional bias and norm of one compressor (report, eqs. 9-12, 20-23)."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, dim: int, weight: Declare) -> None:
        channels = kind.overlap * dim
        self.kv_CD = weight((channels, cfg.hidden_size), ("compress", "embed"))
        self.gate_CD = weight((channels, cfg.hidden_size), ("compress", "embed"))
        self.bias_MC = weight((kind.ratio, channels), (None, "compress"), "f32")
        self.norm_K = weight((dim,), (None,), constant=1.0)


def update(
    compressor: Compressor,
    ring_LBRC: Float[Array, "L B R C2"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    x_BTD: Float[Array, "B T D"],
    kind: LayerKind,
    context: Context,
    rounding: Callable[[Any], Any],
) -> tuple[Float[Array, "L B R C2"], Float[Array, "L B S K"]]:
    """Take the chunk in: its tokens go to the ring, the entries it completes to the pool.

    `rounding` is applied to entries where the numerics round what is cached.
    """
    tail_BTC = _tail(compressor, x_BTD, context)
    first_B = context.start_B // kind.ratio
    complete_B = context.end_B // kind.ratio - first_B

    def compute() -> Array:
        rows_BXC = _window_rows(ring_LBRC, layer, tail_BTC, context.start_B, kind)
        entries_BnK = _entries(compressor, rows_BXC, first_B, kind, context, x_BTD.dtype)
        return rounding(entries_BnK) if context.numerics.rounded_cache else entries_BnK

    if x_BTD.shape[1] < kind.ratio:
        # Most decode steps complete no window, and the ring of HCA is long.
        nothing = jax.eval_shape(compute)
        zeros = lambda: jnp.zeros(nothing.shape, nothing.dtype)
        entries_BnK = jax.lax.cond(jnp.any(complete_B > 0), compute, zeros)
    else:
        entries_BnK = compute()
    new_ring_LBRC = cache.ring_write(ring_LBRC, layer, tail_BTC, context.start_B, context.count_B)
    return new_ring_LBRC, cache.pool_write(pool_LBSK, layer, entries_BnK, first_B, complete_B)


def _tail(
    compressor: Compressor, x_BTD: Float[Array, "B T D"], context: Context
) -> Float[Array, "B T C2"]:
    """Each token's kv and gate side by side, as the ring keeps them."""
    project = layers.linear_float32 if context.numerics.float32_islands else layers.linear
    parts = [project(x_BTD, weight) for weight in (compressor.kv_CD, compressor.gate_CD)]
    return jnp.concatenate(parts, axis=-1).astype(jnp.float32)


def _entries(
    compressor: Compressor,
    rows_BXC: Float[Array, "B X C2"],
    first_B: Int[Array, " B"],
    kind: LayerKind,
    context: Context,
    dtype: Any,
) -> Float[Array, "B n K"]:
    """Entries first, first + 1, ... normed and turned to the position of their window's start."""
    kv_BXC, gate_BXC = jnp.split(rows_BXC, 2, axis=-1)
    bias_MC = layers.value(compressor.bias_MC)
    pooled_BnK = compress.pool(kv_BXC, gate_BXC, bias_MC, first_B, overlap=kind.overlap)
    normed_BnK = layers.rms_norm(
        pooled_BnK.astype(dtype), compressor.norm_K, context.cfg.rms_norm_eps
    )
    window_n = jnp.arange(pooled_BnK.shape[1], dtype=jnp.int32)
    position_Bn = (first_B[:, None] + window_n[None]) * kind.ratio
    table = layers.rope_table(position_Bn, context.cfg, context.numerics, dtype, compressed=True)
    return layers.rotate(normed_BnK, table)


def _window_rows(
    ring_LBRC: Float[Array, "L B R C2"],
    layer: Int[Array, ""],
    tail_BTC: Float[Array, "B T C2"],
    start_B: Int[Array, " B"],
    kind: LayerKind,
) -> Float[Array, "B X C2"]:
    """The tokens of every window that the chunk may complete, and of the one before.

    Tokens before the chunk come from the ring; those after it are zero, in windows not complete.
    """
    ratio, (batch, tokens, channels) = kind.ratio, tail_BTC.shape
    before_P = jnp.arange(-kind.overlap * ratio, 0, dtype=jnp.int32)
    earlier_BPC = cache.ring_read(ring_LBRC, layer, start_B[:, None] + before_P[None])
    after_BMC = jnp.zeros((batch, ratio, channels), jnp.float32)
    rows_BXC = jnp.concatenate([earlier_BPC, tail_BTC, after_BMC], axis=1)
    wanted = (-(-tokens // ratio) + kind.overlap - 1) * ratio
    cut = lambda rows_XC, start: jax.lax.dynamic_slice_in_dim(rows_XC, start, wanted)
    return jax.vmap(cut)(rows_BXC, ratio - start_B % ratio)
