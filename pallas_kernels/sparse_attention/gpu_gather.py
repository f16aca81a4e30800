"""Listed rows brought to shared memory by small bulk copies, and laid out for tensor cores.

A bulk copy fills contiguous bytes; tensor cores need rows interleaved and swizzled. So rows arrive
in a staging buffer, from which a dedicated warpgroup moves them through registers, writing zeros
for missing rows and decoding eight-bit entries to bfloat16.

Axis letters: C rows per chunk, N chunks, K channels, J channels per block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic_gpu
from pallas_kernels.implementations import Unsupported
from pallas_kernels.sparse_attention import rows
from pallas_kernels.sparse_attention.rows import Fp8Rows

CHUNK = 32
# A row of weights has a number per row of a chunk, 64 bytes; both operands need the same swizzle.
TILED = mosaic_gpu.tiles((8, 32), 64)
_WIDTH = 128
_LOW, _HIGH, _SCALE = rows.CODES, rows.CODES + rows.ROTATED, rows.CODES + 2 * rows.ROTATED


def check(pool: Float[Array, "L B S K"] | Fp8Rows) -> None:
    """Reject pools that cannot be gathered from.

    Raises:
      Unsupported: neither bfloat16 nor Fp8Rows, or more rows than an int32 can index.
    """
    data = pool.data if isinstance(pool, Fp8Rows) else pool
    if not isinstance(pool, Fp8Rows) and pool.dtype != jnp.bfloat16:
        raise Unsupported(f"The GPU kernel takes a pool in bfloat16 or Fp8Rows, not {pool.dtype}.")
    if data.shape[0] * data.shape[1] * data.shape[2] >= 2**31:
        raise Unsupported(
            f"The GPU kernel takes pools of fewer than 2^31 rows, not of shape {data.shape}."
        )


def in_units(array: Array) -> Array:
    """Flatten the leading dims to rows, and split each row into units: [rows, units, 128]."""
    return array.reshape(-1, array.shape[-1] // _WIDTH, _WIDTH)


def load(ref: Any, layout: Any) -> Array:
    """Load a ref as a register array with this layout."""
    return plgpu.layout_cast(ref[...], layout)


def stages(channels: int, *, narrow: bool, slots: int) -> dict[str, Any]:
    """Staging buffers, for rows in the layout of device memory."""
    stage = lambda width, dtype: plgpu.SMEM((slots, CHUNK, width // _WIDTH, _WIDTH), dtype)
    buffers = {"stage": stage(channels, jnp.bfloat16)}
    return buffers | ({"byte_stage": stage(rows.WIDTH, jnp.uint8)} if narrow else {})


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a chunk's rows come from.

    Attributes:
      ref: ref to `in_units` of an array in device memory.
      first: the row of `ref` that number 0 of a list stands for.
      narrow: whether rows are `Fp8Rows`.
    """

    ref: Any
    first: Any
    narrow: bool

    def stage(self, slot: Array, smem: Any) -> Any:
        """The staging buffer for a chunk's rows."""
        return smem["byte_stage" if self.narrow else "stage"].at[slot]


def fetch(source: Source, slot: Array, chunk: Any, smem: Any) -> None:
    """Start copies of a chunk's rows."""
    stage = source.stage(slot, smem)

    @pl.loop(0, CHUNK)
    def _(i: Array) -> None:
        # A missing row (-1) copies row 0, which is not used.
        row = source.first + jnp.maximum(smem["row_NC"][chunk, i], 0)
        plgpu.copy_gmem_to_smem(source.ref.at[row], stage.at[i], smem["staged"].at[slot])


def lay_out(source: Source, slot: Array, chunk: Any, keys: Any, smem: Any) -> None:
    """Move a chunk from its staging buffer to `keys`, where tensor cores read it."""
    stage = source.stage(slot, smem)
    row_C = smem["row_NC"].at[chunk]
    if source.narrow:
        _lay_out_bytes(row_C, stage, keys)
        return
    for unit in range(keys.shape[1] // _WIDTH):
        columns = pl.ds(unit * _WIDTH, _WIDTH)
        _put(load(stage.at[:, unit], _layout(_WIDTH)), row_C, keys.at[:, columns])


def _lay_out_bytes(row_C: Any, stage: Any, keys: Any) -> None:
    """Like `rows.decode`, 64 channels at a time; the scales are the last unit's second half."""
    half = lambda byte: stage.at[:, byte // _WIDTH, pl.ds(byte % _WIDTH, rows.BLOCK)]
    layout = _layout(rows.BLOCK)
    # The stride of rows is a multiple of 128 bytes, so there are some bank conflicts.
    words = lambda byte: mosaic_gpu.load(half(byte), layout).astype(jnp.int32)
    scale_CJ = jax.lax.bitcast_convert_type(words(_SCALE) << 23, jnp.float32)
    channel_CJ = jax.lax.broadcasted_iota(jnp.int32, scale_CJ.shape, 1)
    channel_CJ = plgpu.layout_cast(channel_CJ, layout)
    for block in range(rows.SCALES):
        scale_C = jnp.sum(jnp.where(channel_CJ == block, scale_CJ, 0.0), axis=1)
        code_CJ = words(block * rows.BLOCK)
        value_CJ = e4m3(code_CJ) * _along_channels(scale_C, rows.BLOCK)
        columns = pl.ds(block * rows.BLOCK, rows.BLOCK)
        _put(value_CJ.astype(jnp.bfloat16), row_C, keys.at[:, columns])
    rotated_CJ = words(_LOW) << 16 | words(_HIGH) << 24
    rotated_CJ = jax.lax.bitcast_convert_type(rotated_CJ, jnp.float32).astype(jnp.bfloat16)
    _put(rotated_CJ, row_C, keys.at[:, pl.ds(rows.CODES, rows.ROTATED)])


def e4m3(code: Array) -> Array:
    """Decode E4M3 codes, given as 32-bit integers, to float32.

    Exponent and mantissa move to their places in a float32. Subnormals are computed as a
    difference: going through float32's own subnormals would be simpler, but a GPU may flush them.
    """
    subnormal = (code & 0x78) == 0
    exponent = jnp.where(subnormal, 121 << 23, 120 << 23)
    moved = jax.lax.bitcast_convert_type(((code & 0x7F) << 20) + exponent, jnp.float32)
    size = moved - jnp.where(subnormal, 2.0**-6, 0.0)
    return jnp.where((code & 0x80) == 0, size, -size)


def _put(keys_CJ: Array, row_C: Any, keys: Any) -> None:
    """Write rows to `keys`, with zeros for missing ones."""
    layout = _layout(keys_CJ.shape[1])
    exists_CJ = _along_channels(load(row_C, layout.reduce(1)) >= 0, keys_CJ.shape[1])
    zero_CJ = plgpu.layout_cast(jnp.zeros_like(keys_CJ), layout)
    keys[...] = jnp.where(exists_CJ, keys_CJ, zero_CJ)


def _along_channels(x_C: Array, channels: int) -> Array:
    wide = mosaic_gpu.along(x_C, (CHUNK, channels), 0)
    return plgpu.layout_cast(wide, _layout(channels))


def _layout(channels: int) -> Any:
    """Register layout of a chunk that accesses buffers and tiles without bank conflicts."""
    return plgpu.Layout.SMEM_GMEM_COPY((CHUNK, channels), jnp.bfloat16, 64)
