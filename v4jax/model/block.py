"""One layer, and a segment of layers as a scan.

Axis letters: L layers of a stack, B batch, T tokens, M streams side by side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import quantize, residuals
from pallas_kernels.grouped_matmul import LayerWeight, LoraWeight
from pallas_kernels.residuals import Remat
from v4jax.model import attention, cache, hyper, moe
from v4jax.model.cache import LayerCache
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.context import Context
from v4jax.model.params import Declare
from v4jax.model.segments import Segment
from v4jax.model.storage import InStack


class Block(nnx.Module):
    """A layer's weights, without its routed experts."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, weight: Declare) -> None:
        self.attention_hyper = hyper.HyperConnection(cfg, weight)
        self.attention_norm_D = weight((cfg.hidden_size,), (None,), constant=1.0)
        self.attention = attention.Attention(cfg, kind, weight)
        self.ffn_hyper = hyper.HyperConnection(cfg, weight)
        self.ffn_norm_D = weight((cfg.hidden_size,), (None,), constant=1.0)
        self.router = moe.Router(cfg, kind, weight)
        self.shared = moe.SharedExpert(cfg, weight)


class Stack(nnx.Module):
    """A segment's weights: a Block and an Experts for each position of its pattern, L times each.

    A scan slices the blocks' arrays layer by layer. Quantised weights and experts are not sliced:
    that would copy what a kernel can read in place, including experts that are not chosen.
    """

    def __init__(self, cfg: ModelConfig, part: Segment) -> None:
        weight = Declare(part.repeats, cfg.initializer_range)
        self.blocks = nnx.List([Block(cfg, kind, weight) for kind in part.pattern])
        self.experts = nnx.List([moe.Experts(cfg, weight) for _ in part.pattern])


class LayerTrace(NamedTuple):
    """Values of a layer that training may watch.

    `divergence_BT` is the indexer's divergence from attention, if the context asks for it.
    """

    routing: moe.Routing
    divergence_BT: Float32[Array, "B T"] | None


Watch = Callable[[LayerKind, LayerTrace, Context], Any]


def run_block(
    p: Block,
    experts: InStack,
    x_BTM: Float[Array, "B T M"],
    state: InStack,
    kind: LayerKind,
    context: Context,
) -> tuple[Float[Array, "B T M"], LayerCache, LayerTrace]:
    """Attention, then the experts, each inside its hyper-connection.

    Args:
      p: the layer's weights.
      experts: `Experts` of a stack, and the layer's index in it.
      x_BTM: the streams.
      state: `LayerCache` of a stack, and the layer's index in it.
      kind: kind of the layer.
      context: context of the pass.
    """
    attend = lambda x_BTD: attention.attend(p.attention, x_BTD, state, kind, context)
    x_BTM, (updated, divergence_BT) = hyper.around(
        p.attention_hyper, x_BTM, p.attention_norm_D, context, attend
    )
    mix = lambda x_BTD: moe.mixture(p.router, p.shared, experts, x_BTD, context)
    x_BTM, routing = hyper.around(p.ffn_hyper, x_BTM, p.ffn_norm_D, context, mix)
    return x_BTM, updated, LayerTrace(routing, divergence_BT)


def run_stack(
    p: Stack,
    x_BTM: Float[Array, "B T M"],
    states: tuple[LayerCache, ...],
    part: Segment,
    context: Context,
    watch: Watch | None = None,
) -> tuple[Float[Array, "B T M"], tuple[LayerCache, ...], list[Any]]:
    """Run all layers of a segment. Its caches are carried entire, so that updates are in place.

    Returns:
      The streams, the caches, and for each position of the pattern the results of `watch`, stacked
      [L, ...].
    """
    leaves, tree = jax.tree.flatten(p.blocks, is_leaf=_quantised)

    def one_repeat(carry, step):
        x_BTM, states = carry
        layer, arrays = step
        of_layer = [
            InStack(leaf, layer) if array is None else array
            for leaf, array in zip(leaves, arrays, strict=True)
        ]
        blocks = tree.unflatten(of_layer)
        updated, watched = [], []
        for position, kind in enumerate(part.pattern):
            experts, state = (InStack(x[position], layer) for x in (p.experts, states))
            x_BTM, state, trace = run_block(blocks[position], experts, x_BTM, state, kind, context)
            updated.append(state)
            watched.append(watch(kind, trace, context) if watch else None)
        return (x_BTM, tuple(updated)), watched

    arrays = [None if _stays_in_stack(leaf) else _sliced(leaf, context) for leaf in leaves]
    steps = (jnp.arange(part.repeats, dtype=jnp.int32), arrays)
    (x_BTM, states), watched = jax.lax.scan(one_repeat, (x_BTM, states), steps)
    return x_BTM, states, watched


def train_stack(
    p: Stack,
    x_BTM: Float[Array, "B T M"],
    part: Segment,
    context: Context,
    *,
    remat: Remat,
    unroll: bool = False,
    watch: Watch | None,
) -> tuple[Float[Array, "B T M"], list[Any]]:
    """Run all layers of a segment over entire rows: no layer's state outlives it.

    Here the scan slices all weights. Experts are still read in their stacks; their slices only
    receive their gradients. The streams between repeats of the pattern are saved for the backward
    pass, and what the policy `remat` says. With `unroll`, the program contains every repeat instead
    of a loop.

    Returns:
      The streams, and for each position of the pattern the results of `watch`, stacked [L, ...].
    """
    cfg, dtype = context.cfg, x_BTM.dtype
    batch, tokens = context.tokens_BT.shape
    frozen = jax.lax.stop_gradient(p.experts)

    def one_repeat(x_BTM, step):
        layer, blocks, slices = step
        watched = []
        for position, kind in enumerate(part.pattern):
            state = InStack(cache.fresh(cfg, kind, batch, tokens, dtype), jnp.int32(0))
            experts = InStack(_of_layer(frozen[position], slices[position]), layer)
            x_BTM, _, trace = run_block(blocks[position], experts, x_BTM, state, kind, context)
            watched.append(watch(kind, trace, context) if watch else None)
        return x_BTM, watched

    blocks = jax.tree.map(lambda leaf: _sliced(leaf, context), p.blocks)
    # Outside a loop, XLA would merge the recomputation with the forward pass.
    keeps_apart, policy = unroll and remat != "light", residuals.POLICIES[remat]
    body = jax.checkpoint(one_repeat, prevent_cse=keeps_apart, policy=policy)
    steps = (jnp.arange(part.repeats, dtype=jnp.int32), blocks, p.experts)
    return jax.lax.scan(body, x_BTM, steps, unroll=unroll)


def _of_layer(stacks: moe.Experts, slices: moe.Experts) -> moe.Experts:
    """Experts that are read in their stacks, and whose gradients go to one layer's slices."""
    wrap = lambda stack, part: LayerWeight(stack, jax.tree.map(lambda x: x[None], part))
    is_weight = lambda leaf: isinstance(leaf, LoraWeight) or _quantised(leaf)
    return jax.tree.map(wrap, stacks, slices, is_leaf=is_weight)


def _quantised(leaf: Any) -> bool:
    return isinstance(leaf, quantize.Fp8Weight | quantize.Fp4Weight)


def _stays_in_stack(leaf: Any) -> bool:
    """Whether a layer takes an `InStack` of a weight: quantised, or 16-bit matrices."""
    return _quantised(leaf) or (leaf.ndim == 3 and leaf.dtype.itemsize == 2)


def _sliced(leaf: Any, context: Context) -> Any:
    """The part of a stacked weight for a scan to slice; None for quantised weights."""
    if _quantised(leaf):
        return None
    if leaf.dtype == jnp.int32:
        # Look up tokens here: inside the scan, a TPU would pad a table's rows of six to 128 lanes.
        return _looked_up(leaf, context.tokens_BT)
    return leaf


def _looked_up(
    table_LVA: Int[Array, "L V A"], tokens_BT: Int[Array, "B T"]
) -> Int[Array, "L B T A"]:
    """The rows of tokens in each layer's table, as single elements: see `_sliced`."""
    L, _, A = table_LVA.shape
    planes_ALV = jnp.transpose(table_LVA, (2, 0, 1))
    layer_L111, column_A = jnp.arange(L)[:, None, None, None], jnp.arange(A)
    return planes_ALV[column_A, layer_L111, tokens_BT[None, ..., None]]
