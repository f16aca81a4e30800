"""The routed experts as Pallas TPU kernels: gate, up and activation in one, down in another.

In the backward pass, one kernel recomputes the hidden activations and goes back through the down
matmul and the activation, another goes back through gate and up; outer products give the gradients
of arrays.

Axis letters: T tokens, D hidden, A experts per token, L layers, E experts, F expert hidden,
P sorted rows (whole tiles), M tiles, R rows of a tile, r rank of a low-rank update.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import quantize
from pallas_kernels.grouped_matmul import lora, plan, reference, sorting
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.grouped_matmul.tpu_matmul import Products
from pallas_kernels.grouped_matmul.tpu_outer import outer
from pallas_kernels.implementations import Unsupported


def expert_mlp(inputs: Inputs, *, limit: float, weight_first: bool) -> Float[Array, "T D"]:
    """Sort the rows by expert, two grouped matmuls, sum per token.

    Raises:
      Unsupported: no rows, a dtype other than bfloat16 and float32, D or F that are not whole
        blocks.
    """
    _check(inputs)
    A, weight_TA = inputs.expert_TA.shape[1], inputs.weight_TA.astype(jnp.float32)
    steps = plan.make(inputs.expert_TA, inputs.w1_LEFD.shape[1])

    def finish(sums: Sequence[Array], weight_R1: Array) -> Any:
        hidden_RF = reference.activate(sums[0], sums[1], limit)
        return [hidden_RF * weight_R1 if weight_first else hidden_RF], None

    hidden = Products(steps, inputs.layer)
    x = hidden.add_rows(plan.sorted_rows(steps, inputs.x_TD, A))
    hidden.add_term(x, inputs.w1_LEFD, 0)
    hidden.add_term(x, inputs.w3_LEFD, 1)
    weight_M1R = plan.tiled(steps, weight_TA) if weight_first else None
    (hidden_PF,) = hidden.run("experts_hidden", finish=finish, number_M1R=weight_M1R)
    out = Products(steps, inputs.layer)
    out.add_term(out.add_rows(hidden_PF), inputs.w2_LEDF, 0)
    (out_PD,) = out.run("experts_out")
    weight = None if weight_first else weight_TA
    return sorting.sum_choices(out_PD, steps.order_P, steps.real, A, weight)


def expert_mlp_backward(
    grad_TD: Float[Array, "T D"], inputs: Inputs, *, limit: float, learn: tuple[bool, bool, bool]
) -> tuple[Array, Array, list[Array], list[Array], list[Array]]:
    """As `xla.expert_mlp_backward`.

    Raises:
      Unsupported: as for `expert_mlp`.
    """
    _check(inputs)
    x_TD, weight_TA, layer = inputs.x_TD, inputs.weight_TA, inputs.layer
    w1_LEFD, w3_LEFD, w2_LEDF = inputs.weights
    A = inputs.expert_TA.shape[1]
    steps = plan.make(inputs.expert_TA, w1_LEFD.shape[1])
    number_M1R = plan.tiled(steps, weight_TA.astype(jnp.float32))
    x_PD = plan.sorted_rows(steps, x_TD, A)
    grad_PD = plan.sorted_rows(steps, grad_TD.astype(x_TD.dtype), A)

    hidden = Products(steps, layer)
    x, grad = hidden.add_rows(x_PD), hidden.add_rows(grad_PD)
    low1, low3 = hidden.add_term(x, w1_LEFD, 0), hidden.add_term(x, w3_LEFD, 1)
    back2 = hidden.add_term(grad, w2_LEDF, 2, transposed=True)
    gate_PF, up_PF, hidden_PF, dweight_M1R = hidden.run(
        "experts_hidden_backward",
        finish=functools.partial(_hidden_backward, limit=limit),
        number_M1R=number_M1R,
        outputs=3,
        summed=True,
    )
    back = Products(steps, layer)
    gate, up = back.add_rows(gate_PF), back.add_rows(up_PF)
    back1 = back.add_term(gate, w1_LEFD, 0, transposed=True)
    back3 = back.add_term(up, w3_LEFD, 0, transposed=True)
    (dx_PD,) = back.run("experts_out_backward")
    dx_TD = sorting.sum_choices(dx_PD, steps.order_P, steps.real, A).astype(x_TD.dtype)
    dweight_P = dweight_M1R.reshape(-1).astype(weight_TA.dtype)
    dweight_TA = sorting.unsorted(dweight_P, steps.order_P, steps.real, A)

    low2 = None
    if learn[2] and isinstance(w2_LEDF, lora.LoraWeight):
        low2 = Products(steps, layer).low_rank(hidden_PF, w2_LEDF)
    sides = (
        (gate_PF, x_PD, low1, back1),
        (up_PF, x_PD, low3, back3),
        (grad_PD, hidden_PF, low2, back2),
    )
    gate_grad, up_grad, down_grad = (
        _weight_gradient(steps, w, *side) if learns else []
        for w, side, learns in zip(inputs.weights, sides, learn, strict=True)
    )
    return dx_TD, dweight_TA, gate_grad, up_grad, down_grad


def _hidden_backward(sums: Sequence[Array], weight_R1: Array, *, limit: float) -> Any:
    """Gradients of gate and up, weighted hidden activation; terms of the weight's gradient."""
    gate_RF, up_RF, back_RF = sums
    activate = lambda gate_RF, up_RF: reference.activate(gate_RF, up_RF, limit)
    hidden_RF, pull = jax.vjp(activate, gate_RF, up_RF)
    return [*pull(back_RF * weight_R1), hidden_RF * weight_R1], back_RF * hidden_RF


def _weight_gradient(
    steps: plan.Plan,
    w: lora.Weight,
    grad_PN: Array,
    x_PK: Array,
    low_Pr: Array | None,
    back_Pr: Array | None,
) -> list[Array]:
    """Gradients of a layer's experts, from the rows on both sides and in a low-rank middle."""
    parts = lora.learned(w)
    sides = [(grad_PN, x_PK)]
    if isinstance(w, lora.LoraWeight):
        assert low_Pr is not None
        assert back_Pr is not None
        # b's gradient has the rank first, which kernels write best.
        sides = [(back_Pr, x_PK), (low_Pr, grad_PN)]
    grads = []
    for part, (left, right) in zip(parts, sides, strict=False):
        grad_E = outer(
            steps, w.shape[1], left, right, dtype=part.dtype, name="experts_weight_gradient"
        )
        grad_E = jnp.swapaxes(grad_E, 1, 2) if left is low_Pr else grad_E
        grads.append(grad_E)
    return grads


def _check(inputs: Inputs) -> None:
    x_TD, expert_TA, weights = inputs.x_TD, inputs.expert_TA, inputs.weights
    if x_TD.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"The TPU form takes bfloat16 and float32, not {x_TD.dtype}.")
    if expert_TA.size == 0:
        raise Unsupported("The TPU form takes at least one token and expert.")
    for w in weights:
        base = w.base if isinstance(w, lora.LoraWeight) else w
        quantised = isinstance(base, quantize.Fp8Weight | quantize.Fp4Weight)
        if not quantised and base.dtype != x_TD.dtype:
            raise Unsupported(f"The TPU form takes arrays in x's dtype, not {base.dtype}.")
        unit = 256 if isinstance(base, quantize.Fp4Weight) else 128
        if base.shape[2] % unit or base.shape[3] % unit:
            raise Unsupported(
                f"The TPU form takes D and F in multiples of {unit}, not {base.shape[2:]}."
            )
