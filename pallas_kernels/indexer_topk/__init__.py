"""CSA retrieval: the k best-scored entries for each query (report, section 2.3.1, eqs. 13-17).

The score of entry s for query t is the sum over index heads i of
weights[t, i] * relu(q[t, i] . key[s]), in float32. The choice is exact: of equal scores the lowest
index wins, +0.0 and -0.0 are equal, and a NaN counts as larger than any number. Gradients do not
pass through a choice.

Axis letters: L layers of a stack, B batch, T queries, I index heads, J index head dim,
S entries there is room for, k entries chosen.
"""

import functools
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.implementations import check_arrays, dispatch
from pallas_kernels.indexer_topk import gpu, reference, tpu, xla
from pallas_kernels.indexer_topk.keys import (
    Fp4Keys,
    Fp8Keys,
    Keys,
    PagedKeys,
    check,
    entries,
    seen,
    to_fp4,
    to_fp8,
)
from pallas_kernels.indexer_topk.sharded import select_sharded

__all__ = [
    "Fp4Keys",
    "Fp8Keys",
    "Keys",
    "PagedKeys",
    "scores",
    "select",
    "select_sharded",
    "to_fp4",
    "to_fp8",
]

Impl = Literal["auto", "tpu", "gpu", "xla", "reference"]
_FORMS: dict[str, types.ModuleType] = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}


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
    """Indices of the best entries, ascending; -1, at the end, where there are fewer than k.

    Args:
      q_BTIJ: index queries.
      weights_BTI: each head's weight, all scale factors in it.
      keys: index keys of all layers of a stack; quantised ones stand for code times scale.
      layer: the layer to read, 0 to L - 1.
      visible_BT: only entries below this exist for the query; the rest may be garbage. Less than
        0 counts as 0, more than S as S.
      hidden_BT: entries before this are not seen either, and may be garbage: rows of several
        documents. From `visible_BT` on it hides all. None is 0; not in GPU kernels.
      k: entries to choose, at least 1; may exceed S.
      impl: 'auto' takes the best form for the compile target.
    Raises:
      NotImplementedError: no such form, or it does not take these arguments.
      TypeError: a dtype that is not the contract's.
      ValueError: shapes that do not fit together, or k below 1.
    """
    arrays = {"q_BTIJ": q_BTIJ, "weights_BTI": weights_BTI, "layer": layer}
    arrays |= {"visible_BT": visible_BT}
    arrays |= {} if hidden_BT is None else {"hidden_BT": hidden_BT}
    check("indexer_topk.select", arrays, keys, k)
    room = entries(keys)
    if 0 in (*visible_BT.shape, room):
        return jnp.full((*visible_BT.shape, k), -1, jnp.int32)
    args = q_BTIJ, weights_BTI, keys, jnp.asarray(layer), seen(visible_BT, room)
    args += (None if hidden_BT is None else seen(hidden_BT, room),)
    return dispatch("indexer_topk", "select", impl, _FORMS, *jax.lax.stop_gradient(args), k=k)


def scores(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_BSJ: Float[Array, "B S J"],
    *,
    impl: Impl = "auto",
) -> Float32[Array, "B T S"]:
    """All scores, for the indexer's own loss; their gradients keep no product of all heads.

    Args:
      q_BTIJ: index queries.
      weights_BTI: each head's weight, all scale factors in it.
      keys_BSJ: one layer's index keys.
      impl: 'auto' is 'xla', which serves every platform.
    Raises:
      NotImplementedError: no such form.
      TypeError: a dtype that is not a float's.
      ValueError: shapes that do not fit together.
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
