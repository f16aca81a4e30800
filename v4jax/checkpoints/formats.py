"""How checkpoints store a quantised matrix: codes, and one scale per block of them.

Axis letters: N rows, K columns of a matrix; n, k of its blocks; J bytes of a row of FP4 codes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped

from pallas_kernels import quantize
from v4jax.checkpoints.byte_files import Box
from v4jax.model.config import ExpertDtype

_STRIP = 128  # rows decoded at once; whole blocks
# Codes and scales, in a file's layout or in the kernels'.
Stored = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A block-quantised matrix format.

    Attributes:
      name: name in messages and manifests.
      dtypes: dtypes that codes may have in a file, the usual one first.
      codes_dtype: NumPy dtype of codes in a file.
      block: rows and columns that share a scale.
      packed: codes per byte.
      unit: bytes of a row of codes that the kernels' layout mixes; others keep their place.
      decode: codes and scales to float32 values [N, K].
      scales: a matrix to the scales [n, k] that fit it best.
      codes: a matrix and its scales to codes.
      to_kernels: codes and scales from a file's layout to the kernels'.
      from_kernels: the inverse of `to_kernels`.
    """

    name: ExpertDtype
    dtypes: tuple[str, ...]
    codes_dtype: Any
    block: tuple[int, int]
    packed: int
    unit: int
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    scales: Callable[[np.ndarray], np.ndarray]
    codes: Callable[[np.ndarray, np.ndarray], np.ndarray]
    to_kernels: Callable[[np.ndarray, np.ndarray], Stored]
    from_kernels: Callable[[np.ndarray, np.ndarray], Stored]

    def encode(
        self, w_NK: Float32[np.ndarray, "N K"]
    ) -> tuple[Shaped[np.ndarray, "N J"], Shaped[np.ndarray, "n k"]]:
        """Quantise a matrix: its codes and scales."""
        scale_nk = self.scales(w_NK)
        return self.codes(w_NK, scale_nk), scale_nk

    @property
    def values_unit(self) -> int:
        """`unit` in values."""
        return self.unit * self.packed

    def codes_box(self, box: Box) -> Box:
        """The box of a file's codes for a box of values [N, K], whose columns are whole units."""
        rows, columns = box
        return rows, slice(columns.start // self.packed, columns.stop // self.packed)

    def scales_box(self, box: Box) -> Box:
        """The box of a file's scales for a box of values."""
        return tuple(
            slice(part.start // size, math.ceil(part.stop / size))
            for part, size in zip(box, self.block, strict=True)
        )

    def decode_box(self, box: Box, codes: np.ndarray, scale: np.ndarray, dtype: Any) -> np.ndarray:
        """Decode a box of values from the codes of `codes_box` and the scales of `scales_box`."""
        above, left = (part.start % size for part, size in zip(box, self.block, strict=True))
        if above or left:  # decoding begins where a block does
            codes = np.pad(codes.view(np.uint8), ((above, 0), (left // self.packed, 0)))
        codes, height = codes.view(self.codes_dtype), self.block[0]
        out = np.empty((len(codes), codes.shape[1] * self.packed), dtype)
        # Float32 values of more rows would take several times the memory of the result.
        for first in range(0, len(codes), _STRIP):
            rows = slice(first, first + _STRIP)
            blocks = slice(first // height, (first + _STRIP) // height)
            out[rows] = self.decode(codes[rows], scale[blocks])
        return out[above:, left:]

    def codes_to_kernels(self, codes: np.ndarray) -> np.ndarray:
        """Codes in the kernels' layout, of a part of a matrix whose columns are whole units."""
        no_scales = np.empty((len(codes), 0), np.uint8)
        return self.to_kernels(codes, no_scales)[0]

    def codes_shape(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """The shape of a matrix's codes in a file; F4 counts elements, other dtypes bytes."""
        return shape if dtype == "F4" else (*shape[:-1], shape[-1] // self.packed)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a matrix's scales in a file."""
        *stack, rows, columns = shape
        return (*stack, math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1]))


FP8 = BlockFormat(
    name="fp8",
    dtypes=("F8_E4M3",),
    codes_dtype=ml_dtypes.float8_e4m3fn,
    block=(128, 128),
    packed=1,
    unit=1,
    decode=quantize.decode_fp8_blocks,
    scales=quantize.fp8_scales,
    codes=quantize.fp8_codes,
    to_kernels=quantize.fp8_from_checkpoint,
    from_kernels=quantize.fp8_to_checkpoint,
)
FP4 = BlockFormat(
    name="fp4",
    dtypes=("I8", "U8", "F4"),
    codes_dtype=np.int8,
    block=(1, 32),
    packed=2,
    unit=16,
    decode=quantize.decode_fp4_blocks,
    scales=quantize.fp4_scales,
    codes=quantize.fp4_codes,
    to_kernels=quantize.fp4_from_checkpoint,
    from_kernels=quantize.fp4_to_checkpoint,
)
QUANTISED = {form.name: form for form in (FP8, FP4)}
# None: dense, a tensor of its values.
Format = BlockFormat | None
BY_NAME: dict[str, Format] = {"dense": None, **QUANTISED}
# For each quantised `params.Stored`, the formats that a file may use; dense is always allowed.
ALLOWED: dict[str, tuple[BlockFormat, ...]] = {"fp8": (FP8,), "expert": (FP8, FP4)}


def name_of(stored: Format) -> str:
    """A format's name in messages and manifests."""
    return "dense" if stored is None else stored.name
