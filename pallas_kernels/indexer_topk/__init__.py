"""CSA retrieval: the k best-scored entries for each query (report, section 2.3.1, eqs. 13-17).

The score of entry s for query t is the sum over index heads i of
weights[t, i] * relu(q[t, i] . key[s]), in float32. The choice is exact: of equal scores the lowest
index wins, +0.0 and -0.0 are equal, and a NaN counts as larger than any number. Gradients do not
pass through a choice.

Axis letters: L layers of a stack, B batch, T queries, I index heads, J index head dim,
S entries there is room for, k entries chosen.
"""

from typing import Literal

from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.implementations import require
from pallas_kernels.indexer_topk import reference, xla

Impl = Literal["auto", "xla", "reference"]
_FORMS = {"auto": xla, "xla": xla, "reference": reference}


def select(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys_LBSJ: Float[Array, "L B S J"],
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    *,
    k: int,
    impl: Impl = "auto",
) -> Int32[Array, "B T k"]:
    """Indices of the best entries, ascending; -1, at the end, where there are fewer than k.

    Args:
      q_BTIJ: index queries.
      weights_BTI: each head's weight, all scale factors in it.
      keys_LBSJ: index keys of all layers of a stack.
      layer: the layer to read.
      visible_BT: only entries below this exist for the query, 0 to S; the rest may be garbage.
      k: entries to choose; may exceed S.
      impl: 'auto' takes the best form for the compile target.
    Raises:
      NotImplementedError: no such form.
    """
    require("indexer_topk.select", impl, _FORMS)
    return _FORMS[impl].select(q_BTIJ, weights_BTI, keys_LBSJ, layer, visible_BT, k=k)
