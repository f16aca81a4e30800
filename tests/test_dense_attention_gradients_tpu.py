"""Gradients of dense attention on TPU: interpreted on CPU against plain maths, and compiled ahead
of time for real chips.

Axis letters: as in the package.
"""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention, targets, tpu_attention_backward
from pallas_kernels.dense_attention import reference, tpu
from pallas_kernels.dense_attention.inputs import PrefillInputs
from pallas_kernels.dense_attention.shapes import SHAPES
from pallas_kernels.implementations import Unsupported
from tests.kernels import interpreted
from tests.test_dense_attention import SCALE, Prefill, prefill_case
from tests.test_dense_attention_gradients import CLOSE, gradients

NAMES = ("queries", "window", "pool", "sink")


def pulled(case: Prefill, backward: Any) -> list[np.ndarray]:
    """Gradients from a new function, because a compiled one would not be traced again."""
    static = {"window": case.window, "scale": SCALE}
    arrays = jax.tree.map(jnp.asarray, vars(case))

    def run(arrays: Any, out_BTHK: Any) -> Any:
        grad_BTHK = jnp.cos(3 * out_BTHK.astype(jnp.float32)).astype(out_BTHK.dtype)
        return backward(grad_BTHK, out_BTHK, PrefillInputs(**arrays), **static)

    out_BTHK = case.run("reference")
    grads = jax.jit(run)(arrays, jnp.asarray(out_BTHK))
    return [np.asarray(x, np.float32) for x in grads if x is not None]


def assert_same(case: Prefill, **params: Any) -> None:
    want = pulled(case, reference.prefill_backward)
    with interpreted(**params):
        got = pulled(case, tpu.prefill_backward)
    names = NAMES if case.pool_LBSK is not None else ("queries", "window", "sink")
    for name, x, y in zip(names, got, want, strict=True):
        assert np.any(y), name
        np.testing.assert_allclose(x, y, **CLOSE, err_msg=name)


def test_gradients_of_a_layer_without_entries() -> None:
    assert_same(prefill_case((3,), 9, 1, 0))


def test_any_visible_counts_with_logits_computed_twice() -> None:
    case = prefill_case((7,), 140, 8, 528, seed=3)
    visible_BT = np.random.default_rng(3).integers(0, 529, (1, 140)).astype(np.int32)
    visible_BT[:, ::7] = 0
    # Enough for the pool and its gradient, but not for its logits.
    with mock.patch.object(tpu_attention_backward, "_POOL_BYTES", 528 * 64):
        assert_same(dataclasses.replace(case, visible_BT=visible_BT))


def test_two_cores_accumulate_without_a_race() -> None:
    # Blocks of 128 queries, two per group; the last one is partial.
    case = prefill_case((5,), 500, 8, 272)
    assert_same(case, detect_races=True, num_cores_or_threads=2)


def test_the_op_uses_the_kernel_and_masked_garbage_does_not_reach_gradients() -> None:
    case = prefill_case((0, 2, 1000), 21, 8, 60)
    window, pool = case.window_BXK.copy(), case.pool_LBSK.copy()
    pool[0] = np.nan
    for b in range(3):
        window[b, ~np.any([case.near(b, t) for t in range(21)], axis=0)] = np.nan
        pool[1, b, case.visible_BT[b].max() :] = np.nan
    run = functools.partial(dense_attention.prefill, window=8, scale=SCALE)
    with interpreted():
        garbled = dataclasses.replace(case, window_BXK=window, pool_LBSK=pool)
        got = gradients(functools.partial(run, impl="tpu"), garbled)
    want = gradients(functools.partial(run, impl="reference"), case)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, **CLOSE, err_msg=name)


def test_sizes_that_the_kernel_does_not_support_are_rejected() -> None:
    with pytest.raises(Unsupported, match="a multiple of 16 entries, at most 8192 of 512 channels"):
        jax.eval_shape(
            functools.partial(tpu.prefill_backward, window=128, scale=1.0), *full("flash", 8208)
        )
    with pytest.raises(
        Unsupported, match="up to 128 heads and a window of up to 1024, not 3 and 2000"
    ):
        pulled(prefill_case((0,), 9, 2000, 0), tpu.prefill_backward)


def full(name: str, S: int, **bounds: Any) -> tuple[Any, Any, PrefillInputs]:
    """Gradient, output and inputs for a training row of 4096 tokens."""
    shape, T = SHAPES[name], 4096
    array: Any = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    rows = array(1, T, shape.heads, shape.head_dim)
    inputs = PrefillInputs(
        q_BTHK=rows,
        window_BXK=array(1, shape.window + T, shape.head_dim),
        start_B=array(1, dtype=jnp.int32),
        pool_LBSK=array(2, 1, S, shape.head_dim) if S else None,
        layer=array(dtype=jnp.int32),
        visible_BT=array(1, T, dtype=jnp.int32),
        sink_H=array(shape.heads, dtype=jnp.float32),
        **bounds,
    )
    return rows, rows, inputs


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("target", "name", "S"),
    [
        ("v5p", "flash", 32),
        ("v6e", "flash", 32),
        ("tpu7x", "flash", 32),
        ("tpu7x", "pro", 0),
    ],
)
def test_full_shapes_compile_with_small_temporaries(target: Any, name: str, S: int) -> None:
    run = functools.partial(tpu.prefill_backward, window=SHAPES[name].window, scale=512**-0.5)
    program = targets.compiled(target, run, *full(name, S))
    assert "tpu_custom_call" in str(program.as_text())
    # Two sums of the pool in float32, and those of the windows of 256 queries each, which XLA holds
    # twice while it adds them up. Logits would be 4 GB and more, queries in float32 0.5 GB.
    assert targets.temporaries(program) <= 2 * S * 512 * 4 + 28e6
