"""The routed experts: each token through its chosen experts' clamped SwiGLU.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden.
"""

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels import quantize
from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.implementations import require

__all__ = ["expert_mlp"]

Impl = Literal["auto", "xla", "reference"]
_FORMS = {"auto": xla, "xla": xla, "reference": reference}


def expert_mlp(
    x_TD: Float[Array, "T D"],
    expert_TA: Int[Array, "T A"],
    weight_TA: Float[Array, "T A"],
    w1_LEFD: quantize.Weight,
    w3_LEFD: quantize.Weight,
    w2_LEDF: quantize.Weight,
    layer: Int[Array, ""],
    *,
    limit: float,
    weight_first: bool,
    impl: Impl = "auto",
) -> Float[Array, "T D"]:
    """Each token's weighted sum over its experts of w2 (silu(min(w1 x, limit)) * clip(w3 x)).

    Args:
      x_TD: tokens.
      expert_TA: ids of each token's experts. Ids that are not 0 .. E - 1 contribute nothing; a
        repeated id counts as often as it stands there.
      weight_TA: routing weights.
      w1_LEFD: gate matrices of all experts of a stack of layers, an array in x's dtype or
        quantised; only the chosen experts of `layer` are read.
      w3_LEFD: up matrices.
      w2_LEDF: down matrices.
      layer: which layer of the stack.
      limit: gate is at most this, up between its negative and it.
      weight_first: the routing weight multiplies the hidden activation (DeepSeek's runtime),
        not the expert's output (transformers).
      impl: 'reference' puts every token through every expert and is differentiable; the other
        forms are not. 'auto' takes the best form for the compile target.

    Returns:
      float32, or wider if x is.

    Raises:
      NotImplementedError: no such form.
    """
    require("grouped_matmul.expert_mlp", impl, _FORMS)
    return _FORMS[impl].expert_mlp(
        x_TD,
        expert_TA,
        weight_TA,
        w1_LEFD,
        w3_LEFD,
        w2_LEDF,
        layer,
        limit=limit,
        weight_first=weight_first,
    )
