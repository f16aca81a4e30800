"""Entries are pooled, normed, rotated and rounded as in the model, at once, in chunks or by steps.

Axis letters: B batch, T tokens, M ratio, C channels, K entry channels, P tokens before a chunk,
R ring rows, n entries, Q rotary pairs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compress, rotary
from pallas_kernels.compress import reference
from pallas_kernels.compress.shapes import SHAPES, Shape
from v4jax.model import layers

BENCH = {name: SHAPES[f"bench {name}"] for name in ("hca", "csa", "index")}
# A few dozen successive float32 roundings.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def text(shape: Shape, B: int, T: int, dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    """Random tokens from position 0 on, weights, and the rotary table of all entries."""
    rng = np.random.default_rng(seed)
    normal = lambda *dims: jnp.asarray(rng.normal(size=dims), jnp.float32)
    angle = rng.uniform(0, 6, (B, T // shape.ratio + 1, shape.rotated // 2))
    return {
        "rows": normal(B, T, 2 * shape.channels),
        "bias": normal(shape.ratio, shape.channels),
        "scale": normal(shape.dim).astype(dtype),
        "table": tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)),
    }


def settings(shape: Shape, dtype: Any = jnp.float32, rounding: str = "") -> dict[str, Any]:
    return {
        "overlap": shape.overlap,
        "eps": 1e-6,
        "rounding": rounding or shape.rounding,
        "dtype": dtype,
    }


def chunk(
    shape: Shape, text: dict[str, Any], start_B: Any, T: int, poison: float = 0.0
) -> list[Any]:
    """Arguments of `prefill` for T tokens from `start_B` on, with `poison` before the text."""
    M, P = shape.ratio, shape.overlap * shape.ratio
    start_B = np.asarray(start_B, np.int32)
    before = np.full((len(start_B), P, text["rows"].shape[2]), poison, np.float32)
    padded_BTC = np.concatenate([before, np.asarray(text["rows"])], axis=1)
    cut = lambda first, count: jnp.asarray(
        np.stack([row[at : at + count] for row, at in zip(padded_BTC, first, strict=True)])
    )
    first_Bn = start_B[:, None] // M + np.arange(-(-T // M))[None]
    table = tuple(
        jnp.take_along_axis(
            part, jnp.asarray(np.minimum(first_Bn, part.shape[1] - 1))[..., None], 1
        )
        for part in text["table"]
    )
    rows_BTC, before_BPC = cut(start_B + P, T), cut(start_B, P)
    return [rows_BTC, before_BPC, jnp.asarray(start_B), text["bias"], text["scale"], table]


def complete(shape: Shape, start: int, T: int) -> int:
    """Number of entries that the chunk completes."""
    return (start + T) // shape.ratio - start // shape.ratio


def ring(shape: Shape, text: dict[str, Any], end_B: Any, L: int = 2, layer: int = 1) -> jax.Array:
    """A stack of rings: one layer's holds the newest tokens of the text, all else is NaN."""
    rows_BTC, R = np.asarray(text["rows"]), shape.ring
    ring_LBRC = np.full((L, len(rows_BTC), R, rows_BTC.shape[2]), np.nan, np.float32)
    for b, end in enumerate(end_B):
        for position in range(max(0, end - R), end):
            ring_LBRC[layer, b, position % R] = rows_BTC[b, position]
    return jnp.asarray(ring_LBRC)


def steps(shape: Shape, text: dict[str, Any], window_B: Any) -> list[Any]:
    """Arguments of `decode` just after these windows were completed."""
    window_B = np.asarray(window_B, np.int32)
    ring_LBRC = ring(shape, text, (window_B + 1) * shape.ratio)
    at_B11 = jnp.asarray(np.maximum(window_B, 0))[:, None, None]
    table = tuple(jnp.take_along_axis(part, at_B11, 1) for part in text["table"])
    return [ring_LBRC, jnp.int32(1), jnp.asarray(window_B), text["bias"], text["scale"], table]


def plain(shape: Shape, text: dict[str, Any]) -> np.ndarray:
    """All entries of the text, computed one at a time in float64, not rounded."""
    wide = lambda x: np.asarray(x, np.float64)
    rows_BTC, bias_MC, M, K = wide(text["rows"]), wide(text["bias"]), shape.ratio, shape.dim
    kv_BTC, gate_BTC = np.split(rows_BTC, 2, axis=-1)
    out = np.zeros((len(rows_BTC), rows_BTC.shape[1] // M, K))
    for b, i in np.ndindex(*out.shape[:2]):
        parts = []
        for s in range(shape.overlap):
            window = i + s - shape.overlap + 1
            tokens, channels = slice(window * M, (window + 1) * M), slice(s * K, (s + 1) * K)
            if window >= 0:
                gate = gate_BTC[b, tokens, channels] + bias_MC[:, channels]
                parts.append((kv_BTC[b, tokens, channels], gate))
        kv, gate = (np.concatenate(part) for part in zip(*parts, strict=True))
        weight = np.exp(gate - gate.max(0))
        x = (weight * kv).sum(0) / weight.sum(0)
        x = x / np.sqrt((x**2).mean() + 1e-6) * wide(text["scale"])
        pair = x[K - shape.rotated :].reshape(-1, 2) @ [1, 1j]
        pair = pair * (wide(text["table"][0])[b, i] + 1j * wide(text["table"][1])[b, i])
        out[b, i] = [*x[: K - shape.rotated], *np.stack([pair.real, pair.imag], -1).reshape(-1)]
    return out


@pytest.mark.parametrize("name", BENCH)
@pytest.mark.parametrize("start", [0, 131])
def test_a_chunk_from_any_start_gives_the_entries_of_the_full_text(name: str, start: int) -> None:
    shape, T = BENCH[name], 400
    inputs = text(shape, 2, T)
    args = chunk(shape, inputs, [start, start], T - start, poison=np.nan)
    got_BnK = compress.prefill(*args, **settings(shape, rounding="none"))
    expected_BnK = plain(shape, inputs)[:, start // shape.ratio :]
    np.testing.assert_allclose(got_BnK[:, : expected_BnK.shape[1]], expected_BnK, **CLOSE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", BENCH)
def test_the_op_equals_the_layers_applied_in_sequence_bit_for_bit(name: str, dtype: Any) -> None:
    shape, M = BENCH[name], BENCH[name].ratio
    inputs = text(shape, 2, 3 * M, dtype)
    rows_BTC, before_BPC, start_B, bias_MC, scale_K, table = chunk(shape, inputs, [0, 0], 3 * M)
    before_BPC = before_BPC[:, : (shape.overlap - 1) * M]
    kv_BXC, gate_BXC = jnp.split(jnp.concatenate([before_BPC, rows_BTC], axis=1), 2, axis=-1)
    pooled_BnK = reference.pool(kv_BXC, gate_BXC, bias_MC, start_B, overlap=shape.overlap)
    pooled_BnK = pooled_BnK.astype(dtype)
    normed_BnK = layers.rms_norm(pooled_BnK, scale_K, 1e-6)
    rotated_Bn1K = rotary.reference.rotate(normed_BnK[:, :, None], *table, norm=None)
    expected_BnK = rotated_Bn1K[:, :, 0]
    if shape.rounding == "fp4":
        expected_BnK = layers.round_index(expected_BnK)
    else:
        expected_BnK = layers.round_kv(expected_BnK, shape.rotated)
    args = chunk(shape, inputs, [0, 0], 3 * M)
    # Not jitted: in one program XLA omits intermediate roundings to bfloat16.
    got_BnK = reference.prefill(*args, **settings(shape, dtype))
    assert got_BnK.dtype == dtype
    np.testing.assert_array_equal(got_BnK, expected_BnK)


@pytest.mark.parametrize("name", BENCH)
def test_a_ring_gives_the_same_entry_at_any_offset_of_its_window(name: str) -> None:
    shape = BENCH[name]
    window_B = [0, 1, 2, 3, 7, 16]
    T = (max(window_B) + 1) * shape.ratio
    inputs = text(shape, len(window_B), T)
    got_B1K = compress.decode(*steps(shape, inputs, window_B), **settings(shape, rounding="none"))
    expected_B1K = plain(shape, inputs)[np.arange(len(window_B)), window_B][:, None]
    np.testing.assert_allclose(got_B1K, expected_B1K, **CLOSE)


@pytest.mark.parametrize("window_B", [[-1, -1], [-1, 2]])
def test_rows_without_a_new_entry_get_zeros_whatever_the_ring_holds(window_B: list[int]) -> None:
    shape = BENCH["csa"]
    args = steps(shape, text(shape, 2, 16), window_B)
    got_B1K = compress.decode(*args, **settings(shape))
    np.testing.assert_array_equal(np.any(got_B1K, axis=(1, 2)), np.array(window_B) >= 0)
    assert np.isfinite(got_B1K).all()


def test_an_unknown_implementation_is_rejected() -> None:
    tokens_BXC, bias_MC = jnp.ones((1, 8, 4)), jnp.ones((4, 4))
    with pytest.raises(NotImplementedError, match=r"compress\.pool has no 'tpu' form"):
        compress.pool(
            tokens_BXC, tokens_BXC, bias_MC, jnp.zeros(1, jnp.int32), overlap=1, impl="tpu"
        )
