"""The routed experts: each token goes through the clamped SwiGLU of its chosen experts.

In every form, gradients flow to tokens, routing weights, experts' matrices that are arrays and the
factors of `LoraWeight`; quantised matrices are constants. The backward pass recomputes the hidden
activations.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dtypes import accumulator
from pallas_kernels.grouped_matmul import reference, stacks, tpu, xla
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.grouped_matmul.lora import LoraWeight, check_expert
from pallas_kernels.grouped_matmul.stacks import LayerWeight, Weight
from pallas_kernels.implementations import (
    Impl,
    LazyForm,
    check_arrays,
    check_flag,
    check_number,
    dispatch,
)

__all__ = ["LayerWeight", "LoraWeight", "Weight", "expert_mlp"]

_FORMS = {"tpu": tpu, "gpu": LazyForm(f"{__name__}.gpu"), "xla": xla, "reference": reference}


def expert_mlp(
    *,
    x_TD: Float[Array, "T D"],
    expert_TA: Int[Array, "T A"],
    weight_TA: Float[Array, "T A"],
    w1_LEFD: Weight,
    w3_LEFD: Weight,
    w2_LEDF: Weight,
    layer: Int[Array, ""],
    limit: float,
    weight_first: bool,
    impl: Impl = "auto",
) -> Float[Array, "T D"]:
    """Each token's weighted sum over its experts of w2 (silu(min(w1 x, limit)) * clip(w3 x)).

    Args:
      x_TD: tokens.
      expert_TA: ids of each token's experts. Ids outside 0 .. E - 1 contribute nothing; a repeated
        id counts each time.
      weight_TA: routing weights; arbitrary where an id contributes nothing.
      w1_LEFD: gate matrices of all experts of a stack of layers: an array in x's dtype, quantised,
        or either with a low-rank update. Only the chosen experts of `layer` are read. Can be a
        `LayerWeight`, whose gradient covers that layer only; w3 and w2 must then be too.
      w3_LEFD: up matrices.
      w2_LEDF: down matrices.
      layer: index of the layer in the stack, 0 to L - 1.
      limit: upper bound of gate; up is clipped to [-limit, limit].
      weight_first: whether the routing weight multiplies the hidden activation (DeepSeek's runtime)
        or the expert's output (transformers).
      impl: 'reference' runs every token through every expert. 'auto' picks the best form for the
        compile target.

    Returns:
      float32, or x's dtype if wider.

    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: a dtype that the contract does not allow.
      ValueError: shapes that do not match.
    """
    inputs = Inputs(
        x_TD=x_TD,
        expert_TA=expert_TA,
        weight_TA=weight_TA,
        w1_LEFD=w1_LEFD,
        w3_LEFD=w3_LEFD,
        w2_LEDF=w2_LEDF,
        layer=layer,
    )
    _check(inputs)
    check_number("grouped_matmul.expert_mlp", limit=limit)
    check_flag("grouped_matmul.expert_mlp", weight_first=weight_first)
    if expert_TA.size == 0:
        return jnp.zeros(x_TD.shape, accumulator(x_TD.dtype))
    inputs = inputs._replace(layer=jnp.asarray(layer))
    if impl == "reference":
        return _reference(inputs, limit=limit, weight_first=weight_first)
    return _expert_mlp((limit, weight_first, impl), inputs)


def _check(inputs: Inputs) -> None:
    op, weights = "grouped_matmul.expert_mlp", ("w1_LEFD", "w3_LEFD", "w2_LEDF")
    arrays = {name: x for name, x in inputs._asdict().items() if name not in weights}
    sizes = check_arrays(op, arrays, integers=("expert_TA", "layer"))
    for name, w in zip(weights, inputs.weights, strict=True):
        sizes = check_expert(op, name, stacks.read(w), sizes)
        if isinstance(w, LayerWeight):
            check_expert(op, f"own {name}", w.own, sizes | {"L": 1})
    if len({isinstance(w, LayerWeight) for w in inputs.weights}) > 1:
        raise ValueError(f"{op}: w1, w3 and w2 must be LayerWeight, all three or none.")


def _reference(inputs: Inputs, **static: Any) -> Any:
    if isinstance(inputs.w1_LEFD, LayerWeight):
        inputs = inputs.with_weights(*map(stacks.learner, inputs.weights))
        inputs = inputs._replace(layer=jnp.zeros_like(inputs.layer))
    return reference.expert_mlp(inputs, **static)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """Residuals of the backward pass: the inputs, and which of the three weights get a gradient."""

    inputs: Inputs
    learn: tuple[bool, bool, bool] = dataclasses.field(metadata={"static": True})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(settings: Any, inputs: Inputs) -> Any:
    limit, weight_first, impl = settings
    static = {"limit": limit, "weight_first": weight_first}
    inputs = inputs.with_weights(*map(stacks.read, inputs.weights))
    return dispatch("grouped_matmul", "expert_mlp", impl, _FORMS, inputs, **static)


def _forward(settings: Any, primals: Inputs) -> Any:
    inputs = jax.tree.map(lambda primal: primal.value, primals)
    perturbed = lambda w: any(primal.perturbed for primal in jax.tree.leaves(w))
    gate, up, down = map(perturbed, primals.weights)
    return _expert_mlp(settings, inputs), _Saved(inputs, (gate, up, down))


def _backward(settings: Any, saved: _Saved, grad_TD: Any) -> Any:
    limit, _, impl = settings
    if isinstance(grad_TD, jax.custom_derivatives.SymbolicZero):
        return (None,)
    # No gradient depends on where the routing weight is multiplied in.
    static = {"limit": limit, "learn": saved.learn}
    weights, layer = saved.inputs.weights, saved.inputs.layer
    inputs = saved.inputs.with_weights(*map(stacks.read, weights))
    x_grad, weight_grad, *grads = dispatch(
        "grouped_matmul", "expert_mlp_backward", impl, _FORMS, grad_TD, inputs, **static
    )
    gate, up, down = (stacks.cotangent(w, layer, g) for w, g in zip(weights, grads, strict=True))
    of_integers: Any = None
    return (Inputs(x_grad, of_integers, weight_grad, gate, up, down, of_integers),)


_expert_mlp.defvjp(_forward, _backward, symbolic_zeros=True)
