"""Load balancing of experts: the rule for routers' biases, and the loss within a document.

Source: the report, sections 2.1 and 4.2.2; the loss is DeepSeek-V3's (its report, eqs. 17-20).

Axis letters: L layers, B batch, T tokens, E experts, A experts per token, n blocks of 128 tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from v4jax.model.block import LayerTrace
from v4jax.model.cache import BLOCK
from v4jax.model.config import LayerKind
from v4jax.model.context import Context
from v4jax.model.moe import Routing

BIAS = "router.bias_E"


def watch(kind: LayerKind, seen: LayerTrace, context: Context) -> dict[str, Array]:
    """Values recorded for a layer: `load_E`, and sums of its losses over tokens.

    The losses are `balance_loss`, for routers that learn, and `indexer_loss`, for layers with a
    watched indexer.
    """
    values = {"load_E": load(seen.routing)}
    if kind.ffn == "routed":
        values["balance_loss"] = loss(seen.routing, context)
    if seen.divergence_BT is not None:
        real_BT = context.real_BT
        values["indexer_loss"] = jnp.sum(jnp.where(real_BT, seen.divergence_BT, 0.0))
    return values


def load(routing: Routing) -> Float32[Array, " E"]:
    """How many tokens chose each expert."""
    experts = routing.score_BTE.shape[-1]
    return jnp.sum(_chosen(routing.expert_BTA, experts), axis=(0, 1))


def loss(routing: Routing, context: Context) -> Float32[Array, ""]:
    """The sum over documents of tokens times loss: 1 per token if all experts are equally busy.

    A document's loss is the number of experts times the sum over experts of the fraction of its
    choices that fall on the expert, times the expert's mean share of the tokens' scores.
    """
    experts = routing.score_BTE.shape[-1]
    real_BT1 = context.real_BT[..., None]
    part_BTE = routing.score_BTE / jnp.sum(routing.score_BTE, axis=-1, keepdims=True)
    per_token = context.cfg.num_experts_per_tok
    share_BTE = _chosen(routing.expert_BTA, experts) * (experts / per_token)
    sums = [_of_document(jnp.where(real_BT1, x, 0.0), context) for x in (part_BTE, share_BTE)]
    tokens_Bn = _blocks(context.real_BT.astype(jnp.float32)[..., None])[..., 0]
    all_Bn = _of_document(context.real_BT.astype(jnp.float32)[..., None], context)[..., 0]
    # Each block of a document contributes its tokens times the document's loss.
    each_Bn = jnp.sum(sums[0] * sums[1], axis=-1) / jnp.square(jnp.maximum(all_Bn, 1.0))
    return jnp.sum(tokens_Bn * each_Bn)


def _chosen(expert_BTA: Int[Array, "B T A"], experts: int) -> Float32[Array, "B T E"]:
    return jnp.sum(jax.nn.one_hot(expert_BTA, experts, dtype=jnp.float32), axis=2)


def _blocks(x_BTE: Float32[Array, "B T E"]) -> Float32[Array, "B n E"]:
    """Sums over blocks of tokens; a document starts at the start of a block."""
    batch, length, channels = x_BTE.shape
    return jnp.sum(x_BTE.reshape(batch, length // BLOCK, BLOCK, channels), axis=2)


def _of_document(x_BTE: Float32[Array, "B T E"], context: Context) -> Float32[Array, "B n E"]:
    """For each block, the sum over the entire document that contains it."""
    x_BnE = _blocks(x_BTE)
    if context.first_BT is None:
        return jnp.broadcast_to(jnp.sum(x_BnE, axis=1, keepdims=True), x_BnE.shape)
    first_Bn = context.first_BT[:, ::BLOCK]
    same_Bnn = (first_Bn[:, :, None] == first_Bn[:, None]).astype(jnp.float32)
    return jnp.einsum("bnm,bme->bne", same_Bnn, x_BnE, precision=jax.lax.Precision.HIGHEST)


def biases(watched: list[list[dict[str, Array]]], drafters: list[list[dict[str, Array]]]) -> Any:
    """The loads of routers with a bias, by the bias's name, [L, E] each."""
    loads = {}
    prefixes = [(f"stacks.{i}", part) for i, part in enumerate(watched)]
    prefixes += [(f"mtp.{i}.stack", part) for i, part in enumerate(drafters)]
    for prefix, positions in prefixes:
        for position, values in enumerate(positions):
            if "balance_loss" in values:
                loads[f"{prefix}.blocks.{position}.{BIAS}"] = values["load_E"]
    return loads


def updated_biases(
    bias_LE: Float32[Array, "L E"], load_LE: Float32[Array, "L E"], speed: float
) -> Float32[Array, "L E"]:
    """Biases after a step: lower for experts above the mean load, higher for those below it."""
    mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
    return bias_LE + speed * jnp.sign(mean_L1 - load_LE)


def violation(load_LE: Float32[Array, "L E"]) -> Float32[Array, ""]:
    """The relative excess over the mean load of the busiest expert in any layer."""
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=-1), 1.0)
    return jnp.max(jnp.max(load_LE, axis=-1) / mean_L) - 1.0
