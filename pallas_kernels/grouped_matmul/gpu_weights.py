"""Tiles of experts' matrices, from device memory to bfloat16 in shared memory.

TMA copies arrays straight to where tensor cores read them, and codes to a staging buffer, from
which a warpgroup converts them to bfloat16: with one scale per tile of E4M3, which is always within
one block, and with a row of scales per 32 channels of E2M1.

Axis letters: N output channels, K input channels (64 of a tile), S slots.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul import lora
from pallas_kernels.implementations import Unsupported
from pallas_kernels.mosaic_gpu import TILED, load
from pallas_kernels.quantize import Fp4Weight, Fp8Weight, gpu_codes
from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK

CHANNELS = 64
STAGES = 3


def check(w: lora.Weight) -> None:
    """Reject weights that kernels cannot read.

    Raises:
      Unsupported: a low-rank update, or arrays not in bfloat16.
    """
    if isinstance(w, lora.LoraWeight):
        raise Unsupported("The GPU form takes no low-rank updates.")
    if not isinstance(w, Fp8Weight | Fp4Weight) and w.dtype != jnp.bfloat16:
        raise Unsupported(f"The GPU form takes arrays in bfloat16, not {w.dtype}.")


def arrays_of(w: Any) -> tuple[Array, ...]:
    """The arrays a kernel reads: the array, or codes and scales; E8M0 scales as bytes."""
    if not isinstance(w, Fp8Weight | Fp4Weight):
        return (w,)
    if w.scale.dtype == jnp.float8_e8m0fnu:
        return w.codes, jax.lax.bitcast_convert_type(w.scale, jnp.uint8)
    return w.codes, w.scale


@dataclasses.dataclass(frozen=True)
class Format:
    """How to load tiles of one kind of weight.

    Attributes:
      kind: class of the weight.
      columns: output channels per tile.
    """

    kind: type
    columns: int

    @property
    def quantised(self) -> bool:
        return self.kind in (Fp8Weight, Fp4Weight)

    @property
    def copies(self) -> int:
        """Copies per tile."""
        return 2 if self.kind is Fp4Weight else 1

    def scratch(self, slots: int, prefix: str) -> dict[str, Any]:
        """Shared memory for tiles, and for codes in flight."""
        codes = lambda rows, dtype: plgpu.SMEM((STAGES, rows, self.columns), dtype)
        tile = (CHANNELS, self.columns) if self.quantised else (self.columns, CHANNELS)
        matrix = plgpu.SMEM((slots, *tile), jnp.bfloat16, transforms=TILED)
        buffers: dict[str, Any] = {"tile": matrix}
        if self.quantised:
            buffers["staged"] = plgpu.Barrier(num_arrivals=self.copies, num_barriers=STAGES)
        if self.kind is Fp8Weight:
            buffers["codes"] = codes(CHANNELS, jnp.float8_e4m3fn)
        if self.kind is Fp4Weight:
            buffers["codes"] = codes(CHANNELS // 2, jnp.uint8)
            buffers["scale"] = codes(CHANNELS // FP4_BLOCK, jnp.uint8)
        return {prefix + name: ref for name, ref in buffers.items()}

    def operand(self, tile: Any, columns: Any) -> Any:
        """The right operand of a product: [K, N]."""
        if self.quantised:
            return tile.at[:, columns]
        return tile.at[columns, :].transpose((1, 0))

    def fetch(self, arrays: Any, at: Any, tile: Any, here: Any) -> None:
        """Start copying an array's tile to shared memory; `at`: layer, expert, k, n."""
        layer, expert, k, n = at
        there = arrays[0].at[layer, expert, pl.ds(n, self.columns), pl.ds(k, CHANNELS)]
        plgpu.copy_gmem_to_smem(there, tile, here)

    def stage(self, arrays: Any, at: Any, slot: Array, smem: Any) -> None:
        """Start copying a tile's codes (and scales, in FP4) to the staging buffer."""
        layer, expert, k, n = at
        columns, here = pl.ds(n, self.columns), smem["staged"].at[slot]
        rows = CHANNELS // 2 if self.kind is Fp4Weight else CHANNELS
        first = jax.lax.div(k, CHANNELS) * rows
        codes = arrays[0].at[layer, expert, pl.ds(first, rows), columns]
        plgpu.copy_gmem_to_smem(codes, smem["codes"].at[slot], here)
        if self.kind is Fp4Weight:
            blocks = CHANNELS // FP4_BLOCK
            first = jax.lax.div(k, CHANNELS) * blocks
            scale = arrays[1].at[layer, expert, pl.ds(first, blocks), columns]
            plgpu.copy_gmem_to_smem(scale, smem["scale"].at[slot], here)

    def dequantise(self, arrays: Any, at: Any, slot: Array, tile: Any, smem: Any) -> None:
        """Convert the codes staged in a slot to a tile."""
        if self.kind is Fp4Weight:
            gpu_codes.write_fp4(smem["codes"].at[slot], smem["scale"].at[slot], tile)
            return
        layer, expert, k, n = at
        block = jax.lax.div(k, FP8_BLOCK), jax.lax.div(n, FP8_BLOCK)
        scale = arrays[1][layer, expert, *block]
        if scale.dtype != jnp.float32:
            scale = gpu_codes.power_of_two(scale)
        for row in range(0, CHANNELS, 32):
            rows = pl.ds(row, 32)
            layout = gpu_codes.tile_layout(32, self.columns)
            codes_KN = load(smem["codes"].at[slot, rows], layout)
            tile[rows, :] = (codes_KN.astype(jnp.float32) * scale).astype(jnp.bfloat16)
