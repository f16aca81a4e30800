"""A changed matrix goes back into its format, and how much of the change is left there.

Axis letters: N rows, K columns of a matrix; n, k of its blocks.
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
    """The scales for a changed matrix: a block's old one, unless a new one is nearer to its values.

    A new scale for a block whose largest value grew a little would round all others anew, which
    does more harm than cutting that one off.
    """
    new_nk = stored.scales(w_NK).astype(old_nk.dtype)
    differs_nk = new_nk != old_nk
    if not differs_nk.any():
        return old_nk
    rows, columns = stored.block
    if rows > 1:
        return _nearer(w_NK, old_nk, new_nk, stored)
    # Blocks are parts of rows: those in question, which are few, make a matrix of their own.
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
    """Of each block the scale with which it is stored more exactly, the old one if both are."""
    # A scale of 0 is allowed in float32, and nothing fits it.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        old_is_nk = _errors(w_NK, old_nk, stored) <= _errors(w_NK, new_nk, stored)
    return np.where(old_is_nk, old_nk, new_nk)


def _errors(
    w_NK: Float32[np.ndarray, "N K"], scale_nk: Shaped[np.ndarray, "n k"], stored: BlockFormat
) -> Float32[np.ndarray, "n k"]:
    """Of each block, the sum of squared distances to what would be stored."""
    error = (stored.decode(stored.codes(w_NK, scale_nk), scale_nk) - w_NK) ** 2
    for axis, block in enumerate(stored.block):
        error = np.add.reduceat(error, np.arange(0, error.shape[axis], block), axis=axis)
    return error


@dataclasses.dataclass(frozen=True)
class Kept:
    """How much of an update is left after rounding, over all weights of a kind.

    Attributes:
      kind: the weights' name without numbers.
      stored: the dtype they are stored in.
      tensors: how many have changed.
      gain: <left, wanted> / <wanted, wanted>: 1 where all of it is there, 0 where none.
      cosine: between what is left and what was wanted.
    """

    kind: str
    stored: str
    tensors: int
    gain: float
    cosine: float


class Ledger:
    """Sums of products of wanted and realised updates, by kind of weight and how it is stored."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], np.ndarray] = {}

    def add(self, kind: str, stored: str, wanted: np.ndarray, left: np.ndarray) -> None:
        """Count one changed tensor."""
        pairs = ((left, wanted), (wanted, wanted), (left, left))
        self._add((kind, stored), np.array([1.0, *(_product(*pair) for pair in pairs)]))

    def _add(self, key: tuple[str, str], sums: np.ndarray) -> None:
        self._sums[key] = self._sums.get(key, np.zeros(4)) + sums

    def to_json(self) -> list[Any]:
        """For a file; `add_json` takes it in."""
        return [[*key, *sums.tolist()] for key, sums in self._sums.items()]

    def add_json(self, rows: Iterable[Any]) -> None:
        """Add what `to_json` gave."""
        for kind, stored, *sums in rows:
            self._add((kind, stored), np.array(sums))

    def report(self) -> list[Kept]:
        """What is left of each kind."""
        return [
            Kept(kind, stored, int(count), _ratio(dot, w), _ratio(dot, math.sqrt(w * x)))
            for (kind, stored), (count, dot, w, x) in sorted(self._sums.items())
        ]


def _product(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of products: of a row in float32, which is several times as fast, then in float64."""
    return float(np.einsum("...i,...i->...", x, y).sum(dtype=np.float64))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def table(rows: Iterable[Kept]) -> list[str]:
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


def warnings(rows: Iterable[Kept]) -> list[str]:
    """A line for each format in which less than half of a change is left, and what to do."""
    lost: dict[str, list[Kept]] = {}
    for row in rows:
        if row.gain < 0.5:
            lost.setdefault(row.stored, []).append(row)
    return [_warning(stored, found) for stored, found in lost.items()]


def _warning(stored: str, lost: list[Kept]) -> str:
    named = ", ".join(f"{row.kind} ({max(row.gain, 0.0):.0%})" for row in lost[:_NAMED])
    more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    remedy = (
        "merge with --weights bfloat16, or run the release with --adapter"
        if stored in ("FP8", "FP4")
        else "run the release with --adapter and --dtype float32"
    )
    return (
        f"rounding to {stored} leaves less than half of the change of {named}{more}; to have all "
        f"of it, {remedy}."
    )
