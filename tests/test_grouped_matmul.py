"""The routed experts against each token's sum over its experts, in float64 NumPy."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, quantize
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape

FORMS = ("reference", "xla")
EXPERT_MLP = jax.jit(grouped_matmul.expert_mlp, static_argnames=("limit", "weight_first", "impl"))
LIMIT = 2.0  # low enough that many gates and ups are clamped
# Three float32 matmuls, relative to the largest output: 2^-24 for each of some hundred terms.
CLOSE = 1e-5
# bfloat16 rounds gate, up, hidden and output to 2^-8 each; errors of channels partly cancel.
CLOSE_BFLOAT16 = 2e-2
SMALL = Shape(experts=4, choices=2, hidden=64, expert_hidden=32)
# With SMALL's 4 experts and 2 choices: row by row, tiles of 16, tiles of 32 to 256.
TOKENS = (1, 30, 700)


def inputs(shape: Shape, tokens: int, layers: int = 2, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    E, A, D, F = shape.experts, shape.choices, shape.hidden, shape.expert_hidden
    normal = lambda *dims: jnp.asarray(rng.standard_normal(dims) / np.sqrt(dims[-1]), jnp.float32)
    chosen = [rng.permutation(E)[:A] for _ in range(tokens)]
    return {
        "x_TD": normal(tokens, D) * D**0.5,
        "expert_TA": jnp.asarray(np.stack(chosen), jnp.int32),
        "weight_TA": jnp.asarray(rng.random((tokens, A)), jnp.float32),
        "w1_LEFD": normal(layers, E, F, D) * 2,
        "w3_LEFD": normal(layers, E, F, D) * 2,
        "w2_LEDF": normal(layers, E, D, F),
        "layer": jnp.int32(layers - 1),
    }


def quantized(w: jax.Array, form: str) -> Any:
    """Each matrix of a stack encoded, in the kernels' layout."""
    stack = w.shape[:-2]
    encode, repack, leaf = {
        "fp8": (quantize.encode_fp8_blocks, quantize.fp8_from_checkpoint, quantize.Fp8Weight),
        "fp4": (quantize.encode_fp4_blocks, quantize.fp4_from_checkpoint, quantize.Fp4Weight),
    }[form]
    matrices = np.asarray(w, np.float32).reshape(-1, *w.shape[-2:])
    parts = zip(*(repack(*encode(matrix)) for matrix in matrices), strict=True)
    return leaf(*(jnp.asarray(np.stack(part).reshape(*stack, *part[0].shape)) for part in parts))


def expected(args: dict[str, Any]) -> np.ndarray:
    """The sum over pairs of a token and an expert."""
    dense = lambda w: np.asarray(quantize.dense(w, jnp.float32), np.float64)[int(args["layer"])]
    w1_EFD, w3_EFD, w2_EDF = (dense(args[name]) for name in ("w1_LEFD", "w3_LEFD", "w2_LEDF"))
    x_TD, weight_TA = (np.asarray(args[name], np.float64) for name in ("x_TD", "weight_TA"))
    out_TD = np.zeros(x_TD.shape)
    for (t, a), e in np.ndenumerate(np.asarray(args["expert_TA"])):
        if 0 <= e < len(w1_EFD):
            gate_F = np.minimum(w1_EFD[e] @ x_TD[t], LIMIT)
            up_F = np.clip(w3_EFD[e] @ x_TD[t], -LIMIT, LIMIT)
            hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
            out_TD[t] += weight_TA[t, a] * (w2_EDF[e] @ hidden_F)
    return out_TD


def run(args: dict[str, Any], impl: str, *, weight_first: bool = True) -> np.ndarray:
    out_TD = EXPERT_MLP(**args, limit=LIMIT, weight_first=weight_first, impl=impl)
    assert out_TD.dtype == jnp.float32
    return np.asarray(out_TD)


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = CLOSE) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 5, 30, 33, 700])
def test_output_is_the_weighted_sum_of_the_chosen_experts(
    impl: str, weight_first: bool, tokens: int
) -> None:
    args = inputs(SMALL, tokens)
    assert_close(run(args, impl, weight_first=weight_first), expected(args))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_shapes_of_the_models_scaled_down(impl: str, name: str, tokens: int) -> None:
    args = inputs(SHAPES[name].divided(64), tokens)
    assert_close(run(args, impl), expected(args))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("form", ["fp8", "fp4"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_quantised_experts_equal_dequantised_ones(impl: str, form: str, tokens: int) -> None:
    args = inputs(SMALL, tokens)
    for name in ("w1_LEFD", "w3_LEFD", "w2_LEDF"):
        args[name] = quantized(args[name], form)
    assert_close(run(args, impl), expected(args))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_bfloat16_accumulates_in_float32(impl: str, weight_first: bool, tokens: int) -> None:
    args = inputs(SMALL, tokens)
    for name in ("x_TD", "w1_LEFD", "w3_LEFD", "w2_LEDF"):
        args[name] = args[name].astype(jnp.bfloat16)
    got = run(args, impl, weight_first=weight_first)
    assert_close(got, expected(args), CLOSE_BFLOAT16)


@pytest.mark.parametrize("impl", FORMS)
def test_a_traced_index_selects_the_layer(impl: str) -> None:
    args = inputs(SMALL, 5, layers=3)
    for layer in range(3):
        args["layer"] = jnp.int32(layer)
        assert_close(run(args, impl), expected(args))


@settings(max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize("tokens", [3, 20, 90])
def test_any_routing_gives_the_sum_over_experts(tokens: int, data: st.DataObject) -> None:
    """Ids out of range, repeated ids of a token, experts with no tokens or all of them."""
    ids = st.integers(-2, SMALL.experts + 1) | st.just(data.draw(st.integers(-1, SMALL.experts)))
    row = st.lists(ids, min_size=SMALL.choices, max_size=SMALL.choices)
    expert_TA = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    args = inputs(SMALL, tokens) | {"expert_TA": jnp.asarray(expert_TA, jnp.int32)}
    want = expected(args)
    for impl in FORMS:
        np.testing.assert_allclose(run(args, impl), want, rtol=0, atol=CLOSE * 4)


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens_without_an_expert_give_zero_even_if_nan(tokens: int) -> None:
    args = inputs(SMALL, tokens)
    idle_T1 = (jnp.arange(tokens) % 3 == 0)[:, None]
    clean = run(args, "xla")
    args["expert_TA"] = jnp.where(idle_T1, -1, args["expert_TA"])
    args["x_TD"] = jnp.where(idle_T1, jnp.nan, args["x_TD"])
    want = np.where(idle_T1, 0, clean)
    np.testing.assert_allclose(run(args, "xla"), want, rtol=0, atol=CLOSE * np.abs(clean).max())


@pytest.mark.full_compilation
@pytest.mark.parametrize("tokens", [1, 30, 700])
@pytest.mark.parametrize("form", ["dense", "fp8", "fp4"])
def test_no_layer_is_copied(form: str, tokens: int) -> None:
    shape = Shape(experts=64, choices=2, hidden=256, expert_hidden=128)
    args = inputs(shape, tokens)
    names = ("w1_LEFD", "w3_LEFD", "w2_LEDF")
    if form != "dense":
        for name in names:
            args[name] = quantized(args[name], form)
    compiled = EXPERT_MLP.lower(**args, limit=LIMIT, weight_first=True).compile()
    # Rows, and dequantised matrices of a few experts, out of 64 experts and 2 layers.
    matrix = 4 * shape.hidden * shape.expert_hidden
    rows = 4 * (tokens * shape.choices + 256) * shape.hidden
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * rows + 12 * matrix < shape.experts * matrix


@pytest.mark.parametrize("weight_first", [True, False])
def test_reference_is_differentiable(weight_first: bool) -> None:
    args = inputs(Shape(experts=3, choices=2, hidden=32, expert_hidden=32), 3)
    names = ("x_TD", "weight_TA", "w1_LEFD", "w3_LEFD", "w2_LEDF")

    def loss(values: tuple[Any, ...]) -> jax.Array:
        changed = args | {name: jnp.asarray(v) for name, v in zip(names, values, strict=True)}
        # No clamp: it is not differentiable at its corners.
        out_TD = grouped_matmul.expert_mlp(
            **changed, limit=1e3, weight_first=weight_first, impl="reference"
        )
        return jnp.sum(jnp.square(out_TD))

    # Finite differences in float32.
    jax.test_util.check_grads(
        loss, (tuple(args[name] for name in names),), order=1, modes=["rev"], rtol=2e-2, atol=2e-2
    )


def test_an_unknown_implementation_is_rejected_with_the_known_ones() -> None:
    # Unwrapped, because the check of annotations would raise first.
    expert_mlp = inspect.unwrap(grouped_matmul.expert_mlp)
    with pytest.raises(NotImplementedError, match=r"'cuda' form; pass one of \['auto'"):
        expert_mlp(**inputs(SMALL, 1), limit=LIMIT, weight_first=True, impl="cuda")
