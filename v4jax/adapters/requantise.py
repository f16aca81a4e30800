"""Requantising a changed matrix, and how much of the change survives it.

Axis letters: N rows, K columns of a matrix; n, k rows and columns of blocks.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from v4jax.checkpoints.formats import BlockFormat

_NAMED = 3  # kinds of weights in a warning


def scales(
    w_NK: Float32[np.ndarray, "N K"], old_nk: Shaped[np.ndarray, "n k"], stored: BlockFormat
) -> Shaped[np.ndarray, "n k"]:
    """Scales for a changed matrix: a block keeps its old scale unless a new one is more accurate.

    If a block's largest value grew a little, a new scale would change the rounding of all the
    others, which does more harm than clipping that value.
    """
    new_nk = stored.scales(w_NK).astype(old_nk.dtype)
    differs_nk = new_nk != old_nk
    if not differs_nk.any():
        return old_nk
    rows, columns = stored.block
    if rows > 1:
        return _nearer(w_NK, old_nk, new_nk, stored)
    # Blocks are parts of rows: gather the few whose scale differs into a matrix.
    few_NK = w_NK.reshape(*old_nk.shape, columns)[differs_nk]
    column = lambda scale_nk: scale_nk[differs_nk][:, None]
    chosen_nk = old_nk.copy()
    chosen_nk[differs_nk] = _nearer(few_NK, column(old_nk), column(new_nk), stored)[:, 0]
    return chosen_nk


def _nearer(
    w_NK: Float32[np.ndarray, "N K"],
    old_nk: Shaped[np.ndarray, "n k"],
    new_nk: Shaped[np.ndarray, "n k"],
    stored: BlockFormat,
) -> Shaped[np.ndarray, "n k"]:
    """For each block, the scale that stores it more accurately; the old one on a tie."""
    # A scale of 0 is allowed in float32, and represents no value but 0.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        old_is_nk = _errors(w_NK, old_nk, stored) <= _errors(w_NK, new_nk, stored)
    return np.where(old_is_nk, old_nk, new_nk)


def _errors(
    w_NK: Float32[np.ndarray, "N K"], scale_nk: Shaped[np.ndarray, "n k"], stored: BlockFormat
) -> Float32[np.ndarray, "n k"]:
    """For each block, the sum of squared errors of storing it."""
    error = (stored.decode(stored.codes(w_NK, scale_nk), scale_nk) - w_NK) ** 2
    for axis, block in enumerate(stored.block):
        error = np.add.reduceat(error, np.arange(0, error.shape[axis], block), axis=axis)
    return error


@dataclasses.dataclass(frozen=True)
class Retention:
    """How much of an update survives rounding, over all weights of a kind.

    Attributes:
      kind: the weights' name without numbers.
      stored: the dtype they are stored in.
      tensors: number of changed tensors.
      gain: <realised, intended> / <intended, intended>: 1 if all of it survives, 0 if none.
      cosine: cosine of the realised and the intended update.
    """

    kind: str
    stored: str
    tensors: int
    gain: float
    cosine: float


class Ledger:
    """Sums of products of intended and realised updates, by kind and stored dtype of weights."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], np.ndarray] = {}

    def add(self, kind: str, stored: str, intended: np.ndarray, realised: np.ndarray) -> None:
        """Add one changed tensor."""
        pairs = ((realised, intended), (intended, intended), (realised, realised))
        self._add((kind, stored), np.array([1.0, *(_product(*pair) for pair in pairs)]))

    def _add(self, key: tuple[str, str], sums: np.ndarray) -> None:
        self._sums[key] = self._sums.get(key, np.zeros(4)) + sums

    def to_json(self) -> list[Any]:
        """The sums as JSON; see `add_json`."""
        return [[*key, *sums.tolist()] for key, sums in self._sums.items()]

    def add_json(self, rows: Iterable[Any]) -> None:
        """Add the sums from `to_json`."""
        for kind, stored, *sums in rows:
            self._add((kind, stored), np.array(sums))

    def report(self) -> list[Retention]:
        """One entry for each kind and stored dtype."""
        return [
            Retention(kind, stored, int(count), _ratio(dot, w), _ratio(dot, math.sqrt(w * x)))
            for (kind, stored), (count, dot, w, x) in sorted(self._sums.items())
        ]


def _product(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of products: in float32 along rows, which is several times as fast, then float64."""
    return float(np.einsum("...i,...i->...", x, y).sum(dtype=np.float64))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def table(rows: Iterable[Retention]) -> list[str]:
    """The report as lines of text."""
    cells = [("weights", "stored as", "tensors", "gain", "cosine")]
    cells += [
        (row.kind, row.stored, f"{row.tensors:,}", f"{row.gain:.3f}", f"{row.cosine:.3f}")
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_padded(row, widths)).rstrip() for row in cells]


def _padded(row: tuple[str, ...], widths: list[int]) -> Iterable[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i < 2 else cell.rjust(width)


def warnings(rows: Iterable[Retention]) -> list[str]:
    """A line for each format that keeps less than half of a change, with a remedy."""
    lost: dict[str, list[Retention]] = {}
    for row in rows:
        if row.gain < 0.5:
            lost.setdefault(row.stored, []).append(row)
    return [_warning(stored, kinds) for stored, kinds in lost.items()]


def _warning(stored: str, lost: list[Retention]) -> str:
    named = ", ".join(f"{row.kind} ({max(row.gain, 0.0):.0%})" for row in lost[:_NAMED])
    more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    remedy = (
        "merge with --weights bfloat16, or run the release with --adapter"
        if stored in ("FP8", "FP4")
        else "run the release with --adapter and --dtype float32"
    )
    return (
        f"rounding to {stored} keeps less than half of the change of {named}{more}; to keep all "
        f"of it, {remedy}."
    )
