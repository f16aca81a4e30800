"""GPU kernels of attention to listed entries: interpreted against the reference, and compiled.

Axis letters: as in test_sparse_attention; Z parts of a list.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import targets
from pallas_kernels.implementations import Unsupported
from pallas_kernels.sparse_attention import gpu, gpu_gather, reference, rows
from pallas_kernels.sparse_attention.gpu_attend import HEADS
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.shapes import SHAPES
from tests import gpu_kernels
from tests.kernels import by_name
from tests.test_sparse_attention import decode_inputs, poison, prefill_inputs

SCALE = 0.1
# Weights and results are bfloat16 (8 bits), weights relative to a different maximum than the
# reference's: each of up to a hundred values of size 1 to 4 differs by at most an ulp.
CLOSE: Any = {"rtol": 2e-2, "atol": 2e-2}
Inputs = dict[str, Any]


def narrow(inputs: Inputs, H: int, K: int) -> Inputs:
    """The same lists and masks, with bfloat16 arrays of other sizes."""
    rng = np.random.default_rng(0)

    def resized(name: str, x: Any) -> Any:
        if name == "sink_H":
            return jnp.asarray(rng.normal(size=H), jnp.float32)
        if name not in ("q_BTHK", "window_BRK", "window_BXK", "pool_LBSK"):
            return jnp.asarray(x)
        shape = (*x.shape[:2], H, K) if name == "q_BTHK" else (*x.shape[:-1], K)
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    return {name: resized(name, x) for name, x in inputs.items()}


def both(name: str, inputs: Inputs, **static: Any) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of the kernel and of the reference."""
    record = {"decode": DecodeInputs, "prefill": PrefillInputs}[name]
    form = lambda module: by_name(getattr(module, name), record)
    run = lambda module: functools.partial(form(module), scale=SCALE, **static)
    with gpu_kernels.interpreted():
        actual_BTHK = jax.block_until_ready(jax.jit(run(gpu))(**inputs))
    expected_BTHK = run(reference)(**inputs)
    assert actual_BTHK.dtype == expected_BTHK.dtype == jnp.bfloat16
    return np.asarray(actual_BTHK, np.float32), np.asarray(expected_BTHK, np.float32)


def test_decode_in_parts_with_fp8_entries_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two parts, one of them with chunks of both the window and the entries."""
    monkeypatch.setattr(gpu, "_MULTIPROCESSORS", 2)
    inputs = narrow(decode_inputs(1, 1, 20, 50, 70), HEADS, rows.CHANNELS)
    inputs["pool_LBSK"] = rows.encode(inputs["pool_LBSK"])
    np.testing.assert_allclose(*both("decode", inputs), **CLOSE)


def test_prefill_equals_the_reference_and_ignores_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unlisted rows are NaN, among them row 0, which -1 must not read."""
    monkeypatch.setattr(gpu, "_MULTIPROCESSORS", 1)
    inputs = prefill_inputs((3,), 2, 8, 50, 70)
    inputs["indices_BTk"] = np.where(inputs["indices_BTk"] == 0, -1, inputs["indices_BTk"])
    inputs = {name: np.array(x) for name, x in narrow(inputs, HEADS, 256).items()}
    window_BX = np.arange(10)[None, None] >= 5
    poisoned = poison(inputs, "window_BXK", np.broadcast_to(window_BX, (1, 2, 10)), np.nan)
    actual_BTHK, expected_BTHK = both("prefill", jax.tree.map(jnp.asarray, poisoned), window=8)
    assert np.isfinite(actual_BTHK).all()
    np.testing.assert_allclose(actual_BTHK, expected_BTHK, **CLOSE)


def test_codes_decode_to_the_numbers_they_represent() -> None:
    code = np.arange(256, dtype=np.uint8)
    expected = np.asarray(jax.lax.bitcast_convert_type(code, jnp.float8_e4m3fn), np.float32)
    actual = np.asarray(gpu_gather.e4m3(jnp.asarray(code, jnp.int32)))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[finite], expected[finite])


def test_parts_that_see_nothing_do_not_contribute() -> None:
    rng = np.random.default_rng(0)
    value_BTZHK = rng.normal(size=(1, 2, 3, 4, 5)).astype(np.float32)
    lse_BTZH = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    lse_BTZH[0, 0, 1], lse_BTZH[0, 1] = -np.inf, -np.inf
    actual_BTHK = np.asarray(gpu.joined(jnp.asarray(value_BTZHK), jnp.asarray(lse_BTZH)))
    weight_ZH1 = np.exp(lse_BTZH[0, 0])[..., None]
    expected_HK = np.sum(value_BTZHK[0, 0] * weight_ZH1, axis=0) / np.sum(weight_ZH1, axis=0)
    np.testing.assert_allclose(actual_BTHK[0, 0], expected_HK, rtol=1e-5)
    np.testing.assert_array_equal(actual_BTHK[0, 1], 0)


@pytest.mark.parametrize("blocks", [1, 8, 16, 131, 132, 4096])
@pytest.mark.parametrize("chunks", [1, 20, 36])
def test_parts_fill_the_gpu_at_most_once_and_none_is_empty(chunks: int, blocks: int) -> None:
    parts = gpu.parts_of(chunks, blocks)
    size = -(-chunks // parts)
    assert parts == 1 or parts * blocks <= 132
    assert (parts - 1) * size < chunks <= parts * size


STRUCT = jax.ShapeDtypeStruct
ENTRIES = 65536


def pool_struct(B: int, fp8: bool) -> Any:
    if fp8:
        return rows.Fp8Rows(STRUCT((21, B, ENTRIES, rows.WIDTH), jnp.uint8))
    return STRUCT((21, B, ENTRIES, 512), jnp.bfloat16)


def check_program(run: Any, inputs: DecodeInputs | PrefillInputs, limit: int) -> None:
    lowered = targets.lowered("h200", run, inputs)
    assert "mosaic_gpu" in lowered.as_text()
    assert targets.temporaries(lowered.compile()) <= limit


@pytest.mark.full_compilation
@pytest.mark.parametrize(("name", "fp8"), [("flash", False), ("flash", True), ("pro", False)])
def test_decode_compiles_for_the_h200(name: str, fp8: bool) -> None:
    """Temporaries are the parts: at most a float32 row for each head of each multiprocessor."""
    shape, B, spare = SHAPES[name], 8, 8
    R, H, K = shape.window + spare, shape.heads, shape.head_dim
    structs = [
        STRUCT((B, 1, H, K), jnp.bfloat16),
        STRUCT((B, R, K), jnp.bfloat16),
        STRUCT((B, 1, R), jnp.bool_),
        pool_struct(B, fp8),
        STRUCT((), jnp.int32),
        STRUCT((B, 1, shape.k), jnp.int32),
        STRUCT((H,), jnp.float32),
    ]
    run = functools.partial(gpu.decode, scale=SCALE)
    check_program(run, DecodeInputs(*structs), 132 * HEADS * K * 4 + 2**18)


@pytest.mark.full_compilation
@pytest.mark.parametrize(("name", "fp8"), [("flash", False), ("pro", False), ("pro", True)])
def test_prefill_compiles_for_the_h200(name: str, fp8: bool) -> None:
    """Temporaries are the lists: the queries alone take 256 MiB or more."""
    shape, T = SHAPES[name], 4096
    H, K = shape.heads, shape.head_dim
    structs = [
        STRUCT((1, T, H, K), jnp.bfloat16),
        STRUCT((1, shape.window + T, K), jnp.bfloat16),
        STRUCT((1,), jnp.int32),
        pool_struct(1, fp8),
        STRUCT((), jnp.int32),
        STRUCT((1, T, shape.k), jnp.int32),
        STRUCT((H,), jnp.float32),
    ]
    run = functools.partial(gpu.prefill, window=shape.window, scale=SCALE)
    check_program(run, PrefillInputs(*structs), 32 * 2**20)


@pytest.mark.parametrize(("H", "K", "dtype"), [(8, 512, "bfloat16"), (64, 576, "bfloat16")])
def test_unsupported_sizes_are_rejected(H: int, K: int, dtype: str) -> None:
    inputs = narrow(decode_inputs(1, 1, 4, 5, 3), H, K)
    with pytest.raises(Unsupported, match=f"heads in multiples of {HEADS}"):
        gpu.decode(DecodeInputs(**inputs), scale=SCALE)


def test_float32_is_rejected() -> None:
    inputs = jax.tree.map(jnp.asarray, decode_inputs(1, 1, 4, 5, 3))
    with pytest.raises(Unsupported, match="bfloat16"):
        gpu.decode(DecodeInputs(**inputs), scale=SCALE)
