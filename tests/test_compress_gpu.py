"""Pooling on NVIDIA GPUs: equal to plain maths where interpreted, compiled for H200.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compress
from pallas_kernels.compress import gpu
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
    np.testing.assert_allclose(got_BnK, compress.pool(*args, overlap=overlap), atol=4e-6)


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
