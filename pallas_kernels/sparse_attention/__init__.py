"""Attention to the window and to the chosen entries: the core of CSA.

Like `dense_attention`, except that each query lists the entries it sees, and that entries that are
not in pages may be stored in eight bits, too (`Fp8Rows`; they have no gradient then). Window and
entries are never concatenated.

TPU kernels take queries, window and entries all in bfloat16 or all in float32, heads in multiples
of 16, head dims in multiples of 128, pools with a capacity that is a multiple of 16 entries (8 in
float32, 32 in eight bits), pages of a power of two of them, 16 or more (8, 32), and gather without
copying the pool. GPU kernels take one document per row, and pages of any size. Pages of bytes must
be in `byte_rows.FP8` on both. Where there is no kernel, XLA's form runs.

Axis letters: L layers of a stack, B batch, T queries, H heads, K head dim, R rows of the window's
ring, X = window + T keys of a chunk's window, S capacity of the pool in entries, k entries chosen.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import paged, softmax
from pallas_kernels.attention_gradients import differentiable
from pallas_kernels.implementations import (
    Impl,
    LazyForm,
    check_arrays,
    check_dtype,
    check_number,
    check_shape,
)
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import reference, rows, tpu, xla
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.rows import Fp8Rows, Pool

__all__ = ["Fp8Rows", "decode", "prefill"]

_FORMS = {"tpu": tpu, "gpu": LazyForm(f"{__name__}.gpu"), "xla": xla, "reference": reference}
_run = differentiable("sparse_attention", _FORMS)


def decode(
    *,
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """Attention of a few queries per row, whose window is a ring.

    Args:
      q_BTHK: queries.
      window_BRK: keys of the newest tokens, in any order.
      window_mask_BTR: which of them each query sees.
      pool_LBSK: entries of all layers of a stack, also in pages; those not listed may be garbage.
      layer: the layer to read.
      indices_BTk: the entries that each query sees, without repeats, in any order; -1 for none.
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
        indices_BTk=indices_BTk,
        sink_H=sink_H,
    )
    _check("sparse_attention.decode", inputs, scale)
    return _run("decode", impl, inputs._replace(layer=jnp.asarray(layer)), scale=scale)


def prefill(
    *,
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Pool,
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    first_BT: Int[Array, "B T"] | None = None,
    window: int,
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """Attention of a chunk of queries at positions start, start + 1, ...

    A row may hold several documents; `first_BT` then gives, for each query, the start of its own.

    Args:
      q_BTHK: queries.
      window_BXK: keys of positions start - window .. start + T - 1; negative ones are not seen.
      start_B: position of each row's first query.
      pool_LBSK: as for `decode`.
      layer: as for `decode`.
      indices_BTk: as for `decode`.
      sink_H: a logit per head.
      first_BT: position where each query's document starts; earlier keys of the window are not
        seen. None: 0.
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
        indices_BTk=indices_BTk,
        sink_H=sink_H,
        first_BT=first_BT,
    )
    sizes = _check("sparse_attention.prefill", inputs, scale)
    softmax.require_chunk_window("sparse_attention.prefill", sizes["X"], window, sizes["T"])
    inputs = inputs._replace(layer=jnp.asarray(layer))
    return _run("prefill", impl, inputs, window=window, scale=scale)


def _check(op: str, inputs: DecodeInputs | PrefillInputs, scale: Any) -> dict[str, int]:
    """Check the arguments; returns the size of each axis letter."""
    check_number(op, scale=scale)
    pool, arrays = inputs.pool_LBSK, inputs._asdict()
    if isinstance(pool, Fp8Rows | Paged):
        del arrays["pool_LBSK"]
    if arrays.get("first_BT") is None:
        arrays.pop("first_BT", None)
    integers = ("start_B", "layer", "indices_BTk", "first_BT")
    sizes = check_arrays(op, arrays, integers=integers, booleans=("window_mask_BTR",))
    if isinstance(pool, Paged):
        paged.check(op, "pool_LBSK", pool, sizes, channels="K")
    if isinstance(pool, Fp8Rows):
        check_dtype(op, "pool_LBSK.data", pool.data, jnp.uint8)
        check_shape(op, "pool_LBSK.data_LBSW", pool.data, {**sizes, "W": rows.WIDTH})
        check_shape(op, "pool_LBSK", pool, sizes)
    return sizes
