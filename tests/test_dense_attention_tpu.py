"""Dense attention's TPU kernels: interpreted against the sum over what is seen, and compiled.

Axis letters: as in the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention, targets
from pallas_kernels.dense_attention.shapes import SHAPES
from pallas_kernels.targets import Target
from tests.kernels import interpreted, races_found
from tests.test_dense_attention import CLOSE, SCALE, Decode, Prefill, decode_case, prefill_case

CHIPS: tuple[Target, ...] = ("v5p", "v6e", "tpu7x")


def run(case: Decode | Prefill, **interpreter: Any) -> np.ndarray:
    """The kernel on the case's arrays; with race detection, that there were none."""
    settings: dict[str, Any] = {"scale": SCALE, "impl": "tpu"}
    if isinstance(case, Prefill):
        settings["window"] = case.window
    door = dense_attention.prefill if isinstance(case, Prefill) else dense_attention.decode
    with interpreted(**interpreter):
        out = np.asarray(jax.jit(functools.partial(door, **settings))(**vars(case)))
        assert not interpreter.get("detect_races") or not races_found()
    return out


@pytest.mark.parametrize(("T", "R", "S"), [(1, 24, 0), (1, 24, 2100), (3, 40, 130)])
def test_decode_sees_what_it_should(T: int, R: int, S: int) -> None:
    case = decode_case(2, T, R, S, H=8, K=128)
    np.testing.assert_allclose(run(case), case.expected(), **CLOSE)


@pytest.mark.parametrize(
    ("starts", "T", "window", "S"),
    [
        ((3,), 9, 1, 0),
        ((0, 1000), 40, 16, 60),
        ((4000,), 300, 128, 1300),  # blocks of queries and of entries, the last of both partial
    ],
)
def test_prefill_sees_what_it_should(starts: tuple[int, ...], T: int, window: int, S: int) -> None:
    case = prefill_case(starts, T, window, S, H=8, K=128)
    np.testing.assert_allclose(run(case), case.expected(), **CLOSE)


def test_garbage_that_is_not_visible_does_not_matter() -> None:
    case = prefill_case((0,), 40, 16, 700, H=8, K=128)
    expected = case.expected()
    case.pool_LBSK[:, :, int(case.visible_BT.max()) :] = np.nan
    case.window_BXK[:, :16] = np.nan
    np.testing.assert_allclose(run(case), expected, **CLOSE)


def test_rows_that_see_nothing_give_0() -> None:
    case = decode_case(2, 1, 24, 130, H=8, K=128)
    case.window_mask_BTR[1] = False
    case.visible_BT[1] = 0
    out_BTHK = run(case)
    assert np.any(out_BTHK[0])
    assert not np.any(out_BTHK[1])


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_two_cores_do_not_race(kind: str) -> None:
    if kind == "decode":
        case: Decode | Prefill = decode_case(2, 2, 24, 1100, H=8, K=128)
    else:
        case = prefill_case((1000,), 300, 16, 600, H=8, K=128)
    out = run(case, detect_races=True, num_cores_or_threads=2)
    np.testing.assert_allclose(out, case.expected(), **CLOSE)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", ["flash", "pro"])
def test_full_shapes_compile_without_temporaries(model: str, chip: Target) -> None:
    """Less than a megabyte: window and pool are not joined, no logits are in HBM."""
    shape = SHAPES[model]
    H, K, W, S = shape.heads, shape.head_dim, shape.window, 8192
    bf16 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    ints = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    sink_H = jax.ShapeDtypeStruct((H,), jnp.float32)
    near = bf16(8, W + 8, K), jax.ShapeDtypeStruct((8, 1, W + 8), jnp.bool)
    decode = functools.partial(dense_attention.decode, scale=SCALE)
    prefill = functools.partial(dense_attention.prefill, window=W, scale=SCALE)
    programs = [
        targets.compiled(
            chip, decode, bf16(8, 1, H, K), *near, bf16(2, 8, S, K), ints(), ints(8, 1), sink_H
        ),
        targets.compiled(
            chip,
            prefill,
            *(bf16(1, 4096, H, K), bf16(1, 4096 + W, K), ints(1)),
            *(bf16(2, 1, S, K), ints(), ints(1, 4096), sink_H),
        ),
    ]
    for program in programs:
        assert "tpu_custom_call" in str(program.as_text())
        assert targets.temporaries(program) < 1e6
