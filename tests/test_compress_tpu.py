"""Interpreted TPU kernels compute the reference's entries; full-size ones compile for real chips.

If one token of each window has all the weight, pooling is exact and all that follows is compared
bit for bit; otherwise sums over a window in another order differ by a few units in the last place
of float32 (CLOSE), which rounding to bfloat16 or fewer bits mostly hides.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compress, targets
from pallas_kernels.compress import reference, tpu_prefill
from pallas_kernels.compress.shapes import SHAPES, Shape
from pallas_kernels.implementations import Unsupported
from tests.kernels import interpreted
from tests.test_compress import CLOSE, chunk, complete, settings, steps, text

TPUS = tuple(targets.TPU_TOPOLOGIES)
# One block of channels or two, windows of both kinds, both roundings.
HCA = Shape(ratio=16, dim=256, overlap=1, rotated=64, rounding="fp8")
CSA = Shape(ratio=4, dim=256, overlap=2, rotated=64, rounding="fp8")
INDEX = Shape(ratio=4, dim=128, overlap=2, rotated=32, rounding="fp4")
SMALL = {"hca": HCA, "csa": CSA, "index": INDEX}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest blocks: sixteen windows each."""
    monkeypatch.setattr(tpu_prefill, "_BLOCK_BYTES", 1)


def one_dominates(text: dict[str, Any]) -> dict[str, Any]:
    """The text with integer tokens, of which one per window has all the weight."""
    rng = np.random.default_rng(3)
    kv_BTC, gate_BTC = np.split(np.asarray(text["rows"]), 2, axis=-1)
    gate_BTC = 1e4 * rng.permuted(
        np.broadcast_to(np.arange(gate_BTC.shape[1])[:, None], gate_BTC.shape), axis=1
    )
    rows_BTC = np.concatenate([np.round(8 * kv_BTC), gate_BTC], axis=-1)
    return text | {"rows": jnp.asarray(rows_BTC, jnp.float32)}


def several_blocks(shape: Shape, exact: bool, dtype: Any, rounding: str) -> list[tuple[Any, Any]]:
    """Two rows' complete entries from the kernel and from the reference."""
    start_B, T = [0, shape.ratio + 3], 18 * shape.ratio + 6
    inputs = text(shape, 2, T + max(start_B), dtype)
    args = chunk(shape, one_dominates(inputs) if exact else inputs, start_B, T, poison=np.nan)
    static = settings(shape, dtype, rounding)
    with interpreted():
        run = jax.jit(functools.partial(compress.prefill, impl="tpu", **static))
        got_BnK = np.asarray(run(*args), np.float32)
    # Not jitted: in one program XLA omits intermediate roundings to bfloat16.
    expected_BnK = np.asarray(reference.prefill(*args, **static), np.float32)
    ends = [complete(shape, start, T) for start in start_B]
    return [(got_BnK[b, :n], expected_BnK[b, :n]) for b, n in enumerate(ends)]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("small_blocks")
def test_rounded_entries_of_a_chunk_equal_the_references(name: str) -> None:
    for got_nK, expected_nK in several_blocks(SMALL[name], True, jnp.bfloat16, ""):
        np.testing.assert_array_equal(got_nK, expected_nK)


@pytest.mark.parametrize("name", ["hca", "index"])
@pytest.mark.usefixtures("small_blocks")
def test_all_tokens_of_a_window_are_pooled(name: str) -> None:
    for got_nK, expected_nK in several_blocks(SMALL[name], False, jnp.float32, "none"):
        np.testing.assert_allclose(got_nK, expected_nK, **CLOSE)


@pytest.mark.parametrize("name", ["hca", "csa"])
def test_steps_from_a_ring_that_wraps(name: str) -> None:
    shape, window_B = SMALL[name], [0, 1, -1, 2, 7]
    inputs = text(shape, len(window_B), 8 * shape.ratio, jnp.bfloat16)
    args, static = steps(shape, one_dominates(inputs), window_B), settings(shape, jnp.bfloat16)
    with interpreted():
        run = jax.jit(functools.partial(compress.decode, impl="tpu", **static))
        got_B1K = np.asarray(run(*args), np.float32)
    expected_B1K = np.asarray(reference.decode(*args, **static), np.float32)
    np.testing.assert_array_equal(got_B1K, expected_B1K)


@pytest.mark.usefixtures("small_blocks")
def test_two_cores_do_not_race() -> None:
    inputs, static = text(INDEX, 1, 72), settings(INDEX, rounding="none")
    prompt, step = chunk(INDEX, inputs, [3], 68), steps(INDEX, inputs, [5])
    with interpreted(detect_races=True, num_cores_or_threads=2):
        for run, args in ((compress.prefill, prompt), (compress.decode, step)):
            jax.block_until_ready(jax.jit(functools.partial(run, impl="tpu", **static))(*args))


def full_size(shape: Shape, B: int, T: int) -> tuple[Any, ...]:
    """Arguments for a chunk of T tokens, or for a decode step if T is 1."""
    struct, f32, n = jax.ShapeDtypeStruct, jnp.float32, -(-T // shape.ratio)
    wide = 2 * shape.channels
    tokens = [struct((B, T, wide), f32), struct((B, shape.overlap * shape.ratio, wide), f32)]
    if T == 1:
        tokens = [struct((20, B, shape.ring, wide), f32), struct((), jnp.int32)]
    weights = struct((shape.ratio, shape.channels), f32), struct((shape.dim,), jnp.bfloat16)
    table = (struct((B, n, shape.rotated // 2), f32),) * 2
    return (*tokens, struct((B,), jnp.int32), *weights, table)


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("name", ["flash hca", "flash csa", "flash index"])
def test_full_size_compiles_without_copies_of_tokens(name: str, target: Any) -> None:
    shape = SHAPES[name]
    assert shape == SHAPES[name.replace("flash", "pro")]
    static = settings(shape, jnp.bfloat16)
    for run, B, T in ((compress.prefill, 1, 8192), (compress.decode, 8, 1)):
        structs = full_size(shape, B, T)
        program = targets.compiled(target, functools.partial(run, **static), *structs)
        assert (program.as_text() or "").count('custom_call_target="tpu_custom_call"') == 1
        assert targets.temporaries(program) <= 2**20


def test_unsupported_shapes_are_rejected_or_left_to_xla() -> None:
    shape = SHAPES["bench index"]
    args = chunk(shape, text(shape, 1, 16), [0], 16)
    with pytest.raises(Unsupported, match=r"multiple of 128 channels .* not 64"):
        compress.prefill(*args, impl="tpu", **settings(shape))
    assert compress.prefill(*args, **settings(shape)).shape == (1, 4, 64)
