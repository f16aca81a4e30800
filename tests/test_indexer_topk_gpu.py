"""The indexer's choice on NVIDIA GPUs: equal to the reference when interpreted, compiled for H200.

Axis letters: B batch, T queries, I index heads, J index head dim, S entries, k entries chosen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.byte_rows import FP4
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import gpu, gpu_scores, reference
from pallas_kernels.indexer_topk.keys import Fp8Keys, Keys, to_fp8
from pallas_kernels.indexer_topk.shapes import SHAPES
from pallas_kernels.paged import Paged
from pallas_kernels.targets import lowered, temporaries
from tests.gpu_kernels import interpreted
from tests.test_indexer_topk import case_of, hard_rows

BF16, I32 = jnp.bfloat16, jnp.int32


def whole_numbers(seed: int, *shape: int) -> jax.Array:
    """Integers: sums of their products are exact in float32 in any order, and full of ties."""
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), BF16)


def check(arrays: tuple[Any, ...], visible_BT: Any, k: int, run: Any = None) -> None:
    """Assert that the choice in layer 1 is the reference's."""
    select = run or jax.jit(functools.partial(gpu.select, k=k))
    args: Any = (*arrays, jnp.int32(1), jnp.asarray(visible_BT, I32))
    with interpreted():
        actual_BTk = np.asarray(select(*args))
    np.testing.assert_array_equal(actual_BTk, reference.select(*args, k=k))


def keys_of(kind: str, B: int, S: int, J: int) -> Keys:
    keys_LBSJ = whole_numbers(2, 2, B, S, J)
    match kind:
        case "fp8":
            return to_fp8(keys_LBSJ)
        case "fp8, float32 scales":
            keys = to_fp8(keys_LBSJ)
            return Fp8Keys(keys.codes, keys.scale.astype(jnp.float32) * 3)
        case "pages" | "pages, fp4":
            pages = B * S // 64 + 3
            table = np.random.default_rng(4).permutation(pages)[: B * S // 64].reshape(B, -1)
            keys, table = whole_numbers(2, 2, pages, 64, J), jnp.asarray(table, I32)
            return Paged(keys, table) if kind == "pages" else Paged(FP4.encode(keys), table, FP4)
    return keys_LBSJ


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "fp8, float32 scales", "pages", "pages, fp4"])
def test_several_chunks_of_keys_of_every_format(kind: str) -> None:
    """Two chunks, the last tile reaching back except over pages; few heads."""
    S = 1152 if "pages" in kind else 1112
    arrays = whole_numbers(0, 2, 1, 8, 128), whole_numbers(1, 2, 1, 8), keys_of(kind, 2, S, 128)
    check(arrays, [[S], [1000]], 40)


def test_queries_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three queries at a time, the last batch padded."""
    monkeypatch.setattr(gpu, "_LIST_BYTES", 2 * 8 * 128)
    arrays = (
        whole_numbers(0, 1, 3, 4, 64),
        whole_numbers(1, 1, 3, 4),
        whole_numbers(2, 2, 1, 96, 64),
    )
    check(arrays, [[0, 70, 96]], 16)


# The interpreter multiplies with NumPy, which warns about infinity times zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_hard_scores_and_visible_counts_around_block_edges() -> None:
    """Each row's scores are its keys, rounded to bfloat16; the other channels are 0."""
    rows = np.stack(list(hard_rows(320).values()))
    q_BTIJ, weights_BTI, keys_LBSJ = (jnp.asarray(x, BF16) for x in case_of(rows))
    pad = ((0, 0), (0, 0), (0, 0), (0, 63))
    keys_LBSJ = jnp.tile(jnp.pad(keys_LBSJ, pad), (2, 1, 1, 1))
    arrays = jnp.pad(q_BTIJ, pad), weights_BTI, keys_LBSJ
    run = jax.jit(functools.partial(gpu.select, k=64))
    check(arrays, [[320]] * len(rows), 64, run)
    edges = [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 320]
    check(arrays, np.array(edges)[:, None], 64, run)


@pytest.mark.parametrize("k", [1, 700])
def test_k_of_one_and_k_above_the_number_of_entries(k: int) -> None:
    arrays = (
        whole_numbers(0, 1, 1, 4, 64),
        whole_numbers(1, 1, 1, 4),
        whole_numbers(2, 2, 1, 96, 64),
    )
    check(arrays, [[90]], k)


def test_merging_is_a_tournament_in_rounds() -> None:
    """70 lists of 128 make two groups, then one; ties keep the order of entries."""
    rng = np.random.default_rng(0)
    key_HK = rng.integers(-9, 9, (70, 128)).astype(np.int32)
    entry_HK = np.arange(key_HK.size, dtype=np.int32).reshape(key_HK.shape)
    missing_HK = rng.random(key_HK.shape) < 0.3
    key_HK, entry_HK = np.where(missing_HK, -(2**31), key_HK), np.where(missing_HK, -1, entry_HK)
    with interpreted():
        merged = jax.jit(functools.partial(gpu._merged, k=100))(entry_HK[None], key_HK[None])
    best = np.argsort(-key_HK.ravel().astype(np.int64), kind="stable")[:100]
    np.testing.assert_array_equal(merged[0, :100], np.sort(entry_HK.ravel()[best]))
    assert np.all(np.asarray(merged)[0, 100:] == -1)


def test_exponents_are_powers_of_two() -> None:
    codes = np.arange(255, dtype=np.uint8)  # 255 is NaN
    expected = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e8m0fnu).astype(
        jnp.float32
    )
    np.testing.assert_array_equal(gpu_scores._power_of_two(jnp.asarray(codes)), expected)


def structs(name: str, kind: str, B: int, T: int, S: int) -> tuple[Any, ...]:
    """A stack of two layers at full size."""
    shape, struct = SHAPES[name], jax.ShapeDtypeStruct
    I, J = shape.heads, shape.head_dim
    keys: Any = struct((2, B, S, J), BF16)
    if kind == "fp8":
        codes = struct(keys.shape, jnp.float8_e4m3fn)
        keys = Fp8Keys(codes, struct((2, B, -(-S // 128), 128), jnp.float8_e8m0fnu))
    if "pages" in kind:
        codec, dtype = (None, BF16) if kind == "pages" else (FP4, jnp.uint8)
        keys = Paged(struct((2, B * S // 64, 64, J), dtype), struct((B, S // 64), I32), codec)
    return (
        struct((B, T, I, J), BF16),
        struct((B, T, I), BF16),
        keys,
        struct((), I32),
        struct((B, T), I32),
    )


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("name", "kind", "B", "T", "S", "MiB"),
    [
        # Lists of 32 chunks, the gathered candidates, the lists of the next round.
        ("flash", "bfloat16", 8, 1, 2**18, 2),
        ("pro", "fp8", 8, 1, 2**18, 4),
        ("pro", "pages", 8, 1, 2**13, 1),
        ("flash", "pages, fp4", 8, 1, 2**13, 1),
        # 16 MiB of lists at a time.
        ("flash", "bfloat16", 1, 4096, 2**18, 24),
    ],
)
def test_full_size_compiles_for_h200(
    name: str, kind: str, B: int, T: int, S: int, MiB: int
) -> None:
    """A million tokens, except for pages, whose lists are merged in the same way."""
    args = structs(name, kind, B, T, S)
    program = lowered("h200", functools.partial(gpu.select, k=SHAPES[name].k), *args)
    assert "mosaic_gpu" in program.as_text()
    # The scores of all the prompt's queries would take 4 GiB.
    assert temporaries(program.compile()) <= MiB * 2**20


@pytest.mark.parametrize(
    ("dtype", "I", "J", "S", "k", "match"),
    [
        (jnp.float32, 8, 64, 128, 1, "bfloat16"),
        (BF16, 129, 64, 128, 1, "up to 128 heads"),
        (BF16, 8, 32, 128, 1, "dim 64 or 128"),
        (BF16, 8, 64, 129, 1, "multiple of 8"),
        (BF16, 8, 64, 56, 1, "at least 64"),
        (BF16, 8, 64, 128, 4097, "up to 4096"),
    ],
)
def test_unsupported_arguments_are_refused(
    dtype: Any, I: int, J: int, S: int, k: int, match: str
) -> None:
    arrays: Any = [jnp.zeros(dims, dtype) for dims in ((1, 1, I, J), (1, 1, I), (1, 1, S, J))]
    arrays += jnp.int32(0), jnp.zeros((1, 1), I32)
    with pytest.raises(Unsupported, match=match):
        gpu.select(*arrays, k=k)
