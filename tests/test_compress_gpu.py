"""Interpreted GPU kernels compute the reference's entries; full-size ones compile for H200.

As in test_compress_tpu, what follows an exact sum is compared bit for bit.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compress, targets
from pallas_kernels.compress import gpu, gpu_finish, reference
from pallas_kernels.compress.shapes import SHAPES, Shape
from pallas_kernels.implementations import Unsupported
from tests.gpu_kernels import interpreted
from tests.test_compress import CLOSE, chunk, complete, settings, steps, text
from tests.test_compress_tpu import full_size, one_dominates

BF16, F32 = jnp.bfloat16, jnp.float32
# Windows in four pieces, three of them in flight; blocks of two windows, with two warpgroups and
# with one.
HCA = Shape(ratio=64, dim=128, overlap=1, rotated=64, rounding="fp8")
CSA = Shape(ratio=4, dim=256, overlap=2, rotated=64, rounding="fp8")
INDEX = Shape(ratio=4, dim=128, overlap=2, rotated=32, rounding="fp4")
SMALL = {"hca": HCA, "csa": CSA, "index": INDEX}


def run(name: str, args: Any, static: dict[str, Any], *, races: bool = False) -> np.ndarray:
    with interpreted(races=races):
        got = jax.jit(functools.partial(getattr(gpu, name), **static))(*args)
        return np.asarray(got, np.float32)


@pytest.mark.parametrize(("name", "start_B"), [("hca", [3]), ("csa", [7]), ("index", [0, 7])])
def test_rounded_entries_of_a_chunk_equal_the_references(name: str, start_B: list[int]) -> None:
    """The chunk starts with the text or within a window, and ends within one."""
    shape, static = SMALL[name], settings(SMALL[name], BF16)
    T = (2 if name == "hca" else 4) * shape.ratio - 1
    inputs = one_dominates(text(shape, len(start_B), T + max(start_B), BF16))
    args = chunk(shape, inputs, start_B, T, poison=np.nan)
    got_BnK = run("prefill", args, static)
    # Not jitted: in one program XLA omits intermediate roundings to bfloat16.
    expected_BnK = np.asarray(reference.prefill(*args, **static), np.float32)
    for b, start in enumerate(start_B):
        n = complete(shape, start, T)
        np.testing.assert_array_equal(got_BnK[b, :n], expected_BnK[b, :n])


@pytest.mark.parametrize("name", ["hca", "index"])
def test_steps_from_a_ring_that_wraps(name: str) -> None:
    shape, window_B = SMALL[name], [0, -1, 7]
    inputs = text(shape, len(window_B), 8 * shape.ratio, BF16)
    args, static = steps(shape, one_dominates(inputs), window_B), settings(shape, BF16)
    expected_B1K = np.asarray(reference.decode(*args, **static), np.float32)
    np.testing.assert_array_equal(run("decode", args, static), expected_B1K)


@pytest.mark.parametrize(
    ("M", "n", "overlap", "dtype"), [(96, 2, 1, BF16), (4, 3, 2, F32), (6, 1, 2, BF16)]
)
def test_all_tokens_of_a_window_are_pooled(M: int, n: int, overlap: int, dtype: Any) -> None:
    """With three windows in blocks of two, the second is computed and written twice."""
    draw = np.random.default_rng(M).standard_normal
    tokens = (2, (n + overlap - 1) * M, overlap * 128)
    kv_BXC, gate_BXC = (jnp.asarray(x, dtype) for x in (draw(tokens), 4 * draw(tokens)))
    bias_MC = jnp.asarray(draw((M, overlap * 128)), F32)
    args = kv_BXC, gate_BXC, bias_MC, jnp.arange(2, dtype=jnp.int32) * 3
    got_BnK = run("pool", args, {"overlap": overlap}, races=n == 3)
    np.testing.assert_allclose(got_BnK, reference.pool(*args, overlap=overlap), **CLOSE)


def test_a_chunk_shorter_than_a_window() -> None:
    static = settings(INDEX, F32, "none")
    args = chunk(INDEX, text(INDEX, 2, 16), [2, 9], 3, poison=np.nan)
    expected_BnK = reference.prefill(*args, **static)
    np.testing.assert_allclose(run("prefill", args, static), expected_BnK, **CLOSE)


@pytest.mark.full_compilation
@pytest.mark.parametrize("name", ["flash hca", "flash csa", "flash index"])
@pytest.mark.parametrize("step", [False, True])
def test_full_size_compiles_for_h200(name: str, step: bool) -> None:
    """Temporaries are the first windows' tokens and the rotary table in lanes; no sums."""
    shape = SHAPES[name]
    assert shape == SHAPES[name.replace("flash", "pro")]
    B, T = (8, 1) if step else (1, 8192)
    run = functools.partial(compress.decode if step else compress.prefill, **settings(shape, BF16))
    program = targets.compiled("h200", run, *full_size(shape, B, T))
    assert (program.as_text() or "").count('custom_call_target="mosaic_gpu') == 1
    table = 2 * 4 * B * -(-T // shape.ratio) * gpu_finish.CHANNELS
    first = 0 if step else 4 * shape.overlap * shape.ratio * 2 * shape.channels
    assert targets.temporaries(program) <= table + first


@pytest.mark.full_compilation
@pytest.mark.parametrize(("M", "B", "n", "overlap"), [(128, 1, 64, 1), (4, 8, 1, 2)])
def test_pooling_alone_compiles_for_h200(M: int, B: int, n: int, overlap: int) -> None:
    struct = jax.ShapeDtypeStruct
    tokens = struct((B, (n + overlap - 1) * M, overlap * 512), BF16)
    rest = struct((M, overlap * 512), F32), struct((B,), jnp.int32)
    pool = functools.partial(gpu.pool, overlap=overlap)
    program = targets.compiled("h200", pool, tokens, tokens, *rest)
    assert targets.temporaries(program) == 0


def test_unsupported_shapes_and_dtypes_are_rejected() -> None:
    cases = [
        (Shape(4, 64, 1, 32, "none"), F32, "multiple of 128"),
        (Shape(4, 128, 1, 32, "none"), jnp.float16, "float16"),
        (Shape(4, 256, 1, 32, "fp4"), F32, "FP4, not 32 of 256"),
        (Shape(4, 256, 1, 192, "none"), F32, "rotates up to 128"),
    ]
    for shape, dtype, message in cases:
        args = chunk(shape, text(shape, 1, 4), [0], 4)
        args[0] = args[0].astype(dtype)
        with pytest.raises(Unsupported, match=message):
            gpu.prefill(*args, **settings(shape))
