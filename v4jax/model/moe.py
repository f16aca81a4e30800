"""Mixture of experts: routing by score or by token id, routed experts, shared expert.

Axis letters: L layers of a stack, B batch, T tokens (in experts: of all rows), D hidden,
F expert hidden, E experts, A experts per token, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import grouped_matmul
from pallas_kernels.residuals import saveable
from v4jax.model import exchange, layers, sharding
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.context import Context
from v4jax.model.params import Declare
from v4jax.model.sharding import ROWS
from v4jax.model.storage import InStack


class Router(nnx.Module):
    """Scores for all experts; `bias_E` (learned choice) or `expert_ids_VA` (choice by token id).

    In a running block, the table is replaced by its rows for the block's tokens, [B, T, A].
    """

    def __init__(self, cfg: ModelConfig, kind: LayerKind, weight: Declare) -> None:
        experts = cfg.n_routed_experts
        self.gate_ED = weight((experts, cfg.hidden_size), (None, None))
        if kind.ffn == "routed":
            self.bias_E = weight((experts,), (None,), "f32", constant=0.0)
        else:
            shape = (cfg.vocab_size, cfg.num_experts_per_tok)
            self.expert_ids_VA = weight.expert_ids(shape, experts)


class SharedExpert(nnx.Module):
    """The expert that processes every token."""

    def __init__(self, cfg: ModelConfig, weight: Declare) -> None:
        D, F = cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_FD = weight((F, D), ("ffn", None), "fp8")
        self.up_FD = weight((F, D), ("ffn", None), "fp8")
        self.down_DF = weight((D, F), (None, "ffn"), "fp8")


class Experts(nnx.Module):
    """The routed experts. Never sliced by layer: an op reads only the experts that it needs."""

    def __init__(self, cfg: ModelConfig, weight: Declare) -> None:
        E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_EFD = weight((E, F, D), ("experts", None, None), "expert")
        self.up_EFD = weight((E, F, D), ("experts", None, None), "expert")
        self.down_EDF = weight((E, D, F), ("experts", None, None), "expert")


class Routing(NamedTuple):
    """A router's output: scores of all experts, before any bias, and the experts chosen, or -1.

    Training watches it.
    """

    score_BTE: Float32[Array, "B T E"]
    expert_BTA: Int[Array, "B T A"]


def route(
    p: Router, x_BTD: Float[Array, "B T D"], context: Context
) -> tuple[Routing, Float32[Array, "B T A"]]:
    """Each token's experts and their weights, which sum to `routed_scaling_factor`."""
    cfg, numerics = context.cfg, context.numerics
    project = layers.linear_float32 if numerics.float32_islands else layers.linear
    logits_BTE = project(x_BTD, p.gate_ED).astype(jnp.float32)
    score_BTE = jnp.sqrt(jax.nn.softplus(logits_BTE))
    if hasattr(p, "bias_E"):
        biased_BTE = score_BTE + layers.value(p.bias_E)[None, None]
        choose = lambda x_BTE: jax.lax.top_k(x_BTE, cfg.num_experts_per_tok)[1]
        expert_BTA = saveable(
            sharding.per_device(choose, biased_BTE, axes=(ROWS,), out=ROWS, kernels=False)
        )
    else:
        expert_BTA = layers.value(p.expert_ids_VA)
    weight_BTA = jnp.take_along_axis(score_BTE, expert_BTA, axis=-1)
    # transformers' floor, which is below the float32 resolution of any nonzero sum.
    total_BT1 = jnp.maximum(jnp.sum(weight_BTA, axis=-1, keepdims=True), 1e-20)
    # Padding chooses no expert.
    expert_BTA = jnp.where(context.real_BT[..., None], expert_BTA, -1)
    return Routing(score_BTE, expert_BTA), weight_BTA / total_BT1 * cfg.routed_scaling_factor


def shared_mlp(
    p: SharedExpert, x_BTD: Float[Array, "B T D"], limit: float
) -> Float[Array, "B T D"]:
    """Clamped SwiGLU."""
    gate_BTF = jnp.minimum(
        layers.linear(x_BTD, p.gate_FD, ("ffn", None)).astype(jnp.float32), limit
    )
    up_BTF = jnp.clip(
        layers.linear(x_BTD, p.up_FD, ("ffn", None)).astype(jnp.float32), -limit, limit
    )
    hidden_BTF = (jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype)
    return layers.linear(hidden_BTF, p.down_DF, (None, "ffn"))


def mixture(
    router: Router,
    shared: SharedExpert,
    experts: InStack,
    x_BTD: Float[Array, "B T D"],
    context: Context,
) -> tuple[Float[Array, "B T D"], Routing]:
    """The feed-forward sublayer: the weighted sum of the chosen experts, plus the shared expert.

    `experts` are the `Experts` of a stack, and the layer's index in it.
    """
    cfg = context.cfg
    routing, weight_BTA = route(router, x_BTD, context)
    rows = lambda x: x.reshape(-1, x.shape[-1])

    run = functools.partial(
        run_experts, limit=cfg.swiglu_limit, weight_first=context.numerics.weight_first
    )
    stack = experts.stack
    weights = tuple(layers.value(w) for w in (stack.gate_EFD, stack.up_EFD, stack.down_EDF))
    tokens = exchange.Tokens(rows(x_BTD), rows(routing.expert_BTA), rows(weight_BTA))
    routed_TD = exchange.over_experts(run, tokens, weights, experts.layer)
    shared_BTD = shared_mlp(shared, x_BTD, cfg.swiglu_limit)
    routed_BTD = saveable(routed_TD, experts=True).reshape(x_BTD.shape)
    total_BTD = routed_BTD + shared_BTD.astype(jnp.float32)
    return total_BTD.astype(x_BTD.dtype), routing


def run_experts(
    x_TD: Float[Array, "T D"],
    expert_TA: Int[Array, "T A"],
    weight_TA: Float[Array, "T A"],
    weights: tuple[Any, Any, Any],
    layer: Int[Array, ""],
    **static: Any,
) -> Float[Array, "T D"]:
    """`grouped_matmul.expert_mlp` with gate, up and down matrices, for `exchange.over_experts`."""
    gate, up, down = weights
    return grouped_matmul.expert_mlp(
        x_TD=x_TD,
        expert_TA=expert_TA,
        weight_TA=weight_TA,
        w1_LEFD=gate,
        w3_LEFD=up,
        w2_LEDF=down,
        layer=layer,
        **static,
    )
