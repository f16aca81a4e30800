"""What other implementations of these ops waste device memory on, and how little ours take.

Each test is named after one such mistake. At a size that compiles quickly it computes the bytes
that the mistake takes, and asks the compilers for TPUs (v5p, which hides none in VMEM) and GPUs how
many our programs take. Where that is quick too, a program that makes the mistake shows that the
test would detect it.

Axis letters: as in the packages.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from benchmarks.kernel_cases import cases
from pallas_kernels import (
    dense_attention,
    grouped_matmul,
    hyper,
    indexer_topk,
    quantize,
    sparse_attention,
)
from pallas_kernels.dense_attention import inputs as dense
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.quantize import Fp4Weight, Fp8Weight
from pallas_kernels.sparse_attention import inputs as sparse
from pallas_kernels.targets import Target, compiled, temporaries
from tests.kernels import in_order

pytestmark = pytest.mark.full_compilation

CHIPS: tuple[Target, ...] = ("v5p", "h200")
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
E4M3, E8M0 = jnp.float8_e4m3fn, jnp.float8_e8m0fnu
MIB = 2**20
S = jax.ShapeDtypeStruct


def temporary_bytes(chip: Target, run: Callable[..., Any], *structs: Any) -> int:
    return temporaries(compiled(chip, run, *structs))


# The indexer: 64 heads of 128, 512 entries chosen.
DECODE, PROMPT = (8, 1, 65536), (1, 256, 65536)  # B, T, S


def index_structs(B: int, T: int, entries: int) -> tuple[Any, ...]:
    q_BTIJ, keys_LBSJ = S((B, T, 64, 128), BF16), S((2, B, entries, 128), BF16)
    return q_BTIJ, S((B, T, 64), F32), keys_LBSJ, S((), I32), S((B, T), I32)


@functools.cache
def select(chip: Target, sizes: tuple[int, int, int]) -> jax.stages.Compiled:
    run = functools.partial(indexer_topk.select, k=512)
    return compiled(chip, run, *index_structs(*sizes))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("sizes", [DECODE, PROMPT])
def test_scores_in_device_memory(chip: Target, sizes: Any) -> None:
    """A score per query and entry, on GPUs also per head. Ours need lists at most."""
    B, T, entries = sizes
    scores = 4 * B * T * entries
    assert temporaries(select(chip, sizes)) <= scores / 2


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("sizes", [DECODE, PROMPT])
def test_sorts_of_all_scores(chip: Target, sizes: Any) -> None:
    assert " sort(" not in str(select(chip, sizes).as_text())


@pytest.mark.parametrize("sizes", [DECODE, PROMPT])
def test_lists_padded_to_a_lane_per_index(sizes: Any) -> None:
    """[k, 1] arrays take 128 times their bytes on TPUs."""
    B, T, _ = sizes
    analysis = select("v5p", sizes).memory_analysis()
    assert analysis is not None
    assert analysis.output_size_in_bytes <= 4 * B * T * 512 + 4096


def test_queries_transposed() -> None:
    """Heads and queries are swapped in a copy of all queries."""
    queries = 2 * 256 * 64 * 128
    assert temporaries(select("v5p", PROMPT)) <= queries / 4


# Attention: 64 heads of 512, a window of 128 tokens, 8192 entries.
H, K, R, ENTRIES = 64, 512, 128, 8192


def decode_structs(B: int) -> tuple[Any, ...]:
    window = S((B, R, K), BF16), S((B, 1, R), jnp.bool_)
    return S((B, 1, H, K), BF16), *window, S((2, B, ENTRIES, K), BF16), S((), I32)


def prompt_structs(T: int) -> tuple[Any, ...]:
    window = S((1, R + T, K), BF16), S((1,), I32)
    return S((1, T, H, K), BF16), *window, S((2, 1, ENTRIES, K), BF16), S((), I32)


SINK = S((H,), F32)


@pytest.mark.parametrize("chip", CHIPS)
def test_window_and_entries_concatenated_before_attention(chip: Target) -> None:
    B = 8
    joined = 2 * B * (R + ENTRIES) * K

    def join(
        q_BTHK: Any, window_BRK: Any, mask_BTR: Any, pool_LBSK: Any, layer: Any, visible_BT: Any
    ) -> Any:
        keys_BXK = jnp.concatenate([window_BRK, pool_LBSK[layer]], axis=1)
        logits_BTHX = jnp.einsum("bthk,bxk->bthx", q_BTHK, keys_BXK).astype(F32)
        there_BTS = jnp.arange(ENTRIES)[None, None] < visible_BT[..., None]
        seen_BTX = jnp.concatenate([mask_BTR, there_BTS], axis=-1)
        weights_BTHX = jax.nn.softmax(logits_BTHX, where=seen_BTX[:, :, None])
        return jnp.einsum("bthx,bxk->bthk", weights_BTHX.astype(BF16), keys_BXK)

    structs, visible_BT = decode_structs(B), S((B, 1), I32)
    assert temporary_bytes(chip, join, *structs, visible_BT) >= joined
    op = in_order(dense_attention.decode, dense.DecodeInputs)
    ours = functools.partial(op, scale=1.0)
    assert temporary_bytes(chip, ours, *structs, visible_BT, SINK) <= joined / 16


@pytest.mark.parametrize("chip", CHIPS)
def test_logits_of_a_prompt_for_all_entries(chip: Target) -> None:
    T = 256
    logits = 4 * T * H * (R + ENTRIES)
    op = in_order(dense_attention.prefill, dense.PrefillInputs)
    run = functools.partial(op, window=R, scale=1.0)
    # On GPUs about a copy of the queries.
    assert temporary_bytes(chip, run, *prompt_structs(T), S((1, T), I32), SINK) <= logits / 8


@pytest.mark.parametrize("chip", CHIPS)
def test_the_chosen_entries_of_a_prompt_gathered(chip: Target) -> None:
    T, k = 256, 512
    gathered = 2 * T * k * K
    op = in_order(sparse_attention.prefill, sparse.PrefillInputs)
    run = functools.partial(op, window=R, scale=1.0)
    assert temporary_bytes(chip, run, *prompt_structs(T), S((1, T, k), I32), SINK) <= gathered / 8


def test_all_entries_copied_to_another_layout_to_read_rows() -> None:
    B = 8
    layer = 2 * B * ENTRIES * K
    op = in_order(sparse_attention.decode, sparse.DecodeInputs)
    run = functools.partial(op, scale=1.0)
    assert temporary_bytes("v5p", run, *decode_structs(B), S((B, 1, 512), I32), SINK) <= layer / 16


def fp8(n: int, k: int, *stack: int) -> Fp8Weight:
    return Fp8Weight(S((*stack, k, n), E4M3), S((*stack, k // 128, n // 128), E8M0))


def fp4(n: int, k: int, *stack: int) -> Fp4Weight:
    return Fp4Weight(S((*stack, k // 2, n), jnp.uint8), S((*stack, k // 32, n), E8M0))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("rows", [16, 1024])
def test_a_scale_for_every_weight_or_a_product_for_every_block(chip: Target, rows: int) -> None:
    """Four bytes per weight; or with many rows, N numbers for each row and block of K."""
    N, K = 8192, 4096
    mistake = min(4 * N * K, 4 * rows * N * K // 128)
    assert temporary_bytes(chip, quantize.linear, S((rows, K), BF16), fp8(N, K)) <= mistake / 4


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("rows", [16, 1024])
def test_four_bit_codes_unpacked_in_device_memory(chip: Target, rows: int) -> None:
    N, K = 8192, 4096
    assert temporary_bytes(chip, quantize.linear, S((rows, K), BF16), fp4(N, K)) <= N * K / 16


@pytest.mark.parametrize(
    ("chip", "fmt"),
    [("v5p", fp8), ("v5p", fp4), ("h200", fp8)],
    ids=["v5p, fp8", "v5p, fp4", "h200, fp8"],
)
def test_experts_cast_to_bfloat16_before_the_product(chip: Target, fmt: Any) -> None:
    """`lax.ragged_dot` of a cast stack; on GPUs it also multiplies every row by every expert.

    Other kernels pad the scales of blocks to eight rows, which takes as much again.
    """
    E, A, D, F, T = 16, 6, 1024, 512, 64

    def cast(x_PD: Any, codes_EDF: Any, rows_E: Any) -> Any:
        return jax.lax.ragged_dot(x_PD, codes_EDF.astype(BF16), rows_E)

    cast_bytes = 2 * E * D * F
    if fmt is fp8:
        codes_EDF = S((E, D, F), E4M3)
        assert (
            temporary_bytes(chip, cast, S((T * A, D), BF16), codes_EDF, S((E,), I32)) >= cast_bytes
        )
    weights = fmt(F, D, 1, E), fmt(F, D, 1, E), fmt(D, F, 1, E)
    op = in_order(grouped_matmul.expert_mlp, Inputs)
    run = functools.partial(op, limit=10.0, weight_first=True)
    tokens = S((T, D), BF16), S((T, A), I32), S((T, A), F32)
    # The sorted rows, in and out.
    rows = 2 * (T * A + 256) * (2 * D + F)
    assert (
        temporary_bytes(chip, run, *tokens, *weights, S((), I32)) <= rows + MIB < 3 * cast_bytes / 4
    )


def test_streams_copied_to_another_layout_for_their_mixes() -> None:
    T, N, D = 1024, 4, 4096
    streams = 2 * T * N * D
    settings: Any = {"streams": N, "steps": 20, "eps": 1e-6, "norm_eps": 1e-6}
    weights = S((24, N * D), F32), S((24,), F32), S((3,), F32)

    def separate(x_TND: Any, *weights: Any) -> Any:
        return hyper.pre(x_TND.reshape(1, T, N * D), *weights, **settings, impl="reference")

    assert temporary_bytes("v5p", separate, S((T, N, D), BF16), *weights) >= streams
    ours = functools.partial(hyper.pre, **settings)
    assert temporary_bytes("v5p", ours, S((1, T, N * D), BF16), *weights) <= streams / 64


@pytest.mark.parametrize(
    ("run", "structs"),
    [
        (functools.partial(indexer_topk.select, k=64), index_structs(1, 2, 16384)),
        (functools.partial(quantize.fake_quant_fp8, block=128), (S((512, 512), BF16),)),
        (quantize.linear, (S((8, 2048), BF16), fp8(2048, 2048))),
        (quantize.linear, (S((8, 2048), BF16), fp4(2048, 2048))),
    ],
    ids=["select", "fake_quant", "linear fp8", "linear fp4"],
)
def test_a_kernel_that_asks_which_chip_is_attached(run: Any, structs: Any) -> None:
    """Exported without a TPU; a floor division of traced numbers would ask."""
    text = export.export(jax.jit(run), platforms=["tpu"])(*structs).mlir_module()
    assert "tpu_custom_call" in text


# The first case of each op; for compress, the first whose entries overlap.
EXPORTED = {case.op: case for case in reversed(list(cases())) if "hca" not in case.name}


@pytest.mark.parametrize("op", EXPORTED)
def test_an_op_that_asks_which_chip_is_attached(op: str) -> None:
    case = EXPORTED[op]
    run = jax.jit(functools.partial(case.run, impl="tpu"))
    structs: Any = jax.eval_shape(case.inputs)
    assert "tpu_custom_call" in export.export(run, platforms=["tpu"])(*structs).mlir_module()


def test_a_gradient_that_asks_which_chip_is_attached() -> None:
    """Sparse attention uses the same kernel."""
    case = EXPORTED["dense_attention.prefill"]
    structs: Any = jax.eval_shape(case.inputs)
    pull = lambda *args: jax.vjp(lambda q: case.run(q, *args[1:], impl="tpu"), args[0])[1](args[0])
    text = export.export(jax.jit(pull), platforms=["tpu"])(*structs).mlir_module()
    assert "prefill_backward" in text
