"""Compressors: windows of tokens to entries, for attention (CSA, HCA) and for CSA's indexer.

Axis letters: L layers of a stack, B batch, T tokens, D hidden, M ratio, C channels (overlap * K),
K entry channels, R ring rows, S pool entries, P tokens before a chunk, n entries of a chunk.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import compress, residuals
from v4jax.model import cache, layers, paging, sharding
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.context import Context
from v4jax.model.params import Declare
from v4jax.model.sharding import ROWS, STACKED_ROWS


class Compressor(nnx.Module):
    """Projections, positional bias and norm of a compressor (report, eqs. 9-12, 20-23)."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, dim: int, weight: Declare) -> None:
        channels = kind.overlap * dim
        self.kv_CD = weight((channels, cfg.hidden_size), (None, None))
        self.gate_CD = weight((channels, cfg.hidden_size), (None, None))
        self.bias_MC = weight((kind.ratio, channels), (None, None), "f32")
        self.norm_K = weight((dim,), (None,), constant=1.0)


def update(
    compressor: Compressor,
    ring_pool_layer: tuple[Float[Array, "L B R C2"], Shaped[Array, "L _ S _"], Int[Array, ""]],
    x_BTD: Float[Array, "B T D"],
    kind: LayerKind,
    context: Context,
    rounding: compress.Rounding,
) -> tuple[Float[Array, "L B R C2"], Shaped[Array, "L _ S _"]]:
    """Add a chunk: its tokens to the ring, and the entries that it completes to the pool.

    Args:
      compressor: the weights.
      ring_pool_layer: ring and pool of a stack of layers, and the index of the layer.
      x_BTD: the layer's input.
      kind: kind of the layer.
      context: context of the pass.
      rounding: rounding of entries, if the numerics round the cache; 'fp4' for the indexer's.
    """
    ring_LBRC, pool_LBSK, layer = ring_pool_layer
    first_B = context.start_B // kind.ratio
    complete_B = context.end_B // kind.ratio - first_B
    tail_BTC = _tail(compressor, x_BTD, kind, context)
    chunk = layer, tail_BTC, context.start_B, context.count_B
    weights, settings = _settings(compressor, x_BTD, kind, context, rounding)
    tokens = x_BTD.shape[1]
    if cache.is_decode(tokens) and tokens <= kind.ratio:
        # At most one window is completed, and the ring still holds it.
        ring_LBRC = cache.ring_write(ring_LBRC, *chunk)
        window_B = jnp.where(complete_B > 0, first_B, -1)
        entries_BnK = sharding.per_device(
            functools.partial(compress.decode, **settings),
            *(ring_LBRC, layer, window_B, *weights),
            axes=(STACKED_ROWS, (), ROWS, (), (), ROWS),
            out=ROWS,
        )
    else:
        before = kind.overlap * kind.ratio
        before_BPC = cache.ring_read(ring_LBRC, layer, context.start_B, before)
        entries_BnK = sharding.per_device(
            functools.partial(compress.prefill, **settings),
            *(tail_BTC, before_BPC, context.start_B, *weights),
            axes=(ROWS, ROWS, ROWS, (), (), ROWS),
            out=ROWS,
        )
        ring_LBRC = cache.ring_write(ring_LBRC, *chunk)
    entries_BnK = residuals.saveable(entries_BnK)
    entries = layer, entries_BnK, first_B, complete_B
    if context.table_BM is None:
        return ring_LBRC, cache.pool_write(pool_LBSK, *entries)
    codec = paging.codec_of(pool_LBSK, context.cfg, index=rounding == "fp4")
    if codec is not None:
        paging.require_exact("fp8", context.numerics, x_BTD.dtype)
    # Chunks begin at whole blocks, which are whole entries if the ratio divides them.
    whole = not cache.is_decode(tokens) and cache.BLOCK % kind.ratio == 0
    unit = cache.BLOCK // kind.ratio if whole else 1
    return ring_LBRC, paging.write(pool_LBSK, *entries, context.table_BM, unit=unit, codec=codec)


def _settings(
    compressor: Compressor,
    x_BTD: Float[Array, "B T D"],
    kind: LayerKind,
    context: Context,
    rounding: compress.Rounding,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bias, norm and rotary table for the entries of the chunk; the ops' static arguments."""
    cfg, numerics, dtype = context.cfg, context.numerics, x_BTD.dtype
    window_n = jnp.arange(-(-x_BTD.shape[1] // kind.ratio), dtype=jnp.int32)
    position_Bn = (context.start_B[:, None] // kind.ratio + window_n[None]) * kind.ratio
    if context.first_BT is not None:
        position_Bn -= context.first_BT[:, :: kind.ratio]
    table = layers.rope_table(position_Bn, cfg, numerics, dtype, compressed=True)
    weights = layers.value(compressor.bias_MC), layers.value(compressor.norm_K), table
    return weights, {
        "overlap": kind.overlap,
        "eps": cfg.rms_norm_eps,
        "rounding": rounding if numerics.rounded_cache else "none",
        "dtype": dtype,
    }


def _tail(
    compressor: Compressor, x_BTD: Float[Array, "B T D"], kind: LayerKind, context: Context
) -> Float[Array, "B T C2"]:
    """Each token's kv and gate, concatenated as in the ring."""
    project = layers.linear_float32 if context.numerics.float32_islands else layers.linear
    parts = [project(x_BTD, weight) for weight in (compressor.kv_CD, compressor.gate_CD)]
    kv_BTC, gate_BTC = (part.astype(jnp.float32) for part in parts)
    if context.first_BT is not None and kind.overlap > 1:
        gate_BTC = _mask_across_documents(gate_BTC, context.first_BT, kind)
    return jnp.concatenate([kv_BTC, gate_BTC], axis=-1)


def _mask_across_documents(
    gate_BTC: Float[Array, "B T C"], first_BT: Int[Array, "B T"], kind: LayerKind
) -> Float[Array, "B T C"]:
    """Close gates where a window's first channels would go to another document's entry."""
    next_BT = jnp.pad(first_BT[:, kind.ratio :], ((0, 0), (0, kind.ratio)), mode="edge")
    earlier_C = jnp.arange(gate_BTC.shape[2]) < gate_BTC.shape[2] // kind.overlap
    closed_BTC = (next_BT != first_BT)[..., None] & earlier_C[None, None]
    return jnp.where(closed_BTC, jnp.finfo(gate_BTC.dtype).min, gate_BTC)
