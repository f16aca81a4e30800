"""Compression in plain maths: pool, norm, rotate, round.

Axis letters: as in the package.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import quantize
from pallas_kernels.rotary import reference as rotary

FP8_BLOCK, FP4_BLOCK = 64, 32


def pool(
    kv_BXC: Float[Array, "B X C"],
    gate_BXC: Float[Array, "B X C"],
    bias_MC: Float[Array, "M C"],
    first_B: Int[Array, " B"],
    *,
    overlap: int,
) -> Float32[Array, "B n K"]:
    """A softmax over all tokens of an entry, channel by channel."""
    M, C = bias_MC.shape
    B, X, _ = kv_BXC.shape
    K, n = C // overlap, X // M - overlap + 1
    windows = lambda x: x.astype(jnp.float32).reshape(B, X // M, M, overlap, K)
    gate_BWMOK = windows(gate_BXC) + bias_MC.astype(jnp.float32).reshape(1, 1, M, overlap, K)
    kv_BWMOK = windows(kv_BXC)
    series = lambda x: jnp.concatenate([x[:, o : o + n, :, o] for o in range(overlap)], axis=2)
    gate_BnJK, kv_BnJK = series(gate_BWMOK), series(kv_BWMOK)
    if overlap > 1:
        # Only window 0 has no predecessor: mask the missing half out of its softmax.
        window_Bn = first_B[:, None] + jnp.arange(n)[None]
        earlier_J = jnp.arange(gate_BnJK.shape[2]) < M
        missing = (window_Bn == 0)[..., None, None] & earlier_J[None, None, :, None]
        gate_BnJK = jnp.where(missing, -jnp.inf, gate_BnJK)
        kv_BnJK = jnp.where(missing, 0.0, kv_BnJK)
    return jnp.sum(jax.nn.softmax(gate_BnJK, axis=2) * kv_BnJK, axis=2)


def prefill(
    rows_BTC: Float[Array, "B T C2"],
    before_BPC: Float[Array, "B P C2"],
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
    """Gather whole windows first; tokens beyond the chunk are zero."""
    rows_BXC = _windows(rows_BTC, before_BPC, start_B, bias_MC.shape[0], overlap)
    kv_BXC, gate_BXC = jnp.split(rows_BXC, 2, axis=-1)
    pooled_BnK = pool(kv_BXC, gate_BXC, bias_MC, start_B // bias_MC.shape[0], overlap=overlap)
    return _finish(pooled_BnK.astype(dtype), scale_K, table, eps, rounding)


def decode(
    ring_LBRC: Float[Array, "L B R C2"],
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
    """Gather the tokens in order of position, then proceed as for a chunk."""
    M, rows = bias_MC.shape[0], ring_LBRC.shape[2]
    wanted_B11 = (window_B >= 0)[:, None, None]
    window_B = jnp.maximum(window_B, 0)
    token_X = jnp.arange((1 - overlap) * M, M, dtype=jnp.int32)
    row_BX = jnp.mod(window_B[:, None] * M + token_X[None], rows)
    ring_BRC = jax.lax.dynamic_index_in_dim(ring_LBRC, layer, 0, keepdims=False)
    rows_BXC = jnp.take_along_axis(ring_BRC, row_BX[..., None], axis=1)
    kv_BXC, gate_BXC = jnp.split(rows_BXC, 2, axis=-1)
    pooled_B1K = pool(kv_BXC, gate_BXC, bias_MC, window_B, overlap=overlap)
    entry_B1K = _finish(pooled_B1K.astype(dtype), scale_K, table, eps, rounding)
    return jnp.where(wanted_B11, entry_B1K, jnp.zeros((), dtype))


def _windows(
    rows_BTC: Any, before_BPC: Any, start_B: Any, ratio: int, overlap: int
) -> Float[Array, "B X C2"]:
    """The tokens of all windows that the chunk may complete, and of the one before them."""
    batch, tokens, channels = rows_BTC.shape
    after_BMC = jnp.zeros((batch, ratio, channels), rows_BTC.dtype)
    rows_BXC = jnp.concatenate([before_BPC, rows_BTC, after_BMC], axis=1)
    size = (-(-tokens // ratio) + overlap - 1) * ratio
    cut = lambda rows_XC, start: jax.lax.dynamic_slice_in_dim(rows_XC, start, size)
    return jax.vmap(cut)(rows_BXC, ratio - start_B % ratio)


def _finish(
    x_BnK: Float[Array, "B n K"], scale_K: Any, table: Any, eps: float, rounding: str
) -> Float[Array, "B n K"]:
    """Norm, RoPE and rounding, each computed in float32 and returned in x's dtype."""
    x32_BnK = x_BnK.astype(jnp.float32)
    inverse_Bn1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BnK), axis=-1, keepdims=True) + eps)
    scale_11K = scale_K.astype(jnp.float32)[None, None]
    normed_BnK = (x32_BnK * inverse_Bn1 * scale_11K).astype(x_BnK.dtype)
    turned_BnK = rotary.rotate(normed_BnK[:, :, None], *table, norm=None)[:, :, 0]
    if rounding == "fp4":
        return quantize.fake_quant_fp4(quantize.hadamard(turned_BnK), block=FP4_BLOCK)
    straight = x_BnK.shape[-1] - 2 * table[0].shape[-1]
    if rounding == "none" or not straight:
        return turned_BnK
    rounded = quantize.fake_quant_fp8(turned_BnK[..., :straight], block=FP8_BLOCK)
    return jnp.concatenate([rounded, turned_BnK[..., straight:]], axis=-1)
