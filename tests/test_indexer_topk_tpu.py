"""The TPU kernel makes the reference's choice, and compiles for real chips at full size.

Axis letters: B batch, T queries, I index heads, J index head dim, S entries, k entries chosen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import indexer_topk, targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.indexer_topk import Fp4Keys, Fp8Keys, reference, to_fp4
from pallas_kernels.indexer_topk.shapes import SHAPES
from pallas_kernels.paged import Paged
from tests.kernels import interpreted
from tests.test_indexer_topk import case_of, hard_rows, oracle, whole_numbers

TPUS = tuple(targets.TPU_TOPOLOGIES)
SELECT = functools.partial(indexer_topk.select, impl="tpu")


# An interpreted program runs once or twice: most of its time goes into compiling it.
QUICK = {"xla_backend_optimization_level": 0}
INTERPRETED = jax.jit(SELECT, static_argnames="k", compiler_options=QUICK)


def select(*args: Any, k: int) -> np.ndarray:
    """The kernel's choice, every access checked."""
    with interpreted():
        return np.asarray(INTERPRETED(*args, k=k))


def arrays(*case: Any, visible: Any, layer: int = 1) -> list[Any]:
    return [jnp.asarray(x) for x in (*case, np.int32(layer), np.asarray(visible, np.int32))]


def test_hard_scores() -> None:
    rows = list(hard_rows(320).values())
    q_BTIJ, weights_BTI, keys_LBSJ = case_of(np.stack(rows))
    visible = 64, 65, 320
    repeated = [np.repeat(x, 3, axis=1) for x in (q_BTIJ, weights_BTI)]
    args = arrays(*repeated, keys_LBSJ, visible=np.tile(visible, (len(rows), 1)), layer=0)
    chosen_BTk = np.asarray(select(*args, k=64))
    for row, chosen_Tk in zip(rows, chosen_BTk, strict=True):
        expected = [oracle(row.astype(np.float32), n, 64) for n in visible]
        np.testing.assert_array_equal(chosen_Tk, expected)


def test_visible_counts_around_block_edges() -> None:
    visible = [0, 1, 127, 128, 129, 512, 513, 2048]
    case = case_of(np.tile(np.arange(2048), (8, 1)))
    chosen_BTk = np.asarray(select(*arrays(*case, visible=np.c_[visible], layer=0), k=128))
    expected = [oracle(np.arange(2048), n, 128) for n in visible]
    np.testing.assert_array_equal(chosen_BTk[:, 0], expected)


@pytest.mark.parametrize(
    ("T", "S", "k"),
    [
        (1, 700, 1),
        (2, 100, 128),  # k > S
        (10, 9000, 130),  # blocks of queries and of keys, the last of each partial
    ],
)
def test_the_choice_is_exact_and_ascending(T: int, S: int, k: int) -> None:
    visible_BT = np.random.default_rng(S).integers(0, S + 1, (2, T))
    visible_BT[1, -1] = S
    args = arrays(*whole_numbers(S, 2, T, 4, 8, S), visible=visible_BT)
    np.testing.assert_array_equal(select(*args, k=k), reference.select(*args, k=k))


@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 2**32 - 1), visible=st.lists(st.integers(0, 700), min_size=2, max_size=2)
)
def test_random_data_of_one_shape(seed: int, visible: list[int]) -> None:
    args = arrays(*whole_numbers(seed, 2, 1, 4, 8, 700), visible=np.c_[visible])
    np.testing.assert_array_equal(select(*args, k=1), reference.select(*args, k=1))


def test_invisible_entries_may_be_garbage() -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(5, 2, 10, 4, 8, 9000)
    visible_BT = np.tile([[90], [4200]], (1, 10)) - np.arange(10)
    poisoned_LBSJ = keys_LBSJ.copy()
    poisoned_LBSJ[0] = np.nan
    poisoned_LBSJ[1, 0, 90:] = np.inf
    poisoned_LBSJ[1, 1, 4200:] = np.nan
    poisoned, clean = [
        select(*arrays(q_BTIJ, weights_BTI, keys, visible=visible_BT), k=130)
        for keys in (poisoned_LBSJ, keys_LBSJ)
    ]
    np.testing.assert_array_equal(poisoned, clean)


def narrow(name: str, keys_LBSJ: Any, per_page: int = 128) -> Any:
    """Keys in a format; integers up to 3 and powers of two are exact in every one."""
    L, B, S, J = keys_LBSJ.shape
    rng = np.random.default_rng(0)
    codes_LBSJ = jnp.asarray(keys_LBSJ, jnp.float8_e4m3fn)
    scale_LBGE = jnp.asarray(2.0 ** rng.integers(-3, 4, (L, B, -(-S // 128), 128)), jnp.float32)
    match name:
        case "bfloat16":
            return jnp.asarray(keys_LBSJ, jnp.bfloat16)
        case "fp8, float32 scales":
            return Fp8Keys(codes_LBSJ, scale_LBGE)
        case "fp8, E8M0 scales":
            return Fp8Keys(codes_LBSJ, scale_LBGE.astype(jnp.float8_e8m0fnu))
        case "fp4":
            return to_fp4(jnp.asarray(keys_LBSJ))
        case _:
            order_BM = rng.permutation(B * (S // per_page)).reshape(B, -1).astype(np.int32)
            pages_LPNJ = np.zeros((L, B * (S // per_page), per_page, J), np.float32)
            pages_LPNJ[:, order_BM.reshape(-1)] = keys_LBSJ.reshape(L, -1, per_page, J)
            return Paged(jnp.asarray(pages_LPNJ, jnp.bfloat16), jnp.asarray(order_BM))


@pytest.mark.parametrize(
    ("name", "q_dtype"),
    [
        ("bfloat16", jnp.bfloat16),
        ("bfloat16", jnp.float8_e4m3fn),
        ("fp8, float32 scales", jnp.bfloat16),
        ("fp8, E8M0 scales", jnp.float8_e4m3fn),
        ("fp4", jnp.bfloat16),
    ],
)
def test_key_formats(name: str, q_dtype: Any) -> None:
    shape = SHAPES["flash"].divided(8)
    dim = 64 if name == "fp4" else shape.head_dim
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(4, 2, 1, shape.heads, dim, 1100)
    args = arrays(q_BTIJ, weights_BTI, visible=[[1100], [700]])
    args = [args[0].astype(q_dtype), args[1], narrow(name, keys_LBSJ), *args[2:]]
    np.testing.assert_array_equal(select(*args, k=shape.k), reference.select(*args, k=shape.k))


@pytest.mark.parametrize("per_page", [128, 2048])
def test_paged_keys_equal_plain_ones(per_page: int) -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(4, 2, 2, 8, 16, 4096)
    args = arrays(q_BTIJ, weights_BTI, visible=[[4096, 3000], [7, 2050]])
    paged = narrow("pages", keys_LBSJ, per_page)
    chosen_BTk = select(args[0].astype(jnp.bfloat16), args[1], paged, *args[2:], k=64)
    args.insert(2, jnp.asarray(keys_LBSJ))
    expected = reference.select(*args, k=64)
    np.testing.assert_array_equal(chosen_BTk, expected)


def test_two_cores_do_not_race() -> None:
    args = arrays(*whole_numbers(3, 2, 1, 4, 8, 5000), visible=[[5000], [4500]])
    with interpreted(detect_races=True, num_cores_or_threads=2):
        program = jax.jit(SELECT, static_argnames="k", compiler_options=QUICK)
        chosen_BTk = program(*args, k=16)
        np.testing.assert_array_equal(chosen_BTk, reference.select(*args, k=16))


def full_size(
    name: str, B: int, T: int, keys: Any = None, S: int = 262144
) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape, struct = SHAPES[name], jax.ShapeDtypeStruct
    if keys is None:
        keys = struct((2, B, S, shape.head_dim), jnp.bfloat16)
    fp8 = isinstance(keys, Fp8Keys)
    return (
        struct((B, T, shape.heads, shape.head_dim), jnp.float8_e4m3fn if fp8 else jnp.bfloat16),
        struct((B, T, shape.heads), jnp.float32),
        keys,
        struct((), jnp.int32),
        struct((B, T), jnp.int32),
    )


def compiled(target: Any, k: int, structs: Any) -> jax.stages.Compiled:
    """The public function's program, which must have chosen the kernel."""
    program = targets.compiled(target, functools.partial(indexer_topk.select, k=k), *structs)
    text = program.as_text()
    assert text is not None
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    return program


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_million_tokens_of_context_need_few_temporaries(name: str, target: Any) -> None:
    k = SHAPES[name].k
    assert targets.temporaries(compiled(target, k, full_size(name, 8, 1))) <= 4 * 2**20
    assert targets.temporaries(compiled(target, k, full_size(name, 1, 4096))) <= 80 * 2**20


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("name", ["fp8", "fp4"])
def test_quantised_keys_compile_without_copies(name: str, target: Any) -> None:
    struct, e8m0 = jax.ShapeDtypeStruct, jnp.float8_e8m0fnu
    if name == "fp8":
        codes = struct((2, 8, 262144, 128), jnp.float8_e4m3fn)
        keys = Fp8Keys(codes, struct((2, 8, 2048, 128), e8m0))
    else:
        codes = struct((2, 8, 64, 262144), jnp.uint8)
        keys = Fp4Keys(codes, struct((2, 8, 2048, 512), e8m0))
    assert targets.temporaries(compiled(target, 512, full_size("flash", 8, 1, keys))) <= 4 * 2**20


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TPUS)
def test_paged_keys_compile_without_copies(target: Any) -> None:
    struct, pages = jax.ShapeDtypeStruct, 8 * 262144 // 128
    keys = Paged(struct((2, pages, 128, 128), jnp.bfloat16), struct((8, 2048), jnp.int32))
    assert targets.temporaries(compiled(target, 512, full_size("flash", 8, 2, keys))) <= 4 * 2**20


def test_unsupported_pages_are_refused_or_left_to_xla() -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(0, 1, 1, 1, 8, 96)
    args = arrays(q_BTIJ, weights_BTI, visible=[[96]])
    pages = jnp.asarray(keys_LBSJ).reshape(2, 2, 48, 8)
    args.insert(2, Paged(pages, jnp.asarray([[0, 1]])))
    with pytest.raises(Unsupported, match="pages whose size divides 1024"):
        indexer_topk.select(*args, k=2, impl="tpu")
    np.testing.assert_array_equal(
        indexer_topk.select(*args, k=2), indexer_topk.select(*args, k=2, impl="reference")
    )


@pytest.mark.parametrize(
    ("dtype", "dim", "capacity", "k", "match"),
    [
        (jnp.float16, 64, 8192, 8, "not 64 channels in float16"),
        (jnp.float32, 256, 8192, 8, "512 bytes each"),
        (jnp.bfloat16, 64, 8192, 5000, "k up to 4096"),
        (jnp.bfloat16, 64, 2**21 + 1, 8, "pools of up to 2097152 entries"),
    ],
)
def test_what_would_not_compile_is_refused_at_once(
    dtype: Any, dim: int, capacity: int, k: int, match: str
) -> None:
    struct = jax.ShapeDtypeStruct
    args = struct((1, 1, 4, dim), dtype), struct((1, 1, 4), jnp.float32)
    args += struct((1, 1, capacity, dim), dtype), struct((), jnp.int32), struct((1, 1), jnp.int32)
    with pytest.raises(Unsupported, match=match):
        jax.eval_shape(functools.partial(SELECT, k=k), *args)
