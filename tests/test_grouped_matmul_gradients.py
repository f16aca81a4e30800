"""Gradients of the routed experts from XLA against autodiff of the reference."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, quantize
from pallas_kernels.grouped_matmul import LayerWeight, LoraWeight, lora
from pallas_kernels.grouped_matmul.shapes import Shape
from tests.test_grouped_matmul import LIMIT, SMALL, assert_close, expected, inputs, quantized, run

WEIGHTS = ("w1_LEFD", "w3_LEFD", "w2_LEDF")


def arguments(form: str, tokens: int, shape: Shape = SMALL) -> dict[str, Any]:
    args = inputs(shape, tokens)
    for name in WEIGHTS:
        w = args[name]
        base = quantized(w, form[:3]) if form.startswith("fp") else w
        args[name] = with_low_rank(base) if form.endswith("low rank") else base
    return args


def with_low_rank(base: Any, rank: int = 4) -> LoraWeight:
    L, E, N, K = base.shape
    rng = np.random.default_rng(N + K)
    normal = lambda *dims: jnp.asarray(rng.standard_normal(dims) / dims[-1] ** 0.5, jnp.float32)
    return LoraWeight(base, normal(L, E, rank, K), normal(L, E, N, rank), 0.5)


@functools.partial(jax.jit, static_argnames=("impl", "weight_first"))
def gradients(args: dict[str, Any], impl: Any, weight_first: bool) -> Any:
    """Gradients of tokens, routing weights and all trained arrays, for a random cotangent."""
    shape = args["x_TD"].shape
    cotangent_TD = jax.random.normal(jax.random.key(1), shape, jnp.float32)

    def loss(values: dict[str, Any]) -> jax.Array:
        weights: dict[str, Any] = {
            name: lora.replaced(args[name], values[name]) for name in WEIGHTS
        }
        out_TD = grouped_matmul.expert_mlp(
            **args | values | weights, limit=LIMIT, weight_first=weight_first, impl=impl
        )
        return jnp.sum(out_TD * cotangent_TD)

    values = {name: args[name] for name in ("x_TD", "weight_TA")}
    return jax.grad(loss)(values | {name: lora.learned(args[name]) for name in WEIGHTS})


def assert_same_gradients(args: dict[str, Any], weight_first: bool = True) -> None:
    got, want = (gradients(args, impl, weight_first) for impl in ("xla", "reference"))
    # Three float32 matmuls and their transposes; the minimum is for gradients that are all zero.
    compare = lambda x, y: np.testing.assert_allclose(
        x, y, rtol=0, atol=2e-5 * max(1e-3, np.abs(np.asarray(y)).max())
    )
    jax.tree.map(compare, got, want)


@pytest.mark.parametrize(
    ("form", "tokens", "weight_first"),
    [
        ("float32", 3, True),
        ("float32", 40, False),
        ("fp8", 40, True),
        ("fp4", 3, False),
        ("low rank", 300, True),
        ("fp4 and low rank", 40, False),
    ],
)
def test_gradients_equal_the_references(form: str, tokens: int, weight_first: bool) -> None:
    args = arguments(form, tokens)
    args["expert_TA"] = args["expert_TA"].at[0, 0].set(-1).at[1, 1].set(SMALL.experts)
    assert_same_gradients(args, weight_first)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_routing_has_the_references_gradients(data: st.DataObject) -> None:
    """Ids out of range, repeated ids of a token, experts with no tokens or all of them."""
    ids = st.integers(-1, SMALL.experts) | st.just(data.draw(st.integers(-1, SMALL.experts)))
    row = st.lists(ids, min_size=SMALL.choices, max_size=SMALL.choices)
    expert_TA = data.draw(st.lists(row, min_size=12, max_size=12))
    args = arguments("low rank", 12) | {"expert_TA": jnp.asarray(expert_TA, jnp.int32)}
    assert_same_gradients(args)


@pytest.mark.parametrize(("tokens", "weight_first"), [(3, True), (40, False)])
def test_weights_of_ids_out_of_range_have_no_effect(tokens: int, weight_first: bool) -> None:
    args = arguments("float32", tokens)
    invalid_TA = (jnp.arange(2 * tokens) % 3 == 0).reshape(tokens, 2)
    args["expert_TA"] = jnp.where(invalid_TA, SMALL.experts, args["expert_TA"])
    nan = args | {"weight_TA": jnp.where(invalid_TA, jnp.nan, args["weight_TA"])}
    got, want = (gradients(a, "xla", weight_first) for a in (nan, args))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    out, clean = (run(a, "xla", weight_first=weight_first) for a in (nan, args))
    np.testing.assert_array_equal(out, clean)


def test_bfloat16_inputs_have_bfloat16_gradients() -> None:
    args = arguments("float32", 40)
    names = ("x_TD", *WEIGHTS)
    half = args | {name: args[name].astype(jnp.bfloat16) for name in names}
    wide = args | {name: half[name].astype(jnp.float32) for name in names}
    got, want = (gradients(a, "xla", True) for a in (half, wide))
    for name in names:
        x, y = (jax.tree.leaves(g[name])[0] for g in (got, want))
        assert x.dtype == jnp.bfloat16
        # Rounding to 2^-8, and some activations on the other side of a clamp.
        error = np.linalg.norm(np.asarray(x, np.float32) - np.asarray(y))
        assert error < 0.05 * np.linalg.norm(np.asarray(y))


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_a_low_rank_update_is_added_to_the_matrix(impl: Any) -> None:
    args = arguments("fp4 and low rank", 20)
    merged = dict(args)
    for name in WEIGHTS:
        w = args[name]
        delta = jnp.einsum("lenr,lerk->lenk", w.b, w.a)
        merged[name] = quantize.dense(w.base, jnp.float32) + w.scale * delta
    out_TD = grouped_matmul.expert_mlp(**args, limit=LIMIT, weight_first=True, impl=impl)
    assert_close(np.asarray(out_TD), expected(merged))


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_the_base_of_a_low_rank_update_gets_no_gradient(impl: Any) -> None:
    args = arguments("low rank", 3)
    rest = {name: x for name, x in args.items() if name != "w1_LEFD"}

    def loss(w: LoraWeight) -> jax.Array:
        out_TD = grouped_matmul.expert_mlp(
            **rest, w1_LEFD=w, limit=LIMIT, weight_first=True, impl=impl
        )
        return jnp.sum(out_TD)

    grad = jax.grad(loss)(args["w1_LEFD"])
    assert not np.any(grad.base)
    assert np.any(grad.a)
    assert np.any(grad.b)


@pytest.mark.full_compilation
def test_backward_needs_no_memory_for_frozen_matrices_or_all_experts() -> None:
    shape = Shape(experts=32, choices=2, hidden=256, expert_hidden=128)
    args = inputs(shape, 200, layers=1)

    def loss(x_TD: jax.Array) -> jax.Array:
        arrays = args | {"x_TD": x_TD}
        out_TD = grouped_matmul.expert_mlp(**arrays, limit=LIMIT, weight_first=True, impl="xla")
        return jnp.sum(jnp.square(out_TD))

    memory = jax.jit(jax.grad(loss)).lower(args["x_TD"]).compile().memory_analysis()
    assert memory is not None
    rows = 4 * (200 * shape.choices + 256) * shape.hidden
    matrices = 4 * shape.experts * shape.hidden * shape.expert_hidden
    assert memory.temp_size_in_bytes < 6 * rows < matrices


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("form", ["array", "low rank", "fp4 low rank"])
def test_weights_of_one_layer_get_the_gradient_of_the_stack(form: str, impl: Any) -> None:
    args = arguments(form, 40)
    layer = args["layer"]
    layer_weights = {name: jax.tree.map(lambda x: x[layer][None], args[name]) for name in WEIGHTS}
    run = functools.partial(grouped_matmul.expert_mlp, limit=LIMIT, weight_first=False, impl=impl)

    def loss(learned: Any, weights: Any, wrap: Any) -> jax.Array:
        replaced = {name: lora.replaced(weights[name], learned[name]) for name in WEIGHTS}
        return jnp.sum(
            jnp.sin(run(**args | {name: wrap(name, replaced[name]) for name in WEIGHTS}))
        )

    plain = jax.jit(jax.value_and_grad(functools.partial(loss, wrap=lambda _, w: w)))
    within = functools.partial(loss, wrap=lambda name, w: LayerWeight(args[name], w))
    parts = lambda weights: {name: lora.learned(weights[name]) for name in WEIGHTS}
    value, want = plain(parts(args), args)
    actual_value, got = jax.jit(jax.value_and_grad(within))(parts(layer_weights), layer_weights)
    np.testing.assert_array_equal(actual_value, value)
    layer_grads = jax.tree.map(lambda x: x[layer][None], want)
    jax.tree.map(np.testing.assert_array_equal, got, layer_grads)
    assert jax.tree.leaves(got)


def test_weights_of_one_layer_with_another_shape_are_rejected() -> None:
    args = arguments("array", 5)
    args["w1_LEFD"] = LayerWeight(args["w1_LEFD"], args["w1_LEFD"])
    run: Any = functools.partial(grouped_matmul.expert_mlp, limit=LIMIT, weight_first=True)
    with pytest.raises(ValueError, match=r"own w1_LEFD has shape .*, not \(L=1"):
        run(**args)
    first = jax.tree.map(lambda x: x[:1], args["w3_LEFD"])
    mixed: dict[str, Any] = arguments("array", 5) | {"w3_LEFD": LayerWeight(args["w3_LEFD"], first)}
    with pytest.raises(ValueError, match="all three or none"):
        run(**mixed)
