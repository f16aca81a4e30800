"""Gradients of dense attention: blockwise implementations against plain maths.

Axis letters: as in the package.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pallas_kernels import dense_attention
from pallas_kernels.dense_attention import reference
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from tests.kernels import by_name
from tests.test_dense_attention import PREFILL, SCALE, Decode, Prefill, decode_case, prefill_case

DECODE_ARGS = ("q_BTHK", "window_BRK", "pool_LBSK", "sink_H")
PREFILL_ARGS = ("q_BTHK", "window_BXK", "pool_LBSK", "sink_H")
# Float32 sums of up to a thousand products of size 1 to 10, in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 3e-5}


def _arrays(case: Decode | Prefill) -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, vars(case))


def gradients(run: Any, case: Decode | Prefill) -> dict[str, np.ndarray]:
    """Gradients of a sum with weights that differ from row to row."""
    names = PREFILL_ARGS if isinstance(case, Prefill) else DECODE_ARGS
    names = tuple(name for name in names if getattr(case, name) is not None)
    fixed = {name: x for name, x in _arrays(case).items() if name not in names}
    loss = lambda trained: jnp.sum(jnp.sin(3 * run(**fixed, **trained)))
    return jax.jit(jax.grad(loss))({name: _arrays(case)[name] for name in names})


def assert_same(case: Decode | Prefill, impl: Any = "xla") -> None:
    if isinstance(case, Prefill):
        settings: dict[str, Any] = {"window": case.window, "scale": SCALE}
        run, plain = dense_attention.prefill, by_name(reference.prefill, PrefillInputs)
    else:
        settings = {"scale": SCALE}
        run, plain = dense_attention.decode, by_name(reference.decode, DecodeInputs)
    got = gradients(functools.partial(run, **settings, impl=impl), case)
    want = gradients(functools.partial(plain, **settings), case)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert np.any(x), name
        np.testing.assert_allclose(got[name], x, **CLOSE, err_msg=name)


@pytest.mark.parametrize(
    ("starts", "T", "window", "S"),
    [
        ((3,), 9, 1, 0),
        ((0, 2, 1000), 21, 8, 60),
        ((1900,), 300, 16, 700),  # several blocks of queries and entries, the last ones partial
    ],
)
def test_gradients_of_prefill(starts: tuple[int, ...], T: int, window: int, S: int) -> None:
    assert_same(prefill_case(starts, T, window, S))


@pytest.mark.parametrize(("B", "T", "R", "S"), [(1, 1, 4, 0), (2, 8, 24, 30), (2, 1, 16, 700)])
def test_gradients_of_decode(B: int, T: int, R: int, S: int) -> None:
    assert_same(decode_case(B, T, R, S))


def test_gradients_where_visible_is_not_monotone() -> None:
    case = prefill_case((7, 0), 140, 8, 600, seed=3)
    visible_BT = np.random.default_rng(3).integers(0, 601, (2, 140)).astype(np.int32)
    visible_BT[:, ::7] = 0
    assert_same(dataclasses.replace(case, visible_BT=visible_BT))


def test_other_layers_of_the_stack_get_no_gradient() -> None:
    case = prefill_case((1900,), 20, 8, 60)
    run = functools.partial(dense_attention.prefill, window=8, scale=SCALE)
    grad_LBSK = gradients(run, case)["pool_LBSK"]
    assert np.any(grad_LBSK[1])
    assert not np.any(grad_LBSK[0])


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_masked_garbage_does_not_reach_gradients(impl: Any) -> None:
    case = prefill_case((0,), 5, 3, 4)
    window, pool = case.window_BXK.copy(), case.pool_LBSK.copy()
    window[:, :3], pool[0], pool[1, :, case.visible_BT.max() :] = np.nan, np.nan, np.nan
    run = functools.partial(dense_attention.prefill, window=3, scale=SCALE, impl=impl)
    got = gradients(run, dataclasses.replace(case, window_BXK=window, pool_LBSK=pool))
    want = gradients(run, case)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    case = decode_case(1, 2, 4, 5)
    nothing = {
        "window_mask_BTR": np.zeros((1, 2, 4), bool),
        "visible_BT": np.zeros((1, 2), np.int32),
    }
    run = functools.partial(dense_attention.decode, scale=SCALE, impl="xla")
    for name, x in gradients(run, dataclasses.replace(case, **nothing)).items():
        np.testing.assert_array_equal(x, np.zeros(x.shape), err_msg=name)


def test_gradients_of_the_reference_equal_finite_differences() -> None:
    case = prefill_case((2,), 5, 3, 4)
    fixed = {name: x for name, x in _arrays(case).items() if name not in PREFILL_ARGS}

    def loss(*arrays: Any) -> Any:
        # Jitted, because check_grads passes NumPy arrays.
        run = functools.partial(PREFILL, window=3, scale=SCALE, impl="reference")
        return jnp.sum(jnp.sin(run(**fixed, **dict(zip(PREFILL_ARGS, arrays, strict=True)))))

    arrays = [jnp.asarray(getattr(case, name)) for name in PREFILL_ARGS]
    # Float32 differences over steps of 1e-2.
    jax.test_util.check_grads(loss, arrays, order=1, modes=["rev"], eps=1e-2, rtol=2e-3, atol=2e-3)
