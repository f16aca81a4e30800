"""Choosing the scales of a merged matrix, and the ledger of what rounding lost."""

import json

import numpy as np
import pytest

from v4jax.adapters import requantise
from v4jax.checkpoints.formats import FP4, FP8, BlockFormat


def stored(fmt: BlockFormat, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix whose last blocks are partial, and its scales."""
    w_NK = np.random.default_rng(seed).standard_normal((200, 320), np.float32)
    codes, scale = fmt.encode(w_NK)
    return fmt.decode(codes, scale), scale


def error(w_NK: np.ndarray, scale: np.ndarray, fmt: BlockFormat) -> float:
    return float(np.linalg.norm(fmt.decode(fmt.codes(w_NK, scale), scale) - w_NK))


@pytest.mark.parametrize("fmt", [FP8, FP4], ids=["fp8", "fp4"])
def test_an_unchanged_matrix_keeps_its_scales_and_values(fmt: BlockFormat) -> None:
    w_NK, scale = stored(fmt)
    np.testing.assert_array_equal(requantise.scales(w_NK, scale, fmt), scale)
    assert error(w_NK, scale, fmt) == 0


@pytest.mark.parametrize("fmt", [FP8, FP4], ids=["fp8", "fp4"])
@pytest.mark.parametrize("size", [1e-3, 0.05, 1.0, 100.0])
def test_chosen_scales_are_no_worse_than_old_or_new_ones(fmt: BlockFormat, size: float) -> None:
    w_NK, scale = stored(fmt)
    w_NK = w_NK + size * np.random.default_rng(1).standard_normal(w_NK.shape, np.float32)
    chosen = requantise.scales(w_NK, scale, fmt)
    best = min(error(w_NK, scale, fmt), error(w_NK, fmt.scales(w_NK), fmt))
    assert error(w_NK, chosen, fmt) <= best * (1 + 1e-6)


def test_a_scale_of_zero_is_replaced() -> None:
    w_NK, _ = stored(FP8)
    new = FP8.scales(w_NK).astype(np.float32)
    np.testing.assert_array_equal(requantise.scales(w_NK, np.zeros_like(new), FP8), new)


def test_the_ledger_reports_gain_and_cosine() -> None:
    change = np.array([3.0, 4.0], np.float32)
    ledger, other = requantise.Ledger(), requantise.Ledger()
    ledger.add("a", "FP4", change, np.zeros(2, np.float32))
    other.add("a", "FP4", change, np.array([6.0, 8.0], np.float32))
    other.add("b", "FP8", change, np.array([4.0, -3.0], np.float32))
    ledger.add_json(json.loads(json.dumps(other.to_json())))
    [a, b] = ledger.report()
    assert (a.kind, a.tensors, a.gain) == ("a", 2, 1.0)
    assert a.cosine == pytest.approx(50 / np.sqrt(50 * 100))
    assert (b.gain, b.cosine) == (0.0, 0.0)


def test_there_is_one_warning_per_format_and_it_names_a_way_out() -> None:
    row = lambda kind, stored, gain: requantise.Retention(kind, stored, 1, gain, gain)
    rows = [row(kind, "FP4", 0.25) for kind in "abcde"]
    rows += [row("f", "FP8", 0.5), row("norm", "BF16", 0.0)]
    fp4, bf16 = requantise.warnings(rows)
    assert "a (25%), b (25%), c (25%) and 2 more; to keep all of it, merge with" in fp4
    assert "norm (0%); to keep all of it, run the release with --adapter and --dtype" in bf16
