"""The exchange of tokens: for any routing, the sums and gradients of a single device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import LayerWeight
from v4jax.model import exchange, moe, sharding
from v4jax.model.exchange import Tokens

D, F, A, LAYERS = 16, 8, 3, 2
MESHES: dict[str, dict[str, int]] = {
    "expert 8": {"expert": 8},
    "data 2, expert 4": {"data": 2, "expert": 4},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "tensor 8": {"tensor": 8},
}
# Expert ids by token and choice; -1 is padding.
ROUTINGS = {
    "random": lambda random, tokens, experts: random.integers(-1, experts, (tokens, A)),
    "one expert": lambda random, tokens, experts: np.full((tokens, A), experts - 1),
    "one device": lambda random, tokens, experts: random.integers(
        0, max(experts // 8, 1), (tokens, A)
    ),
    "none": lambda random, tokens, experts: np.full((tokens, A), -1),
}


run = functools.partial(moe.run_experts, limit=7.0, weight_first=True)


def objective(floats: Any, expert_TA: Any, layer: Any) -> Any:
    """A sum in which every output counts differently."""
    x_TD, weight_TA, slices, stacks = floats
    wrap = lambda stack, own: LayerWeight(jax.lax.stop_gradient(stack), own[None])
    weights = jax.tree.map(wrap, stacks, slices)
    total_TD = exchange.over_experts(run, Tokens(x_TD, expert_TA, weight_TA), weights, layer)
    return jnp.sum(total_TD * jnp.cos(jnp.arange(total_TD.size).reshape(total_TD.shape)))


@functools.cache
def inputs(tokens: int, experts: int) -> Any:
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape, np.float32)
    stacks = (draw(LAYERS, experts, F, D), draw(LAYERS, experts, F, D), draw(LAYERS, experts, D, F))
    return draw(tokens, D), draw(tokens, A), tuple(stack[1] for stack in stacks), stacks


@functools.partial(jax.jit, static_argnames=("mesh",))
def _gradients(floats: Any, expert_TA: Any, layer: Any, mesh: Any = None) -> Any:
    return jax.value_and_grad(objective)(floats, expert_TA, layer)


def gradients(floats: Any, expert_TA: Any, mesh: Any) -> Any:
    with sharding.on(mesh):
        return jax.device_get(_gradients(floats, expert_TA, jnp.int32(1), mesh=mesh))


@pytest.mark.parametrize(("tokens", "experts"), [(136, 8), (120, 96), (40, 128)])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_any_routing_gives_the_sums_and_gradients_of_one_device(
    sizes: dict[str, int], tokens: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_FEW", 0)
    mesh, floats = sharding.make_mesh(**sizes), inputs(tokens, experts)
    for name, choose in ROUTINGS.items():
        expert_TA = choose(np.random.default_rng(1), tokens, experts).astype(np.int32)
        expected, expected_grads = gradients(floats, expert_TA, None)
        actual, grads = gradients(floats, expert_TA, mesh)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4, err_msg=name)
        for ours, theirs in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
            bound = 1e-5 * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=bound, err_msg=name)
