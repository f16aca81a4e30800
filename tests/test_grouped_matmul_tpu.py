"""TPU kernels of the routed experts: interpreted, and compiled ahead of time for real chips."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, quantize, targets
from pallas_kernels.grouped_matmul import LoraWeight, lora, plan
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape
from tests import kernels
from tests.test_grouped_matmul import (
    CLOSE_BFLOAT16,
    LIMIT,
    assert_close,
    expected,
    inputs,
    quantized,
)

WEIGHTS = ("w1_LEFD", "w3_LEFD", "w2_LEDF")
SMALL = Shape(experts=4, choices=2, hidden=256, expert_hidden=256)
# With SMALL's experts and choices, 5, 20, 100 and 520 tokens have tiles of 8, 16, 128 and 256 rows.


def with_weights(args: dict[str, Any], form: str) -> dict[str, Any]:
    change: Callable[[Any], Any] = {
        "float32": lambda w: w,
        "bfloat16": lambda w: w.astype(jnp.bfloat16),
        "fp8": lambda w: quantized(w, "fp8"),
        "fp4": lambda w: quantized(w, "fp4"),
        "low rank": low_rank,
    }[form]
    # With low-rank updates, w3 stays an array.
    names = ("w1_LEFD", "w2_LEDF") if form == "low rank" else WEIGHTS
    args = args | {name: change(args[name]) for name in names}
    return args | {"x_TD": args["x_TD"].astype(jnp.bfloat16)} if form == "bfloat16" else args


def low_rank(w: Any) -> LoraWeight:
    L, E, N, K = w.shape
    rng = np.random.default_rng(N + K)
    normal = lambda *dims: jnp.asarray(rng.standard_normal(dims) / dims[-1] ** 0.5, jnp.float32)
    return LoraWeight(w, normal(L, E, 8, K), normal(L, E, N, 8), 0.5)


def run(args: dict[str, Any], *, weight_first: bool = True) -> np.ndarray:
    expert_mlp = jax.jit(
        functools.partial(
            grouped_matmul.expert_mlp, limit=LIMIT, weight_first=weight_first, impl="tpu"
        )
    )
    with kernels.interpreted():
        return np.asarray(expert_mlp(**args))


@pytest.mark.parametrize(
    ("form", "tokens"),
    [("fp4", 20), ("fp8", 100), ("fp4", 100), ("float32", 520)],
)
def test_interpreted_kernels_give_the_weighted_sum_of_the_chosen_experts(
    form: str, tokens: int
) -> None:
    args = with_weights(inputs(SMALL, tokens), form)
    # Ids out of range on both sides.
    args["expert_TA"] = args["expert_TA"].at[0, 0].set(-1).at[1, 1].set(SMALL.experts)
    # Other combinations of weight_first and format are tested elsewhere.
    assert_close(run(args, weight_first=tokens % 8 != 0), expected(args))


def test_interpreted_bfloat16() -> None:
    args = with_weights(inputs(SMALL, 20), "bfloat16")
    assert_close(run(args, weight_first=False), expected(args), CLOSE_BFLOAT16)


def test_interpreted_low_rank_updates_equal_merged_matrices() -> None:
    args = with_weights(inputs(SMALL, 5), "low rank")
    merged = dict(args)
    for name in ("w1_LEFD", "w2_LEDF"):
        w = args[name]
        delta = jnp.einsum("lenr,lerk->lenk", w.b, w.a)
        merged[name] = w.base + w.scale * delta
    assert_close(run(args), expected(merged))


@functools.cache
def routed() -> Callable[..., jax.Array]:
    """The experts as a function of the routing, compiled once for all routings."""
    args = with_weights(inputs(SMALL, 4), "fp8")
    expert_mlp = functools.partial(
        grouped_matmul.expert_mlp, **args | {"expert_TA": None}, limit=LIMIT, weight_first=True
    )
    return jax.jit(
        lambda expert_TA, impl: expert_mlp(expert_TA=expert_TA, impl=impl), static_argnums=1
    )


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=4, max_size=4))
@example([[-1, 4]] * 4)
@example([[2, 2]] * 4)
def test_any_routing_agrees_with_the_reference(expert_TA: list[list[int]]) -> None:
    """Ids out of range, one expert for all tokens, repeated ids."""
    ids = jnp.asarray(expert_TA, jnp.int32)
    with kernels.interpreted():
        got = np.asarray(routed()(ids, "tpu"))
    np.testing.assert_allclose(got, routed()(ids, "reference"), rtol=0, atol=4e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize("tokens", [3, 64])
def test_steps_cover_each_valid_row_exactly_once(tokens: int, data: st.DataObject) -> None:
    ids = st.integers(-2, 5) | st.just(data.draw(st.integers(-1, 4)))
    row = st.lists(ids, min_size=2, max_size=2)
    expert_TA = np.asarray(data.draw(st.lists(row, min_size=tokens, max_size=tokens)), np.int32)
    schedule = jax.jit(plan.make, static_argnums=1)(jnp.asarray(expert_TA), 4)
    visits = []
    for s in range(int(schedule.steps)):
        first = int(schedule.tile_S[s]) * schedule.rows
        for p in range(first + int(schedule.low_S[s]), first + int(schedule.high_S[s])):
            visits.append((int(schedule.order_P[p]), int(schedule.expert_S[s])))
    want = [(i, e) for i, e in enumerate(expert_TA.reshape(-1).tolist()) if 0 <= e < 4]
    assert sorted(visits) == want
    # No tile is visited for an expert without rows in it.
    valid = len(want)
    assert int(schedule.steps) <= max(1, -(-valid // schedule.rows) + len({e for _, e in want}))


def test_two_cores_do_not_race() -> None:
    args = with_weights(inputs(SMALL, 12, layers=1), "float32")
    expert_mlp = functools.partial(
        grouped_matmul.expert_mlp, limit=LIMIT, weight_first=True, impl="tpu"
    )
    with kernels.interpreted(detect_races=True, num_cores_or_threads=2):
        jax.block_until_ready(jax.jit(lambda: expert_mlp(**args))())


@pytest.mark.parametrize(("form", "tokens"), [("fp8", 5), ("fp4", 5), ("low rank", 100)])
def test_interpreted_gradients_equal_the_references(form: str, tokens: int) -> None:
    args = with_weights(inputs(SMALL, tokens, layers=1), form)
    args["expert_TA"] = args["expert_TA"].at[0].set(-1)
    cotangent_TD = jnp.asarray(np.random.default_rng(1).standard_normal(args["x_TD"].shape))

    def loss(values: dict[str, Any], impl: Any) -> jax.Array:
        weights: dict[str, Any] = {
            name: lora.replaced(args[name], values[name]) for name in WEIGHTS
        }
        out_TD = grouped_matmul.expert_mlp(
            **args | values | weights, limit=LIMIT, weight_first=True, impl=impl
        )
        return jnp.sum(out_TD * cotangent_TD.astype(jnp.float32))

    values = {name: args[name] for name in ("x_TD", "weight_TA")}
    values |= {name: lora.learned(args[name]) for name in WEIGHTS}
    want = jax.jit(jax.grad(functools.partial(loss, impl="reference")))(values)
    with kernels.interpreted():
        got = jax.jit(jax.grad(functools.partial(loss, impl="tpu")))(values)
        jax.tree.map(lambda x, y: assert_close(np.asarray(x), np.asarray(y)), got, want)


def test_interpreted_gradients_of_bfloat16_differ_by_its_rounding() -> None:
    """Some ids are out of range, and their weights NaN."""
    args = with_weights(inputs(SMALL, 13, layers=1), "bfloat16")
    invalid_TA = (jnp.arange(26) % 5 == 0).reshape(13, 2)
    args["expert_TA"] = jnp.where(invalid_TA, -1, args["expert_TA"])
    names = ("x_TD", "weight_TA", *WEIGHTS)

    def gradients(args: dict[str, Any], impl: Any) -> Any:
        def loss(values: dict[str, Any]) -> jax.Array:
            run = grouped_matmul.expert_mlp
            out_TD = run(**args | values, limit=LIMIT, weight_first=False, impl=impl)
            return jnp.sum(jnp.sin(out_TD))

        return jax.jit(jax.grad(loss))({name: args[name] for name in names})

    wide = {name: args[name].astype(jnp.float32) for name in names}
    want = gradients(args | wide, "reference")
    nan = args | {"weight_TA": jnp.where(invalid_TA, jnp.nan, args["weight_TA"])}
    with kernels.interpreted():
        got = gradients(nan, "tpu")
        for name in names:
            ours, theirs = (np.asarray(x[name], np.float64) for x in (got, want))
            # A few roundings by 2^-9.
            assert np.linalg.norm(ours - theirs) <= 2.0**-6 * np.linalg.norm(theirs), name


def structs(model: str, form: str, tokens: int) -> tuple[Any, ...]:
    shape, S = SHAPES[model], jax.ShapeDtypeStruct
    E, A, D, F = shape.experts, shape.choices, shape.hidden, shape.expert_hidden

    def weight(n: int, k: int) -> Any:
        e8m0 = jnp.float8_e8m0fnu
        codes = lambda k, dtype: S((2, E, k, n), dtype)
        if form == "bfloat16":
            return S((2, E, n, k), jnp.bfloat16)
        if form == "fp8":
            scale = S((2, E, k // 128, n // 128), e8m0)
            return quantize.Fp8Weight(codes(k, jnp.float8_e4m3fn), scale)
        w = quantize.Fp4Weight(codes(k // 2, jnp.uint8), codes(k // 32, e8m0))
        if form == "fp4":
            return w
        return LoraWeight(
            w, S((2, E, 16, k), jnp.bfloat16), S((2, E, n, 16), jnp.bfloat16), scale=0.5
        )

    tokens_TD = S((tokens, D), jnp.bfloat16)
    choice = (S((tokens, A), jnp.int32), S((tokens, A), jnp.float32))
    return (tokens_TD, *choice, weight(F, D), weight(F, D), weight(D, F), S((), jnp.int32))


def activation_bytes(model: str, tokens: int) -> int:
    """Sorted rows of input, hidden and output; rows of a token are summed in float32."""
    shape = SHAPES[model]
    tile = plan.tile_rows(tokens * shape.choices, shape.experts)
    rows = -(-tokens * shape.choices // tile) * tile
    return 2 * rows * (2 * shape.hidden + shape.expert_hidden) + 8 * tokens * shape.hidden


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("chip", "model", "form", "tokens"),
    [
        ("v5p", "flash", "fp4", 8),
        ("v6e", "pro", "fp4", 8),
        ("tpu7x", "flash", "fp4", 8),
        ("v5p", "pro", "bfloat16", 8),
        ("tpu7x", "pro", "fp8", 64),
        ("v6e", "flash", "fp8", 4096),
    ],
)
def test_compiles_at_full_size(chip: targets.Target, model: str, form: str, tokens: int) -> None:
    args = structs(model, form, tokens)
    expert_mlp = kernels.in_order(grouped_matmul.expert_mlp, Inputs)
    run = functools.partial(expert_mlp, limit=10.0, weight_first=True, impl="auto")
    program = targets.compiled(chip, run, *args)
    kernel_calls = str(program.as_text()).count('custom_call_target="tpu_custom_call"')
    assert kernel_calls == 2
    # No copies of weights: neither codes, nor expanded scales, nor another layer.
    assert targets.temporaries(program) <= activation_bytes(model, tokens) + 2**20


@pytest.mark.full_compilation
@pytest.mark.parametrize(("chip", "form"), [("v5p", "fp8"), ("tpu7x", "fp4 and low rank")])
def test_backward_compiles_at_full_size(chip: targets.Target, form: str) -> None:
    x_TD, expert_TA, weight_TA, *weights, layer = structs("flash", form, 8)

    def run(x_TD: Any, expert_TA: Any, weight_TA: Any, weights: Any, layer: Any) -> Any:
        gate, up, down = weights

        def loss(x_TD: Any, weight_TA: Any) -> jax.Array:
            arrays = Inputs(x_TD, expert_TA, weight_TA, gate, up, down, layer)._asdict()
            out_TD = grouped_matmul.expert_mlp(**arrays, limit=10.0, weight_first=True)
            return jnp.sum(jnp.square(out_TD))

        return jax.grad(loss, argnums=(0, 1))(x_TD, weight_TA)

    program = targets.compiled(chip, run, x_TD, expert_TA, weight_TA, tuple(weights), layer)
    assert "experts_hidden_backward" in str(program.as_text())
    assert targets.temporaries(program) <= 2**23


def test_unsupported_sizes_are_rejected_or_left_to_xla() -> None:
    args = inputs(Shape(experts=4, choices=2, hidden=64, expert_hidden=32), 3)
    expert_mlp = functools.partial(
        grouped_matmul.expert_mlp, **args, limit=LIMIT, weight_first=True
    )
    with pytest.raises(NotImplementedError, match="D and F in multiples of 128"):
        expert_mlp(impl="tpu")
    assert_close(np.asarray(expert_mlp(impl="auto")), expected(args))


@pytest.mark.parametrize(
    ("form", "D", "F", "match"),
    [("float32", 16384, 16384, "no room"), ("fp8", 256, 640, "do not take 640 FP8 channels")],
)
def test_sizes_that_would_not_compile_are_rejected(form: str, D: int, F: int, match: str) -> None:
    E, T, S = 8, 4096, jax.ShapeDtypeStruct
    x_TD = S((T, D), jnp.float32)

    def weight(n: int, k: int) -> Any:
        codes, scale = (
            S((1, E, k, n), jnp.float8_e4m3fn),
            S((1, E, k // 128, n // 128), jnp.float32),
        )
        return quantize.Fp8Weight(codes, scale) if form == "fp8" else S((1, E, n, k), jnp.float32)

    def loss(x_TD: Any, *others: Any) -> jax.Array:
        expert_mlp = kernels.in_order(grouped_matmul.expert_mlp, Inputs)
        return jnp.sum(expert_mlp(x_TD, *others, limit=LIMIT, weight_first=True, impl="tpu"))

    choice = S((T, 2), jnp.int32), S((T, 2), jnp.float32)
    weights = weight(F, D), weight(F, D), weight(D, F)
    with pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(jax.grad(loss), x_TD, *choice, *weights, S((), jnp.int32))
