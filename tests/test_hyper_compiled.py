"""Hyper-connections: the TPU kernels equal the reference, and every chip reads the streams once.

Axis letters: B batch, T tokens, N streams, D hidden, M = N * D.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hyper, targets
from pallas_kernels.hyper import reference
from pallas_kernels.hyper.shapes import SHAPES, Shape
from pallas_kernels.implementations import Unsupported
from tests.kernels import interpreted

NORM: dict[str, Any] = {"eps": 1e-6, "norm_eps": 1e-6}
OPS = {
    "pre": functools.partial(hyper.pre, **NORM),
    "post": hyper.post,
    "head": functools.partial(hyper.head, **NORM),
}
STREAMS_OF = {"pre": 1, "post": 2, "head": 1}  # how often the op reads or writes the streams


def structs(op: str, shape: Shape, B: int, T: int, dtype: Any = jnp.bfloat16) -> list[Any]:
    N, D = shape.streams, shape.hidden
    of = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    x = of(B, T, N * D, dtype=dtype)
    match op:
        case "pre":
            return [x, of(shape.mixes, N * D), of(shape.mixes), of(3)]
        case "post":
            return [of(B, T, D, dtype=dtype), x, of(B, T, N), of(B, T, N, N)]
        case _:
            return [x, of(N, N * D), of(N), of(1)]


def arrays(op: str, shape: Shape, B: int, T: int, dtype: Any = jnp.bfloat16) -> list[Any]:
    """Random inputs, with projections scaled to logits of order one."""
    rng = np.random.default_rng(len(op))
    args = [jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in structs(op, shape, B, T, dtype)]
    return args if op == "post" else [args[0], args[1] * args[1].shape[1] ** -0.5, *args[2:]]


def run(op: str, shape: Shape, steps: int = 20, **settings: Any) -> Any:
    if op == "pre":
        settings |= {"streams": shape.streams, "steps": steps}
    return functools.partial(OPS[op], **settings)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("N", "B", "T", "dtype"), [(4, 2, 67, jnp.bfloat16), (2, 3, 1, jnp.float32)]
)
def test_kernels_equal_the_reference(op: str, N: int, B: int, T: int, dtype: Any) -> None:
    shape = Shape(streams=N, hidden=256)
    args = arrays(op, shape, B, T, dtype)
    with interpreted():
        actual = jax.jit(run(op, shape, impl="tpu"))(*args)
    expected = run(op, shape, impl="reference")(*args)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        # Sums of a thousand float32 terms in another order; rounded, perhaps one bfloat16 ulp off.
        tolerance = 1e-5 if ours.dtype == jnp.float32 else 2.0**-7
        as64 = lambda x: np.asarray(x, np.float64)
        np.testing.assert_allclose(as64(ours), as64(theirs), rtol=tolerance, atol=1e-5)


def test_two_cores_do_not_race() -> None:
    shape = Shape(streams=2, hidden=128)
    with interpreted(detect_races=True, num_cores_or_threads=2):
        for op in ("pre", "post"):
            args = arrays(op, shape, 1, 130)
            jax.block_until_ready(jax.jit(run(op, shape, steps=2, impl="tpu"))(*args))


@pytest.mark.parametrize("op", OPS)
def test_gradients_match_the_reference(op: str) -> None:
    shape = Shape(streams=2, hidden=8)
    args = arrays(op, shape, 1, 3, jnp.float32)

    def gradients(settings: dict[str, Any], module: Any) -> Any:
        def loss(*args: Any) -> Any:
            leaves = jax.tree.leaves(getattr(module, op)(*args, **settings))
            return sum(jnp.sum(leaf * jnp.cos(leaf)) for leaf in leaves)

        return jax.jit(jax.grad(loss, range(len(args))))(*args)

    settings = {"pre": NORM | {"streams": 2, "steps": 3}, "post": {}, "head": NORM}[op]
    for ours, theirs in zip(
        gradients(settings, hyper), gradients(settings, reference), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.full_compilation
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("target", targets.TPU_TOPOLOGIES)
def test_tpus_read_the_streams_once(target: Any, name: str, op: str) -> None:
    shape = SHAPES[name]
    for B, T in ((8, 1), (1, 4096)):
        program = targets.compiled(target, run(op, shape), *structs(op, shape, B, T))
        assert (program.as_text() or "").count('custom_call_target="tpu_custom_call"') == 1
        # What is left to XLA around the kernel: the mixing weights, 96 bytes per token.
        assert targets.temporaries(program) <= 2**21
        cost = program.cost_analysis()
        assert cost is not None
        assert cost["bytes accessed"] <= 2 * B * T * shape.hidden


@pytest.mark.full_compilation
def test_any_number_of_tokens_compiles() -> None:
    for op, T in (("pre", 3), ("post", 3), ("post", 67), ("head", 3)):
        shape = SHAPES["flash"]
        program = targets.compiled("v5p", run(op, shape), *structs(op, shape, 1, T))
        assert "tpu_custom_call" in (program.as_text() or "")


@pytest.mark.full_compilation
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_gpus_need_no_temporary_streams(name: str, op: str) -> None:
    shape = SHAPES[name]
    program = targets.compiled("h200", run(op, shape), *structs(op, shape, 1, 4096))
    assert targets.temporaries(program) <= 2**21


@pytest.mark.full_compilation
def test_narrower_weights_are_left_to_xla() -> None:
    shape = Shape(streams=2, hidden=128)
    output, x, *weights = arrays("post", shape, 1, 2)
    weights = [weight.astype(jnp.bfloat16) for weight in weights]
    with pytest.raises(Unsupported, match=r"weights in float32, not .*bfloat16"):
        hyper.post(output, x, *weights, impl="tpu")
    assert hyper.post(output, x, *weights).dtype == jnp.bfloat16
