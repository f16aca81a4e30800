"""Gradients of attention to listed entries against autodiff of the reference.

Axis letters: as in test_sparse_attention.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import sparse_attention
from pallas_kernels.quantize import fake_quant_fp8
from pallas_kernels.sparse_attention import reference, rows
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.targets import temporaries
from tests.kernels import by_name
from tests.test_sparse_attention import (
    SCALE,
    decode_inputs,
    near,
    poison,
    prefill_inputs,
    window_of,
)

# Sums of up to a thousand float32 products in a different order: 30 ulps of terms of size 1.
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 4e-6}
# bfloat16 weights and slopes, each within 2^-9, and results rounded to 2^-9.
CLOSE_BFLOAT16: dict[str, Any] = {"rtol": 2**-5, "atol": 2**-5}
Inputs = dict[str, Any]


def gradients(run: Any, inputs: Inputs) -> dict[str, Any]:
    """Gradients of a loss whose gradient differs for each element of the output."""
    inputs = jax.tree.map(jnp.asarray, inputs)
    window = "window_BXK" if "start_B" in inputs else "window_BRK"
    names = [window, "q_BTHK", "sink_H"]
    if not isinstance(inputs["pool_LBSK"], rows.Fp8Rows):
        names.append("pool_LBSK")

    def loss(arrays: Inputs) -> Any:
        return jnp.sum(jnp.sin(run(**(inputs | arrays)).astype(jnp.float32)))

    return jax.jit(jax.grad(loss))({name: inputs[name] for name in names})


def public(inputs: Inputs, impl: Any) -> Any:
    if "start_B" not in inputs:
        return functools.partial(sparse_attention.decode, scale=SCALE, impl=impl)
    window = window_of(inputs)
    return functools.partial(sparse_attention.prefill, window=window, scale=SCALE, impl=impl)


def plain(inputs: Inputs) -> Any:
    if "start_B" not in inputs:
        return functools.partial(by_name(reference.decode, DecodeInputs), scale=SCALE)
    prefill = by_name(reference.prefill, PrefillInputs)
    return functools.partial(prefill, window=window_of(inputs), scale=SCALE)


def check(inputs: Inputs, impl: str = "auto", **close: Any) -> None:
    actual, expected = gradients(public(inputs, impl), inputs), gradients(plain(inputs), inputs)
    for name, gradient in expected.items():
        assert actual[name].dtype == inputs[name].dtype
        np.testing.assert_allclose(
            np.asarray(actual[name], np.float32),
            np.asarray(gradient, np.float32),
            **(close or CLOSE),
            err_msg=name,
        )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_decode(impl: str) -> None:
    check(decode_inputs(2, 3, 24, 90, 9), impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("T", "S"), [(37, 100), (400, 20)], ids=["many entries", "few"])
def test_prefill_of_several_blocks_that_list_the_same_entries(T: int, S: int, impl: str) -> None:
    check(prefill_inputs((0, 2, 1000), T, 8, S, 9), impl)


@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 2**32 - 1), starts=st.tuples(*[st.integers(0, 3000)] * 2))
def test_prefill_on_random_data(seed: int, starts: tuple[int, int]) -> None:
    for entries in (60, 100):
        check(prefill_inputs(starts, 21, 8, entries, 9, seed))


def test_bfloat16() -> None:
    inputs = prefill_inputs((3,), 21, 8, 60, 9)
    names = ("q_BTHK", "window_BXK", "pool_LBSK")
    narrow = {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in names}
    check(inputs | narrow, **CLOSE_BFLOAT16)


@pytest.mark.parametrize("entries", [60, 100])
def test_unlisted_garbage_neither_gets_nor_affects_gradients(entries: int) -> None:
    inputs = prefill_inputs((0, 3), 21, 8, entries, 9)
    mask_BTX = near(inputs)
    poisoned = gradients(public(inputs, "auto"), poison(inputs, "window_BXK", mask_BTX, np.nan))
    clean = gradients(public(inputs, "auto"), inputs)
    for name, gradient in poisoned.items():
        np.testing.assert_array_equal(gradient, clean[name])
    pool_LBSK = np.asarray(poisoned["pool_LBSK"])
    assert not pool_LBSK[0].any()
    for b, indices_Tk in enumerate(inputs["indices_BTk"]):
        assert not pool_LBSK[1, b, ~np.isin(np.arange(entries), indices_Tk)].any()


def test_queries_that_see_nothing_have_zero_gradients() -> None:
    inputs = decode_inputs(1, 2, 4, 5, 3)
    inputs["window_mask_BTR"] = np.zeros((1, 2, 4), bool)
    inputs["indices_BTk"] = np.full((1, 2, 3), -1, np.int32)
    for gradient in gradients(public(inputs, "auto"), inputs).values():
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("entries", [40, 100])
def test_fp8_rows_get_no_gradient_and_the_other_inputs_do(entries: int, impl: str) -> None:
    inputs = fp8_inputs(entries)
    decoded = inputs | {"pool_LBSK": rows.decode(inputs["pool_LBSK"].data, jnp.float32)}
    actual = gradients(public(inputs, impl), inputs)
    expected = gradients(plain(decoded), decoded)
    assert actual.keys() == expected.keys() - {"pool_LBSK"}
    for name in actual:
        # Products of 512 channels, whose terms reach 5.
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("entries", [40, 100])
def test_fp8_rows_are_read_as_the_entries_they_encode(entries: int, impl: str) -> None:
    inputs = fp8_inputs(entries)
    decoded = inputs | {"pool_LBSK": rows.decode(inputs["pool_LBSK"].data, jnp.float32)}
    out_BTHK = public(inputs, impl)(**inputs)
    np.testing.assert_array_equal(out_BTHK, public(decoded, impl)(**decoded))


def fp8_inputs(entries: int) -> Inputs:
    inputs = prefill_inputs((0, 30), 20, 8, entries, 9, K=rows.CHANNELS)
    inputs["q_BTHK"] /= 8
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    return inputs | {"pool_LBSK": rows.encode(inputs["pool_LBSK"])}


def test_fp8_rows_hold_the_values_of_fake_quantisation() -> None:
    rng = np.random.default_rng(0)
    spread = 2.0 ** rng.integers(-30, 6, (3, 50, 1)) * 448 ** rng.integers(0, 2, (3, 50, 1))
    entries = jnp.asarray(rng.standard_normal((3, 50, rows.CHANNELS)) * spread, jnp.bfloat16)
    entries = entries.at[0, 0].set(0)
    encoded = rows.encode(entries)
    assert encoded.data.shape == (3, 50, rows.WIDTH)
    assert encoded.shape == entries.shape
    assert not encoded.data[..., rows.BYTES :].any()
    decoded, nope = rows.decode(encoded.data, jnp.bfloat16), rows.CODES
    np.testing.assert_array_equal(decoded[..., nope:], entries[..., nope:])
    np.testing.assert_array_equal(
        decoded[..., :nope], fake_quant_fp8(entries[..., :nope], block=rows.BLOCK)
    )


def test_entries_of_other_widths_are_rejected() -> None:
    with pytest.raises(ValueError, match="hold 512 channels, not 511"):
        rows.encode(jnp.zeros((2, 511), jnp.bfloat16))


@pytest.mark.full_compilation
def test_temporaries_of_gradients_stay_small_at_65536_entries() -> None:
    """A layer of the pool takes 32 MiB, as do the entries of all queries."""
    T, S, H, K, k, window = 512, 65536, 8, 128, 128, 128
    array = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    inputs = {
        "q_BTHK": array(1, T, H, K),
        "window_BXK": array(1, window + T, K),
        "start_B": array(1, dtype=jnp.int32),
        "pool_LBSK": array(2, 1, S, K),
        "layer": array(dtype=jnp.int32),
        "indices_BTk": array(1, T, k, dtype=jnp.int32),
        "sink_H": array(H),
    }
    prefill = functools.partial(sparse_attention.prefill, window=window, scale=SCALE)
    loss = lambda **arrays: jnp.sum(prefill(**arrays))
    names = ("q_BTHK", "window_BXK", "pool_LBSK", "sink_H")
    run = lambda inputs: jax.grad(lambda arrays: loss(**(inputs | arrays)))(
        {name: inputs[name] for name in names}
    )
    program = jax.jit(run).lower(inputs).compile()
    # The layer's float32 gradient once as it accumulates, and once as it goes into the stack.
    assert temporaries(program) <= 32 * 2**20 * 2.5
