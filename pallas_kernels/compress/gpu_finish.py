"""What follows pooling inside a kernel: norm, RoPE, rounding.

A thread has one of its warpgroup's 128 channels, for all windows of the block: registers hold
[W * 128] numbers, window by window. Channels are exchanged through shared memory, from which a
thread reads the channel 1, 2, 4, ... places away; after seven such steps each has the sum of all,
and a Hadamard transform takes seven steps too. Warpgroups only exchange sums of squares.

Axis letters: as in gpu.py; F = W * V.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic_gpu
from pallas_kernels.compress.reference import FP4_BLOCK, FP8_BLOCK
from pallas_kernels.quantize import reference as formats

CHANNELS = 128


def scratch(windows: int, warpgroups: int) -> dict[str, Any]:
    """Shared memory for `Finish`; `line` is padded at both ends for reads of neighbours."""
    size = windows * CHANNELS
    line = {"line": plgpu.SMEM((warpgroups, size + 2 * CHANNELS), jnp.float32)}
    if warpgroups == 1:
        return line
    return line | {
        "square": plgpu.SMEM((warpgroups, size), jnp.float32),
        "squares_here": plgpu.Barrier(num_arrivals=warpgroups),
    }


def in_lanes(part: Float[Array, "B n Q"]) -> Float32[Array, "B nV"]:
    """Each value of a table twice, in the last of every 128 places: registers cannot be indexed."""
    twice_BnX = jnp.repeat(part.astype(jnp.float32), 2, axis=-1)
    padding = ((0, 0), (0, 0), (CHANNELS - twice_BnX.shape[-1], 0))
    return jnp.pad(twice_BnX, padding).reshape(part.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Finish:
    """How entries are finished.

    Attributes:
      channels: K.
      rotated: number of rotated channels, 2Q.
      eps: eps of the norm.
      rounding: as in the package.
      dtype: dtype of the entries.
    """

    channels: int
    rotated: int
    eps: float
    rounding: str
    dtype: Any

    def __call__(self, arrays: Any, span: Any, warpgroup: Array, smem: Any) -> Float32[Array, " F"]:
        """Finished entries of one warpgroup's channels.

        Args:
          arrays: references to the norm's weight and to the `in_lanes` cosine and sine.
          span: row of the batch, first entry.
          warpgroup: index of the warpgroup.
          smem: buffers of `scratch`, with the pooled sums in `line`.
        """
        scale, cos, sin = arrays
        line = smem["line"].at[warpgroup]
        size = line.shape[0] - 2 * CHANNELS
        x_F = self._to_dtype(read(line, 0, size))
        inverse_F = jax.lax.rsqrt(self._squares(x_F, warpgroup, smem) / self.channels + self.eps)
        scale_V = scale[pl.ds(warpgroup * CHANNELS, CHANNELS)].astype(jnp.float32)

        @pl.loop(0, size // CHANNELS)
        def _(window: Array) -> None:
            write(line, window, scale_V)

        x_F = self._to_dtype(x_F * inverse_F * read(line, 0, size))
        channel_F = lane(size) + warpgroup * CHANNELS
        row, entry = span
        part = lambda table: load(table.at[row, pl.ds(entry * CHANNELS, size)])
        turned_F = self._to_dtype(turn(x_F, part(cos), part(sin), line))
        x_F = jnp.where(channel_F < self.channels - self.rotated, x_F, turned_F)
        return self._rounded(x_F, channel_F, line)

    def _to_dtype(self, x_F: Float32[Array, " F"]) -> Float32[Array, " F"]:
        """Round to the entries' dtype."""
        return x_F.astype(self.dtype).astype(jnp.float32)

    def _squares(self, x_F: Any, warpgroup: Array, smem: Any) -> Float32[Array, " F"]:
        """The sum of squares of all channels, in each of them."""
        line = smem["line"].at[warpgroup]
        total_F = among(jnp.add, x_F * x_F, CHANNELS, line)
        if "square" not in smem:
            return total_F
        smem["square"][warpgroup] = total_F
        plgpu.barrier_arrive(smem["squares_here"])
        plgpu.barrier_wait(smem["squares_here"])
        total_F = load(smem["square"].at[0])
        for other in range(1, smem["square"].shape[0]):
            total_F += load(smem["square"].at[other])
        return total_F

    def _rounded(self, x_F: Any, channel_F: Any, line: Any) -> Float32[Array, " F"]:
        if self.rounding == "fp4":
            x_F = self._to_dtype(hadamard(x_F, line))
            largest_F = among(jnp.maximum, jnp.abs(x_F), FP4_BLOCK, line)
            return formats.rounded(x_F, largest_F, formats.E2M1)
        if self.rounding == "none":
            return x_F
        straight_F = channel_F < self.channels - self.rotated
        size_F = jnp.where(straight_F, jnp.abs(x_F), 0.0)
        largest_F = among(jnp.maximum, size_F, FP8_BLOCK, line)
        return jnp.where(straight_F, formats.rounded(x_F, largest_F, formats.E4M3), x_F)


def write(line: Any, window: Any, x_V: Float32[Array, " V"]) -> None:
    """Write one window's channels."""
    line[pl.ds((window + 1) * CHANNELS, CHANNELS)] = x_V


def read(line: Any, places: int, size: int) -> Float32[Array, " F"]:
    """Read all windows' channels, or the channels this many places further."""
    return load(line.at[pl.ds(CHANNELS + places, size)])


def load(ref: Any) -> Array:
    """Read [F] numbers, a channel per thread."""
    return mosaic_gpu.load(ref, plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1))


def lane(size: int) -> Array:
    """Each thread's channel, 0 to 127, for all windows."""
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=1)
    place_F = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    return plgpu.layout_cast(place_F, layout) & (CHANNELS - 1)


def _other(x_F: Float32[Array, " F"], distance: int, line: Any) -> Float32[Array, " F"]:
    """The values of the channels whose indices differ in this power of two."""
    (size,) = x_F.shape
    line[pl.ds(CHANNELS, size)] = x_F
    after_F, before_F = read(line, distance, size), read(line, -distance, size)
    return jnp.where((lane(size) & distance) == 0, after_F, before_F)


def among(
    combine: Callable[[Array, Array], Array], x_F: Float32[Array, " F"], block: int, line: Any
) -> Float32[Array, " F"]:
    """Combine all values of each block of channels, in all of its channels."""
    for bit in range(block.bit_length() - 1):
        x_F = combine(x_F, _other(x_F, 1 << bit, line))
    return x_F


def turn(x_F: Any, cos_F: Any, sin_F: Any, line: Any) -> Float32[Array, " F"]:
    """Apply RoPE to pairs of adjacent channels."""
    other_F = _other(x_F, 1, line)
    other_F = jnp.where((lane(x_F.shape[0]) & 1) == 0, -other_F, other_F)
    return x_F * cos_F + other_F * sin_F


def hadamard(x_F: Float32[Array, " F"], line: Any) -> Float32[Array, " F"]:
    """The Hadamard transform of 128 channels."""
    for bit in range(CHANNELS.bit_length() - 1):
        other_F = _other(x_F, 1 << bit, line)
        first_F = (lane(x_F.shape[0]) & (1 << bit)) == 0
        x_F = jnp.where(first_F, x_F + other_F, other_F - x_F)
    return x_F * CHANNELS**-0.5
