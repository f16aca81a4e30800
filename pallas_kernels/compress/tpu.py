"""Pallas TPU kernels: one for the entries of a chunk, one for those of a decoding step.

Axis letters: as in the package.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.compress import tpu_decode, tpu_prefill
from pallas_kernels.compress.tpu_pool import SUBLANES
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_tpu import LANES

_TOKENS = 256  # most tokens per entry; VMEM holds several times as many


def prefill(rows_BTC: Any, before_BPC: Any, start_B: Any, *rest: Any, **settings: Any) -> Any:
    """See the package.

    Raises:
      Unsupported: another dtype, K or ratio.
    """
    for tokens in (rows_BTC, before_BPC):
        _require(tokens, *rest, **settings)
    return tpu_prefill.prefill(rows_BTC, before_BPC, start_B, *rest, **settings)


def decode(ring_LBRC: Any, layer: Any, window_B: Any, *rest: Any, **settings: Any) -> Any:
    """See the package.

    Raises:
      Unsupported: another dtype, K or ratio.
    """
    _require(ring_LBRC, *rest, **settings)
    return tpu_decode.decode(ring_LBRC, layer, window_B, *rest, **settings)


def _require(
    tokens: Any,
    bias_MC: Any,
    scale_K: Any,
    table: Any,
    *,
    overlap: int,
    rounding: str,
    dtype: Any,
    **_: Any,
) -> None:
    takes = "compress on TPU takes"
    dim, ratio = len(scale_K), len(bias_MC)
    if tokens.dtype != jnp.float32 or dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(
            f"{takes} tokens in float32 and writes entries in bfloat16 or float32, not"
            f" {tokens.dtype} and {jnp.dtype(dtype)}."
        )
    if dim % LANES or (rounding == "fp4" and dim != LANES):
        raise Unsupported(f"{takes} a multiple of {LANES} channels ({LANES} for fp4), not {dim}.")
    if 2 * table[0].shape[2] > LANES:
        raise Unsupported(f"{takes} up to {LANES} rotated channels, not {2 * table[0].shape[2]}.")
    if overlap * ratio % SUBLANES or overlap * ratio > _TOKENS:
        raise Unsupported(
            f"{takes} a multiple of {SUBLANES} tokens per entry, up to {_TOKENS}, not"
            f" {overlap * ratio}."
        )
