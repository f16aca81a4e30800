"""A block's mixing weights and collapsed streams, from a single read of the streams.

Axis letters: as in the package; R tokens of a block, V lanes of a chunk of channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract

_CHUNK = 2048  # channels per matmul
_COLLAPSED = 256  # channels collapsed at a time


def kernel(
    streams: int,
    x_ref: Any,  # [R, M]
    fn_ref: Any,  # [Q, M]
    base_ref: Any,  # [1, Q]
    scale_ref: Any,  # [1, Q]
    out_ref: Any,  # [R, D]
    *refs: Any,  # [Q - N, R] if Q > N; [256, 128]
    steps: int,
    eps: float,
    norm_eps: float,
) -> None:
    """The first N of Q are the streams' weights, used here; the others are written."""
    *weights_refs, square_ref = refs
    N, Q, R = streams, fn_ref.shape[0], x_ref.shape[0]
    mix_RQ = _mixes(x_ref, fn_ref, norm_eps)
    logits_RQ = mix_RQ * scale_ref[...] + base_ref[...]
    collapse, chunks = _collapse(x_ref, out_ref, jax.nn.sigmoid(logits_RQ[:, :N]) + eps)
    if not weights_refs:
        jax.lax.fori_loop(0, chunks, lambda i, _: collapse(i), None)
        return
    (weights_ref,) = weights_refs
    square_ref[:R, :Q] = logits_RQ
    logits_QR = square_ref[...].T[:Q, :R]
    weights_ref[:N] = 2 * jax.nn.sigmoid(logits_QR[N : 2 * N])
    comb, balance = _sinkhorn([logits_QR[(2 + j) * N : (3 + j) * N] for j in range(N)], eps)

    def both(i: Any, comb: Any) -> Any:
        collapse(i)
        return balance(comb)

    # A Sinkhorn step is mostly latency: next to a chunk of the collapse it costs nothing.
    together = min(chunks, steps - 1)
    comb = jax.lax.fori_loop(0, together, both, comb)
    jax.lax.fori_loop(together, chunks, lambda i, _: collapse(i), None)
    comb = jax.lax.fori_loop(together, steps - 1, lambda _, comb: balance(comb), comb)
    for j, row_NR in enumerate(comb):
        weights_ref[(1 + j) * N : (2 + j) * N] = row_NR


def _mixes(x_ref: Any, fn_ref: Any, eps: float) -> Float32[Array, "R Q"]:
    """The projection of the root-mean-square norm.

    bfloat16 streams are multiplied by float32 weights split into three bfloat16 parts that add up
    to them exactly: the products of one matmul are exact, as at the highest precision.
    """
    (R, M), Q = x_ref.shape, fn_ref.shape[0]
    chunk = math.gcd(M, _CHUNK)
    exact = x_ref.dtype == jnp.bfloat16

    def add(i: Any, running: Any) -> Any:
        squares_RV, products_RQ = running
        at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        x_RM, fn_QM = x_ref[:, at], fn_ref[:, at]
        x32_RM = x_RM.astype(jnp.float32)
        parts = [x32_RM[:, c : c + LANES] for c in range(0, chunk, LANES)]
        squares_RV += functools.reduce(jnp.add, [part * part for part in parts])
        if exact:
            fn_QM = jnp.concatenate([part.astype(jnp.bfloat16) for part in _thirds(fn_QM)])
        precision = None if exact else jax.lax.Precision.HIGHEST
        products_RQ += contract(x_RM, fn_QM, 1, 1, precision)
        return squares_RV, products_RQ

    zeros = lambda width: jnp.zeros((R, width), jnp.float32)
    thirds = 3 if exact else 1
    padded = -(-Q // 16) * 16 if exact else Q
    init = zeros(LANES), zeros(thirds * padded)
    squares_RV, products_RQ = jax.lax.fori_loop(0, M // chunk, add, init)
    # Add the smallest parts first.
    parts = [products_RQ[:, i * padded : i * padded + Q] for i in reversed(range(thirds))]
    mean_R1 = jnp.sum(squares_RV, axis=1, keepdims=True) / M
    return functools.reduce(jnp.add, parts) * jax.lax.rsqrt(mean_R1 + eps)


def _thirds(fn_QM: Float32[Array, "Q M"]) -> list[Float32[Array, "Y M"]]:
    """Split weights into three parts of eight bits that add up to them; pads Q to 16s."""
    missing = -fn_QM.shape[0] % 16
    if missing:
        zeros = jnp.zeros((missing, fn_QM.shape[1]), jnp.float32)
        fn_QM = jnp.concatenate([fn_QM, zeros])
    parts = []
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(fn_QM, jnp.int32)
        parts.append(jax.lax.bitcast_convert_type(bits & -(1 << 16), jnp.float32))
        fn_QM = fn_QM - parts[-1]
    return [*parts, fn_QM]


def _collapse(
    x_ref: Any, out_ref: Any, weight_RN: Float32[Array, "R N"]
) -> tuple[Callable[[Any], None], int]:
    """A function that writes one chunk of the streams' weighted sum, and the number of chunks."""
    D, N = out_ref.shape[1], weight_RN.shape[1]
    chunk = math.gcd(D, _COLLAPSED)

    def collapse(i: Any) -> None:
        first = pl.multiple_of(i * chunk, chunk)
        parts = [
            weight_RN[:, j : j + 1] * x_ref[:, pl.ds(first + j * D, chunk)].astype(jnp.float32)
            for j in range(N)
        ]
        out_ref[:, pl.ds(first, chunk)] = functools.reduce(jnp.add, parts).astype(out_ref.dtype)

    return collapse, D // chunk


def _sinkhorn(
    logits_NR: list[Float32[Array, "N R"]], eps: float
) -> tuple[list[Float32[Array, "N R"]], Callable[[Any], Any]]:
    """`reference.sinkhorn`, with one array per row of the matrices.

    Returns:
      The matrices after the first step, and a function for another step.
    """

    def over_columns(m: Any) -> Any:
        return [row / (jnp.sum(row, axis=0, keepdims=True) + eps) for row in m]

    def over_rows(m: Any) -> Any:
        total = functools.reduce(jnp.add, m) + eps
        return [row / total for row in m]

    shifted = [jnp.exp(row - jnp.max(row, axis=0, keepdims=True)) for row in logits_NR]
    m = [row / jnp.sum(row, axis=0, keepdims=True) + eps for row in shifted]
    return over_rows(m), lambda m: over_rows(over_columns(m))
