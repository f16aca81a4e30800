"""CSA retrieval: the k best-scored entries for each query (report, section 2.3.1, eqs. 13-17).

The score of entry s for query t is the sum over index heads i of
weights[t, i] * relu(q[t, i] . key[s]), in float32. The choice is exact: ties go to the lowest
index, +0.0 equals -0.0, and NaN counts as larger than any number. No gradient flows through the
choice.

Axis letters: L layers of a stack, B batch, T queries, I index heads, J index head dim,
S capacity in entries, k entries chosen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.implementations import Impl, LazyForm, check_arrays, dispatch
from pallas_kernels.indexer_topk import reference, tpu, xla
from pallas_kernels.indexer_topk.keys import (
    Fp4Keys,
    Fp8Keys,
    Keys,
    check,
    clipped,
    entries,
    to_fp4,
    to_fp8,
)
from pallas_kernels.indexer_topk.sharded import select_sharded

__all__ = [
    "Fp4Keys",
    "Fp8Keys",
    "Keys",
    "scores",
    "select",
    "select_sharded",
    "to_fp4",
    "to_fp8",
]

_FORMS = {"tpu": tpu, "gpu": LazyForm(f"{__name__}.gpu"), "xla": xla, "reference": reference}


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys: Keys,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    hidden_BT: Int[Array, "B T"] | None = None,
    *,
    k: int,
    impl: Impl = "auto",
) -> Int32[Array, "B T k"]:
    """Indices of the k best entries, ascending, padded with -1 if fewer are visible.

    Args:
      q_BTIJ: index queries.
      weights_BTI: each head's weight, including all scale factors.
      keys: index keys of all layers of a stack; a quantised key is its codes times its scale.
        Kernels take pages of bytes in `byte_rows.FP4`.
      layer: the layer to read, 0 to L - 1.
      visible_BT: the query sees only entries below this; the rest may be garbage. Clipped to
        0 .. S.
      hidden_BT: entries below this are not seen and may be garbage, for rows of several documents.
        All are hidden if it is `visible_BT` or more. None: 0. Not supported by GPU kernels.
      k: entries to choose, 1 or more; may exceed S.
      impl: 'auto' picks the best form for the compile target.
    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: a dtype that the contract does not allow.
      ValueError: shapes that do not match, or k below 1.
    """
    arrays = {"q_BTIJ": q_BTIJ, "weights_BTI": weights_BTI, "layer": layer}
    arrays |= {"visible_BT": visible_BT}
    arrays |= {} if hidden_BT is None else {"hidden_BT": hidden_BT}
    check("indexer_topk.select", arrays, keys, k)
    capacity = entries(keys)
    if 0 in (*visible_BT.shape, capacity):
        return jnp.full((*visible_BT.shape, k), -1, jnp.int32)
    args = q_BTIJ, weights_BTI, keys, jnp.asarray(layer), clipped(visible_BT, capacity)
    args += (None if hidden_BT is None else clipped(hidden_BT, capacity),)
    return dispatch("indexer_topk", "select", impl, _FORMS, *jax.lax.stop_gradient(args), k=k)


def scores(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
    *,
    impl: Impl = "auto",
) -> Float32[Array, "B T S"]:
    """All scores, for the indexer's own loss.

    XLA's form stores the products of one head at a time, in its gradients too.

    Args:
      q_BTIJ: index queries.
      weights_BTI: each head's weight, including all scale factors.
      keys_BSJ: one layer's index keys.
      impl: 'auto' is 'xla', on every platform.
    Raises:
      NotImplementedError: no such form.
      TypeError: an array that is not floating-point.
      ValueError: shapes that do not match.
    """
    arrays = {"q_BTIJ": q_BTIJ, "weights_BTI": weights_BTI, "keys_BSJ": keys_BSJ}
    check_arrays("indexer_topk.scores", arrays)
    return _scores(impl, (q_BTIJ, weights_BTI, keys_BSJ))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(impl: str, args: Any) -> Any:
    return dispatch("indexer_topk", "scores", impl, _FORMS, *args)


def _scores_forward(impl: str, args: Any) -> Any:
    return _scores(impl, args), args


def _scores_backward(impl: str, args: Any, cotangent_BTS: Any) -> Any:
    gradients = dispatch("indexer_topk", "scores_backward", impl, _FORMS, *args, cotangent_BTS)
    return (gradients,)


_scores.defvjp(_scores_forward, _scores_backward)
