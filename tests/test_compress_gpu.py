"""Pooling on NVIDIA GPUs: equal to plain maths where interpreted, compiled for H200.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compress import gpu, reference
from pallas_kernels.implementations import Unsupported
from pallas_kernels.targets import lowered, temporaries
from tests.mosaic_gpu import interpreted, races_found

BF16, F32 = jnp.bfloat16, jnp.float32


def inputs(B: int, n: int, M: int, K: int, overlap: int, dtype: Any = BF16) -> list[jax.Array]:
    draw = np.random.default_rng(M + n).standard_normal
    tokens = (B, (n + overlap - 1) * M, overlap * K)
    gate_BXC, bias_MC = 4 * draw(tokens), draw((M, overlap * K))
    first_B = jnp.arange(B, dtype=jnp.int32) * 3
    return [
        jnp.asarray(draw(tokens), dtype),
        jnp.asarray(gate_BXC, dtype),
        jnp.asarray(bias_MC, F32),
        first_B,
    ]


@pytest.mark.parametrize(
    ("B", "n", "M", "K", "overlap", "dtype"),
    [
        (2, 1, 32, 128, 1, BF16),  # one step
        (1, 5, 32, 256, 1, F32),  # two blocks, the last reaching back
        (2, 1, 4, 128, 2, F32),  # one step, without and with a predecessor
        (2, 18, 4, 128, 2, BF16),  # two blocks of 16
        (1, 2, 12, 128, 1, BF16),  # a window that is no multiple of a step
    ],
)
def test_entries_are_those_of_plain_maths(
    B: int, n: int, M: int, K: int, overlap: int, dtype: Any
) -> None:
    args = inputs(B, n, M, K, overlap, dtype)
    with interpreted():
        got_BnK = jax.jit(functools.partial(gpu.pool, overlap=overlap))(*args)
    # float32 sums of up to 32 terms of magnitude 3, and the rounding of exp.
    np.testing.assert_allclose(got_BnK, reference.pool(*args, overlap=overlap), atol=4e-6)


def test_what_precedes_window_0_counts_for_nothing() -> None:
    kv_BXC, gate_BXC, bias_MC, first_B = inputs(2, 1, 4, 128, 2)
    poisoned = [x.at[0, :4].set(jnp.nan) for x in (kv_BXC, gate_BXC)]
    with interpreted():
        pool = jax.jit(functools.partial(gpu.pool, overlap=2))
        clean_BnK = pool(kv_BXC, gate_BXC, bias_MC, first_B)
        np.testing.assert_array_equal(pool(*poisoned, bias_MC, first_B), clean_BnK)


def test_no_race_is_found() -> None:
    with interpreted(detect_races=True):
        jax.block_until_ready(
            jax.jit(functools.partial(gpu.pool, overlap=2))(*inputs(1, 2, 4, 128, 2))
        )
        assert not races_found()


@pytest.mark.parametrize(
    ("B", "n", "M", "K", "overlap"),
    [
        (1, 64, 128, 512, 1),  # HCA: 8192 tokens
        (8, 1, 128, 512, 1),  # one step of each row
        (1, 2048, 4, 512, 2),  # CSA
        (8, 1, 4, 512, 2),
        (1, 2048, 4, 128, 2),  # CSA's index keys
    ],
)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_full_size_compiles_for_h200_without_temporaries(
    B: int, n: int, M: int, K: int, overlap: int, dtype: Any
) -> None:
    args = jax.eval_shape(lambda: inputs(B, n, M, K, overlap, dtype))
    program = lowered("h200", functools.partial(gpu.pool, overlap=overlap), *args)
    assert "mosaic_gpu" in program.as_text()
    assert temporaries(program.compile()) == 0


def finishing(K: int, n: int, B: int) -> tuple[Any, Any, dict[str, Any]]:
    """The norm's weight, the rotary table and what is static."""
    draw = np.random.default_rng(5).standard_normal
    angle_BnQ = draw((B, n, 16))
    table = tuple(jnp.asarray(f(angle_BnQ), F32) for f in (np.cos, np.sin))
    static = {"eps": 1e-6, "rounding": "none", "dtype": F32}
    return jnp.asarray(1 + 0.1 * draw(K), F32), table, static


@pytest.mark.parametrize(
    ("T", "M", "overlap", "start"),
    [
        (64, 4, 2, (0, 7)),  # two blocks; at the text's start, and amid a window
        (70, 32, 1, (32, 95)),  # the last window incomplete
        (3, 4, 2, (2, 9)),  # less than a window
    ],
)
def test_a_chunk_makes_the_entries_of_plain_maths(
    T: int, M: int, overlap: int, start: tuple[int, int]
) -> None:
    draw, K, n = np.random.default_rng(T).standard_normal, 128, -(-T // M)
    C = overlap * K
    rows_BTC, before_BPC = (jnp.asarray(draw((2, X, 2 * C)), F32) for X in (T, overlap * M))
    scale_K, table, static = finishing(K, n, 2)
    start_B, bias_MC = jnp.asarray(start, jnp.int32), jnp.asarray(draw((M, C)), F32)
    args = rows_BTC, before_BPC, start_B, bias_MC, scale_K, table
    run = functools.partial(gpu.prefill, overlap=overlap, **static)
    with interpreted():
        got_BnK = np.asarray(jax.jit(run)(*args))
    want_BnK = np.asarray(reference.prefill(*args, overlap=overlap, **static))
    window_Bn = np.asarray(start)[:, None] // M + np.arange(n)
    whole_Bn = (window_Bn + 1) * M <= np.asarray(start)[:, None] + T
    # As for the pooled sums; the norm divides by about 0.3.
    np.testing.assert_allclose(got_BnK[whole_Bn], want_BnK[whole_Bn], atol=2e-5)


@pytest.mark.parametrize(
    ("M", "overlap", "R", "windows"), [(4, 2, 13, (0, -1, 5)), (16, 1, 24, (-2, 0, 7))]
)
def test_a_step_makes_the_entries_of_plain_maths(
    M: int, overlap: int, R: int, windows: tuple[int, ...]
) -> None:
    """Rings that wrap amid a window; rows that want no entry."""
    draw, K = np.random.default_rng(R).standard_normal, 128
    C = overlap * K
    scale_K, table, static = finishing(K, 1, 3)
    ring_LBRC, bias_MC = jnp.asarray(draw((2, 3, R, 2 * C)), F32), jnp.asarray(draw((M, C)), F32)
    args = ring_LBRC, jnp.int32(1), jnp.asarray(windows, jnp.int32), bias_MC, scale_K, table
    run = functools.partial(gpu.decode, overlap=overlap, **static)
    with interpreted():
        got_B1K = np.asarray(jax.jit(run)(*args))
    np.testing.assert_allclose(
        got_B1K, reference.decode(*args, overlap=overlap, **static), atol=2e-5
    )


@pytest.mark.parametrize(
    ("M", "overlap", "K", "rounding"),
    [(128, 1, 512, "fp8"), (4, 2, 512, "fp8"), (4, 2, 128, "fp4")],
)
@pytest.mark.parametrize("step", [False, True])
def test_the_chain_compiles_for_h200(
    M: int, overlap: int, K: int, rounding: str, step: bool
) -> None:
    """Beside entries, only the first windows' tokens are copied, 4 MiB in float32 at most."""
    struct, C, B, T, i32 = jax.ShapeDtypeStruct, overlap * K, 8 if step else 1, 8192, jnp.int32
    n = 1 if step else T // M
    rest = struct((M, C), F32), struct((K,), BF16), (struct((B, n, 32), F32),) * 2
    static = {"overlap": overlap, "eps": 1e-6, "rounding": rounding, "dtype": BF16}
    if step:
        tokens = struct((20, B, overlap * M + 8, 2 * C), F32), struct((), i32), struct((B,), i32)
    else:
        tokens = *(struct((B, X, 2 * C), F32) for X in (T, overlap * M)), struct((B,), i32)
    run = functools.partial(gpu.decode if step else gpu.prefill, **static)
    program = lowered("h200", run, *tokens, *rest)
    assert "mosaic_gpu" in program.as_text()
    pooled = 4 * B * n * K
    assert temporaries(program.compile()) <= 4 * pooled + 4 * 2**20


@pytest.mark.parametrize(
    ("M", "K", "dtype", "what"),
    [
        (4, 64, F32, "multiple of 128"),
        (256, 128, F32, "128 tokens"),
        (4, 128, jnp.float16, "float16"),
    ],
)
def test_what_it_does_not_take_is_refused(M: int, K: int, dtype: Any, what: str) -> None:
    with pytest.raises(Unsupported, match=what):
        gpu.pool(*inputs(1, 1, M, K, 1, dtype), overlap=1)
