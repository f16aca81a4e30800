"""New streams of a block of tokens.

Axis letters: as in the package; R tokens of a block, G of a group, V channels of a chunk.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

GROUP = 16  # tokens of a bfloat16 register
_CHUNK = 512  # channels at a time


def kernel(
    streams: int,
    weights_ref: Any,  # [N + N * N, 128]
    output_ref: Any,  # [R, D]
    x_ref: Any,  # [R, M]
    out_ref: Any,  # [R, M]
    square_ref: Any,  # [128, 128]
) -> None:
    """The weights arrive with tokens along lanes, and are transposed to tokens along sublanes."""
    N, Q, (R, D) = streams, len(weights_ref), output_ref.shape
    square_ref[:Q] = weights_ref[...]
    square_ref[...] = square_ref[...].T
    chunk = math.gcd(D, _CHUNK)

    def tokens(g: Any, _: Any) -> None:
        rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
        weights_G128 = square_ref[rows]
        weight = lambda q: weights_G128[:, q : q + 1]

        def channels(c: Any, _: Any) -> None:
            lanes = lambda stream: pl.ds(pl.multiple_of(c * chunk, chunk) + stream * D, chunk)
            output_GV = output_ref[rows, lanes(0)].astype(jnp.float32)
            olds_GV = [x_ref[rows, lanes(j)].astype(jnp.float32) for j in range(N)]
            for k in range(N):
                new_GV = weight(k) * output_GV
                for j, old_GV in enumerate(olds_GV):
                    new_GV = new_GV + weight(N + j * N + k) * old_GV
                out_ref[rows, lanes(k)] = new_GV.astype(out_ref.dtype)

        jax.lax.fori_loop(0, D // chunk, channels, None)

    jax.lax.fori_loop(0, R // GROUP, tokens, None)
