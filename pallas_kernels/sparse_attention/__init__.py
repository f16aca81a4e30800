"""Attention to the window and to the entries that were chosen: the core of CSA.

As `dense_attention`, except that the entries seen are listed for each query. Here too only the
reference form is to be differentiated.

Axis letters: L layers of a stack, B batch, T queries, H heads, K head dim, R rows of the window's
ring, X = window + T keys of a chunk's window, S entries there is room for, k entries chosen.
"""

from typing import Literal

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.implementations import require
from pallas_kernels.sparse_attention import reference, xla

Impl = Literal["auto", "xla", "reference"]
_FORMS = {"auto": xla, "xla": xla, "reference": reference}


def decode(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """A few queries per row, whose window is a ring.

    Args:
      q_BTHK: queries.
      window_BRK: keys of the newest tokens, in any order.
      window_mask_BTR: those that each query sees.
      pool_LBSK: entries of all layers of a stack.
      layer: the layer to read.
      indices_BTk: entries that each query sees, each once, in any order; -1 for none.
      sink_H: a logit per head.
      scale: multiplies q . key.
      impl: 'auto' takes the best form for the compile target.
    Raises:
      NotImplementedError: no such form.
    """
    require("sparse_attention.decode", impl, _FORMS)
    return _FORMS[impl].decode(
        q_BTHK, window_BRK, window_mask_BTR, pool_LBSK, layer, indices_BTk, sink_H, scale=scale
    )


def prefill(
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    window: int,
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """A chunk of queries at positions start, start + 1, ...

    Args:
      q_BTHK: queries.
      window_BXK: keys of positions start - window .. start + T - 1; those below 0 are not seen.
      start_B: position of each row's first query.
      pool_LBSK: as for `decode`.
      layer: as for `decode`.
      indices_BTk: as for `decode`.
      sink_H: a logit per head.
      window: tokens that a query sees, itself included.
      scale: multiplies q . key.
      impl: as for `decode`.
    Raises:
      NotImplementedError: no such form.
      ValueError: window_BXK has not window + T keys.
    """
    require("sparse_attention.prefill", impl, _FORMS)
    queries, keys = q_BTHK.shape[1], window_BXK.shape[1]
    softmax.require_chunk_window("sparse_attention.prefill", keys, window, queries)
    return _FORMS[impl].prefill(
        q_BTHK,
        window_BXK,
        start_B,
        pool_LBSK,
        layer,
        indices_BTk,
        sink_H,
        window=window,
        scale=scale,
    )
