"""Attention to the window and to all visible entries: HCA and sliding-window layers.

One key head serves all query heads, and keys are also values. One softmax runs over window and
entries, with a sink logit per head that takes its share of probability and adds no value. Logits
and softmax are float32; probabilities are rounded to the keys' dtype before they multiply the
values. Rows that see nothing return 0. What is not visible may be garbage. Queries, window, pool
and sink have gradients (in the pool, 0 for all layers but one), computed in blocks from recomputed
logits; with a pool in pages (`Paged`) there are none.

TPU kernels compute the attention and the gradients of prefill, XLA the gradients of decode. The
kernels take pages with a number of entries that is even in bfloat16 (a multiple of 4 in bytes) and
divides a block (512, or 1024 in decode) or is a multiple of 16 (8 in float32, 32 in bytes), and
copy those that a block of queries sees. Pages of bytes must be in `byte_rows.FP8`.

Axis letters: L layers of a stack, B batch, T queries, H heads, K head dim, R rows of the window's
ring, X = window + T keys of a chunk's window, S capacity of the pool in entries.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import paged, softmax
from pallas_kernels.attention_gradients import differentiable
from pallas_kernels.dense_attention import reference, tpu, xla
from pallas_kernels.dense_attention.inputs import DecodeInputs, Pool, PrefillInputs
from pallas_kernels.implementations import Impl, check_arrays, check_number
from pallas_kernels.paged import Paged

_run = differentiable("dense_attention", {"tpu": tpu, "xla": xla, "reference": reference})


def decode(
    *,
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    sink_H: Float[Array, " H"],
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """Attention of a few queries per row, whose window is a ring.

    Args:
      q_BTHK: queries.
      window_BRK: keys of the newest tokens, in any order.
      window_mask_BTR: which of them each query sees.
      pool_LBSK: entries of all layers of a stack, also in pages; None without a pool.
      layer: the layer to read.
      visible_BT: each query sees the entries below this, 0 to S.
      sink_H: a logit per head.
      scale: multiplies q . key.
      impl: 'auto' picks the best form for the compile target.
    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: a dtype that the contract does not allow.
      ValueError: shapes that do not match.
    """
    inputs = DecodeInputs(
        q_BTHK=q_BTHK,
        window_BRK=window_BRK,
        window_mask_BTR=window_mask_BTR,
        pool_LBSK=pool_LBSK,
        layer=layer,
        visible_BT=visible_BT,
        sink_H=sink_H,
    )
    _check("dense_attention.decode", inputs, scale)
    return _run("decode", impl, inputs._replace(layer=jnp.asarray(layer)), scale=scale)


def prefill(
    *,
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    sink_H: Float[Array, " H"],
    first_BT: Int[Array, "B T"] | None = None,
    hidden_BT: Int[Array, "B T"] | None = None,
    window: int,
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """Attention of a chunk of queries at positions start, start + 1, ...

    A row may hold several documents; `first_BT` and `hidden_BT` then exclude, for each query, what
    comes before its own.

    Args:
      q_BTHK: queries.
      window_BXK: keys of positions start - window .. start + T - 1; negative ones are not seen.
      start_B: position of each row's first query.
      pool_LBSK: as for `decode`.
      layer: as for `decode`.
      visible_BT: as for `decode`.
      sink_H: a logit per head.
      first_BT: position where each query's document starts; earlier keys of the window are not
        seen. None: 0.
      hidden_BT: entries below this are not seen; those seen are hidden .. visible - 1. None: 0.
      window: tokens that a query sees, itself included.
      scale: multiplies q . key.
      impl: as for `decode`.
    Raises:
      NotImplementedError, TypeError, ValueError: as for `decode`.
    """
    inputs = PrefillInputs(
        q_BTHK=q_BTHK,
        window_BXK=window_BXK,
        start_B=start_B,
        pool_LBSK=pool_LBSK,
        layer=layer,
        visible_BT=visible_BT,
        sink_H=sink_H,
        first_BT=first_BT,
        hidden_BT=hidden_BT,
    )
    sizes = _check("dense_attention.prefill", inputs, scale)
    softmax.require_chunk_window("dense_attention.prefill", sizes["X"], window, sizes["T"])
    inputs = inputs._replace(layer=jnp.asarray(layer))
    return _run("prefill", impl, inputs, window=window, scale=scale)


def _check(op: str, inputs: DecodeInputs | PrefillInputs, scale: Any) -> dict[str, int]:
    """Check the arguments; returns the size of each axis letter."""
    check_number(op, scale=scale)
    optional = ("pool_LBSK", "first_BT", "hidden_BT")
    arrays, pool = inputs._asdict(), inputs.pool_LBSK
    present = {name: x for name, x in arrays.items() if name not in optional or x is not None}
    if isinstance(pool, Paged):
        del present["pool_LBSK"]
    integers = ("start_B", "layer", "visible_BT", "first_BT", "hidden_BT")
    sizes = check_arrays(op, present, integers=integers, booleans=("window_mask_BTR",))
    if isinstance(pool, Paged):
        paged.check(op, "pool_LBSK", pool, sizes, channels="K")
    return sizes
