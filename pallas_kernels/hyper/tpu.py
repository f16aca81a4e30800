"""Hyper-connections on TPUs: each function reads and writes the streams once.

Grid: blocks of tokens, with all of their streams in VMEM.

Axis letters: as in the package; R tokens of all rows of the batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.hyper import tpu_post, tpu_pre
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import LANES, resident

_TOKENS = 256  # tokens per block to collapse: its matmul loads the weights once
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=56 * 2**20)
_MOST_BYTES = 2**16  # most bytes of a token's streams


def pre(
    x_BTM: Float[Array, "B T M"],
    fn_QM: Float[Array, "Q M"],
    base_Q: Float32[Array, " Q"],
    scale_3: Float32[Array, " 3"],
    *,
    streams: int,
    steps: int,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T N"], Float32[Array, "B T N N"]]:
    """See the package. The kernel writes the mixing weights with tokens along lanes.

    Raises:
      Unsupported: another dtype, number of streams or number of channels.
    """
    B, T, N = *x_BTM.shape[:2], streams
    sizes = (N, N, N * N)
    scale_Q = jnp.concatenate([jnp.broadcast_to(scale_3[i], size) for i, size in enumerate(sizes)])
    out_RD, weights_QR = _collapse(
        x_BTM, fn_QM, base_Q, scale_Q, streams, steps=steps, eps=eps, norm_eps=norm_eps
    )
    post_BTN = weights_QR[:N].T.reshape(B, T, N)
    comb_BTNN = weights_QR[N:].T.reshape(B, T, N, N)
    return out_RD.reshape(B, T, -1), post_BTN, comb_BTNN


def head(
    x_BTM: Float[Array, "B T M"],
    fn_NM: Float[Array, "N M"],
    base_N: Float32[Array, " N"],
    scale_1: Float32[Array, " 1"],
    *,
    eps: float,
    norm_eps: float,
) -> Float[Array, "B T D"]:
    """Like `pre`, but only the first of its results."""
    N = len(fn_NM)
    scale_N = jnp.broadcast_to(scale_1, (N,))
    (out_RD,) = _collapse(x_BTM, fn_NM, base_N, scale_N, N, steps=0, eps=eps, norm_eps=norm_eps)
    return out_RD.reshape(*x_BTM.shape[:2], -1)


def post(
    output_BTD: Float[Array, "B T D"],
    x_BTM: Float[Array, "B T M"],
    post_BTN: Float[Array, "B T N"],
    comb_BTNN: Float[Array, "B T N N"],
) -> Float[Array, "B T M"]:
    """See the package.

    Raises:
      Unsupported: as for `pre`.
    """
    N = post_BTN.shape[-1]
    _require(x_BTM, N, post_BTN.dtype, comb_BTNN.dtype)
    R, M = x_BTM.shape[0] * x_BTM.shape[1], x_BTM.shape[2]
    weights_QR = jnp.concatenate([post_BTN.reshape(R, N).T, comb_BTNN.reshape(R, N * N).T])
    # Rounded up to whole groups, so that the last is within its block for any number of tokens.
    block, along = _blocks(pl.cdiv(R, tpu_post.GROUP) * tpu_post.GROUP, LANES)
    return pl.pallas_call(
        functools.partial(tpu_post.kernel, N),
        grid=(pl.cdiv(R, block),),
        in_specs=[
            along((len(weights_QR), LANES), 1),
            along((block, M // N), 0),
            along((block, M), 0),
        ],
        out_specs=along((block, M), 0),
        out_shape=jax.ShapeDtypeStruct((R, M), x_BTM.dtype),
        scratch_shapes=[pltpu.VMEM((LANES, LANES), jnp.float32)],
        compiler_params=_PARAMS,
        name="hyper_post",
    )(weights_QR, output_BTD.reshape(R, -1), x_BTM.reshape(R, M)).reshape(x_BTM.shape)


def _collapse(
    x_BTM: Any, fn_QM: Any, base_Q: Any, scale_Q: Any, streams: int, **static: Any
) -> tuple[Any, ...]:
    """The collapsed streams and, if Q > N, the weights of the output and of the old streams."""
    _require(x_BTM, streams, base_Q.dtype, scale_Q.dtype)
    R, (Q, M) = x_BTM.shape[0] * x_BTM.shape[1], fn_QM.shape
    block, along = _blocks(R, _TOKENS)
    weights = [(Q - streams, R)] if streams < Q else []
    outs = pl.pallas_call(
        functools.partial(tpu_pre.kernel, streams, **static),
        grid=(pl.cdiv(R, block),),
        in_specs=[along((block, M), 0), resident(Q, M), resident(1, Q), resident(1, Q)],
        out_specs=[along((block, M // streams), 0), *(along((n, block), 1) for n, _ in weights)],
        out_shape=[
            jax.ShapeDtypeStruct((R, M // streams), x_BTM.dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in weights),
        ],
        scratch_shapes=[pltpu.VMEM((_TOKENS, LANES), jnp.float32)],
        compiler_params=_PARAMS,
        name="hyper_pre" if weights else "hyper_head",
    )(x_BTM.reshape(R, M), fn_QM.astype(jnp.float32), base_Q[None], scale_Q[None])
    return tuple(outs)


def _blocks(tokens: int, most: int) -> tuple[int, Any]:
    """Tokens per block, and a function of (shape, dim): specs of blocks of tokens along `dim`."""

    def along(shape: tuple[int, int], dim: int) -> pl.BlockSpec:
        rows = lambda token_block: (token_block, 0)
        columns = lambda token_block: (0, token_block)
        return pl.BlockSpec(shape, columns if dim else rows)

    return min(tokens, most), along


def _require(x_BTM: Any, streams: int, *dtypes: Any) -> None:
    takes = "hyper on TPU takes"
    channels = x_BTM.shape[-1]
    if x_BTM.dtype not in (jnp.bfloat16, jnp.float32) or set(dtypes) != {jnp.dtype(jnp.float32)}:
        raise Unsupported(
            f"{takes} streams in bfloat16 or float32 and weights in float32, not"
            f" {x_BTM.dtype} and {[str(dtype) for dtype in dtypes]}."
        )
    if channels % (streams * LANES) or channels * x_BTM.dtype.itemsize > _MOST_BYTES:
        raise Unsupported(
            f"{takes} streams of a multiple of {LANES} channels, up to {_MOST_BYTES} bytes in all,"
            f" not {streams} of {channels // streams}."
        )
    if x_BTM.size == 0:
        raise Unsupported(f"{takes} at least one token.")
    if streams * (2 + streams) > LANES // 3:
        raise Unsupported(f"{takes} up to 5 streams, not {streams}.")
