"""Gradients of attention to listed entries on TPU: interpreted against the reference, and compiled.

Axis letters: as in test_sparse_attention.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse_attention
from pallas_kernels.implementations import Unsupported
from pallas_kernels.sparse_attention import reference, rows, tpu
from pallas_kernels.sparse_attention.inputs import PrefillInputs
from pallas_kernels.targets import compiled, temporaries
from tests.kernels import interpreted
from tests.test_sparse_attention import window_of
from tests.test_sparse_attention_gradients import CLOSE, CLOSE_BFLOAT16
from tests.test_sparse_attention_tpu import SCALE, Inputs, prefill_inputs, structs


def pullback(inputs: Inputs, backward: Any) -> list[np.ndarray]:
    """Gradients of queries, window, pool and sink; the output gradient varies by element."""
    static = {"window": window_of(inputs), "scale": SCALE}

    def run(inputs: Inputs) -> Any:
        record = PrefillInputs(**inputs)
        out_BTHK = reference.prefill(record, **static)
        grad_BTHK = jnp.cos(3 * out_BTHK.astype(jnp.float32)).astype(out_BTHK.dtype)
        return backward(grad_BTHK, out_BTHK, record, **static)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(inputs)]


def check(inputs: Inputs, close: dict[str, Any] = CLOSE, **params: Any) -> None:
    expected = pullback(inputs, reference.prefill_backward)
    with interpreted(**params):
        actual = pullback(inputs, tpu.prefill_backward)
    for name, x, y in zip(("queries", "window", "pool", "sink"), actual, expected, strict=True):
        assert np.any(y), name
        np.testing.assert_allclose(x, y, **close, err_msg=name)


def test_several_blocks_of_queries_and_entries_equal_the_reference_and_do_not_race() -> None:
    # The last block of each is partial, every fifth query lists nothing, and unlisted rows are NaN.
    inputs = prefill_inputs((3,), T=18, S=528, k=200, dtype=jnp.float32)
    indices_BTk = inputs["indices_BTk"].at[:, ::5].set(-1)
    check(inputs | {"indices_BTk": indices_BTk}, detect_races=True, num_cores_or_threads=2)


def test_few_entries_next_to_the_window_in_bfloat16() -> None:
    check(prefill_inputs((40,), T=5, S=64), CLOSE_BFLOAT16)


def test_the_public_function_uses_the_kernel() -> None:
    inputs = prefill_inputs((40,), T=5, S=64)
    run = functools.partial(sparse_attention.prefill, window=window_of(inputs), scale=SCALE)
    loss = lambda q_BTHK: jnp.sum(run(**(inputs | {"q_BTHK": q_BTHK}), impl="tpu"))
    traced = str(jax.make_jaxpr(jax.grad(loss))(inputs["q_BTHK"]))
    assert "sparse_attention_prefill_backward" in traced


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("target", "name", "S"),
    [("v5p", "flash", 8192), ("v6e", "flash", 1024), ("tpu7x", "pro", 1024)],
)
def test_a_training_row_compiles_with_small_temporaries(target: Any, name: str, S: int) -> None:
    """4096 tokens, four to an entry, and as many entries as the kernel supports."""
    program = compiled(target, backward, chunk(name, S))
    assert "tpu_custom_call" in (program.as_text() or "")
    # Two float32 sums of the pool, and those of the windows of 256 queries each, which XLA holds
    # twice while adding them.
    assert temporaries(program) <= 2 * S * 512 * 4 + 28e6


def test_unsupported_inputs_are_rejected_while_tracing() -> None:
    with pytest.raises(Unsupported, match="at most 8192 of 512 channels, not 16384"):
        jax.eval_shape(backward, chunk("flash", 16384))
    inputs = chunk("flash", 1024)
    data = jax.ShapeDtypeStruct((2, 1, 1024, rows.WIDTH), jnp.uint8)
    with pytest.raises(Unsupported, match="takes no Fp8Rows"):
        jax.eval_shape(backward, inputs | {"pool_LBSK": rows.Fp8Rows(data)})


def chunk(name: str, entries: int) -> Inputs:
    inputs = structs(name, 4096, entries, chunk=True)
    return inputs | dict.fromkeys(("grad_BTHK", "out_BTHK"), inputs["q_BTHK"])


def backward(inputs: Inputs) -> Any:
    outputs = inputs["grad_BTHK"], inputs["out_BTHK"]
    record = PrefillInputs(**{n: x for n, x in inputs.items() if n in PrefillInputs._fields})
    return tpu.prefill_backward(*outputs, record, window=128, scale=SCALE)
