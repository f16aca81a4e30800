"""Norm and rotary embedding on TPUs: one read and one write, in place if x is not used again.

The grid is blocks of tokens. Only the last 128 channels of a head are rotated.

Axis letters: as in the package; R tokens of all rows of the batch, V lanes (128).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.rotary.reference import Norm

_BLOCK_BYTES = 2**20
_HEADS = 32  # heads in registers at once
# For fewer, XLA's form copies next to nothing.
_FEW_TOKENS, _FEW_HEADS = 64, 8


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    cos_BTQ: Float[Array, "B T Q"],
    sin_BTQ: Float[Array, "B T Q"],
    *,
    norm: Norm | None,
) -> Float[Array, "B T H K"]:
    """See `rotary.rotate`.

    Raises:
      Unsupported: another dtype or number of channels, or few tokens or heads.
    """
    B, T, H, K = x_BTHK.shape
    rotated, dtype = 2 * cos_BTQ.shape[2], x_BTHK.dtype
    if dtype not in (jnp.bfloat16, jnp.float32) or K % LANES or rotated > LANES:
        raise Unsupported(
            "The TPU kernel takes bfloat16 and float32 heads with a multiple of 128 channels, up "
            f"to 128 of them rotated, not {rotated} of {K} in {dtype}."
        )
    if B * T < _FEW_TOKENS or H < _FEW_HEADS:
        raise Unsupported(
            f"The TPU kernel takes {_FEW_TOKENS} or more tokens of {_FEW_HEADS} or more heads, "
            f"not {B * T} of {H}."
        )
    tokens = max(8, _BLOCK_BYTES // (H * K * dtype.itemsize) // 8 * 8)
    tables = [_in_pairs(part.reshape(B * T, -1)) for part in (cos_BTQ, sin_BTQ)]
    heads = pl.BlockSpec((tokens, H, K), lambda token_block: (token_block, 0, 0))
    table = pl.BlockSpec((tokens, LANES), lambda token_block: (token_block, 0))
    out_RHK = pl.pallas_call(
        functools.partial(_kernel, rotated=rotated, norm=norm),
        out_shape=jax.ShapeDtypeStruct((B * T, H, K), dtype),
        grid=(pl.cdiv(B * T, tokens),),
        in_specs=[heads, table, table],
        out_specs=heads,
        # Pallas' interpreter returns aliased arrays with the padding of the last block.
        input_output_aliases={} if B * T % tokens else {0: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="rotary",
    )(x_BTHK.reshape(B * T, H, K), *tables)
    return out_RHK.reshape(x_BTHK.shape)


def _kernel(
    x_RHK: Any, cos_RV: Any, sin_RV: Any, out_RHK: Any, *, rotated: int, norm: Norm | None
) -> None:
    tokens, H, K = x_RHK.shape
    heads = math.gcd(H, _HEADS)

    @pl.loop(0, tokens)
    def _(token: Any) -> None:
        cos_1V, sin_1V = (ref[pl.ds(token, 1), :] for ref in (cos_RV, sin_RV))
        for first in range(0, H, heads):
            rows = token, pl.ds(first, heads)
            x_HK = x_RHK[rows].astype(jnp.float32)
            if norm is not None:
                x_HK = _normed(x_HK, norm, x_RHK.dtype)
            last_HV = turn(x_HK[:, K - LANES :], cos_1V, sin_1V, rotated)
            if K > LANES:
                out_RHK[(*rows, pl.ds(0, K - LANES))] = x_HK[:, : K - LANES].astype(out_RHK.dtype)
            out_RHK[(*rows, pl.ds(K - LANES, LANES))] = last_HV.astype(out_RHK.dtype)


def _normed(x_HK: Float32[Array, "H K"], norm: Norm, dtype: Any) -> Float32[Array, "H K"]:
    """Normalise in float32, rounding to `dtype` wherever the reference does."""
    rounded = lambda x: x.astype(dtype).astype(jnp.float32)
    in_norm = (lambda x: x) if norm.float32 else rounded
    mean_H1 = in_norm(jnp.mean(in_norm(x_HK * x_HK), axis=1, keepdims=True))
    eps_H1 = in_norm(jnp.full_like(mean_H1, norm.eps))
    inverse_H1 = rounded(in_norm(jax.lax.rsqrt(in_norm(mean_H1 + eps_H1))))
    return rounded(x_HK * inverse_H1)


def _in_pairs(part_RQ: Float[Array, "R Q"]) -> Float32[Array, "R V"]:
    """Each value of a table twice, in the last lanes."""
    twice_RV = jnp.repeat(part_RQ.astype(jnp.float32), 2, axis=1)
    return jnp.pad(twice_RV, ((0, 0), (LANES - twice_RV.shape[1], 0)))


def turn(
    x_HV: Float32[Array, "H V"], cos_HV: Any, sin_HV: Any, rotated: int
) -> Float32[Array, "H V"]:
    """RoPE on the last `rotated` of 128 lanes; the tables matter only there."""
    lane_HV = jax.lax.broadcasted_iota(jnp.int32, x_HV.shape, 1)
    # Lane 127 has no right neighbour and lane 0 no left one, but neither is used.
    right_HV, left_HV = pltpu.roll(x_HV, LANES - 1, 1), pltpu.roll(x_HV, 1, 1)
    other_HV = jnp.where((lane_HV & 1) == 0, -right_HV, left_HV)
    turned_HV = x_HV * cos_HV + other_HV * sin_HV
    return jnp.where(lane_HV >= LANES - rotated, turned_HV, x_HV)
