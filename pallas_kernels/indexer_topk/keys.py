"""Index keys as caches store them: arrays, narrow formats with scales, pages of a pool.

Axis letters: as in the package; G rows of 128 entries' scales.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import paged
from pallas_kernels.implementations import check_arrays, check_dtype, check_shape, check_whole
from pallas_kernels.paged import Paged

FP4_BLOCK = 32  # channels per scale
SCALE_ROW = 128  # entries whose scales are adjacent
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Keys:
    """E4M3 keys with one scale per entry.

    Attributes:
      codes: float8_e4m3fn [L, B, S, J].
      scale: float8_e8m0fnu or float32, positive, [L, B, ceil(S / 128), 128]: entry s is in row
        s // 128, so that accelerators read the scales of a block of entries without padding.
    """

    codes: Any
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp4Keys:
    """E2M1 keys with a scale per 32 channels, two codes per byte, entries along lanes.

    Byte j of an entry holds channel j (low nibble) and channel J / 2 + j (high nibble), so that
    unpacking concatenates two halves instead of interleaving them. With channels along lanes, TPUs
    would pad an entry's 68 bytes to 256.

    Attributes:
      codes: uint8 [L, B, J / 2, S].
      scale: float8_e8m0fnu [L, B, ceil(S / 128), 4 * J]: entry s is in row s // 128, which holds
        the scales of 128 entries, block of channels by block.
    """

    codes: Any
    scale: Any


Keys: TypeAlias = Float[Array, "L B S J"] | Fp8Keys | Fp4Keys | Paged


def entries(keys: Keys) -> int:
    """Capacity in entries, per row."""
    match keys:
        case Fp8Keys():
            return keys.codes.shape[2]
        case Fp4Keys():
            return keys.codes.shape[3]
        case _:
            return keys.shape[2]


def check(op: str, arrays: dict[str, Any], keys: Any, k: Any) -> None:
    """Reject arguments that the contract does not allow.

    Args:
      op: the operation, for error messages.
      arrays: all arrays but the keys, by name.
      keys: keys of any kind.
      k: entries to choose.

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong shape, or k below 1.
    """
    sizes = check_arrays(op, arrays, integers=("layer", "visible_BT", "hidden_BT"))
    check_whole(op, "k", k)
    _check_keys(op, keys, sizes)


def _check_keys(op: str, keys: Any, sizes: dict[str, int]) -> None:
    known = {letter: sizes[letter] for letter in "BJ"}
    if isinstance(keys, Paged):
        paged.check(op, "keys", keys, known, channels="J")
    elif isinstance(keys, Fp8Keys | Fp4Keys):
        fp8, e8m0 = isinstance(keys, Fp8Keys), jnp.float8_e8m0fnu
        check_dtype(op, "keys.codes", keys.codes, jnp.float8_e4m3fn if fp8 else jnp.uint8)
        check_dtype(op, "keys.scale", keys.scale, e8m0, *[jnp.float32] * fp8)
        blocks = 1 if fp8 else sizes["J"] // FP4_BLOCK
        known["H"] = sizes["J"] // 2
        name = "keys.codes_LBSJ" if fp8 else "keys.codes_LBHS"
        known |= check_shape(op, name, keys.codes, known)
        known |= {"G": -(-known["S"] // SCALE_ROW), "E": blocks * SCALE_ROW}
        check_shape(op, "keys.scale_LBGE", keys.scale, known)
    else:
        check_arrays(op, {"keys_LBSJ": keys}, sizes=known)


def clipped(count_BT: Int[Array, "B T"], capacity: int) -> Int32[Array, "B T"]:
    """Counts of entries, clipped to 0 .. capacity."""
    wide = jnp.promote_types(count_BT.dtype, jnp.int32)
    return jnp.clip(count_BT.astype(wide), 0, capacity).astype(jnp.int32)


def gathered(
    keys: Keys, layer: Int[Array, ""], row: Int[Array, "*rows"], entry: Int[Array, "*rows"]
) -> Float[Array, "*rows J"]:
    """Gather any entries of any batch rows; float32 if they were quantised."""
    match keys:
        case Paged():
            return keys.gathered(layer, row, entry)
        case Fp8Keys():
            scale = keys.scale[layer, row, entry // SCALE_ROW, entry % SCALE_ROW]
            codes = keys.codes[layer, row, entry].astype(jnp.float32)
            return codes * scale.astype(jnp.float32)[..., None]
        case Fp4Keys():
            # Indices separated by a slice put their result dims first.
            codes = keys.codes[layer, row, :, entry]
            runs = keys.scale.reshape(*keys.scale.shape[:3], -1, SCALE_ROW)
            scale = runs[layer, row, entry // SCALE_ROW, :, entry % SCALE_ROW]
            return _fp4(codes, scale)
        case _:
            return keys[layer, row, entry]


def block(
    keys: Keys, layer: Int[Array, ""], row: Int[Array, ""], start: Int[Array, ""], width: int
) -> Float[Array, "X J"]:
    """Entries start .. start + width - 1 of a row, as from `gathered`.

    `start` is a multiple of `width`, or the block is the row's last.
    """
    if isinstance(keys, Paged) and keys.shape[2] % width == 0:
        return keys.block(layer, row, start, width)
    if isinstance(keys, Fp8Keys | Fp4Keys | Paged):
        entry_X = start + jnp.arange(width, dtype=start.dtype)
        return gathered(keys, layer, jnp.full_like(entry_X, row), entry_X)
    at = (layer, row, start, jnp.zeros_like(start))
    return jax.lax.dynamic_slice(keys, at, (1, 1, width, keys.shape[3]))[0, 0]


def dense(keys: Keys, layer: Int[Array, ""]) -> Float[Array, "B S J"]:
    """One layer's keys as an array, as from `gathered`."""
    if isinstance(keys, Paged):
        return keys.of_layer(layer)
    if not isinstance(keys, Fp8Keys | Fp4Keys):
        return keys[layer]
    rows = keys.codes.shape[1], entries(keys)
    iota = lambda dim: jax.lax.broadcasted_iota(jnp.int32, rows, dim)
    return gathered(keys, layer, iota(0), iota(1))


def _fp4(codes: Any, scale: Any) -> Float32[Array, "*rows J"]:
    code = jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.int32)
    magnitude = jnp.asarray(_E2M1, jnp.float32)[code & 7]
    scale = jnp.repeat(scale.astype(jnp.float32), FP4_BLOCK, axis=-1)
    return jnp.where(code < 8, magnitude, -magnitude) * scale


def to_fp8(keys_LBSJ: Float[Array, "L B S J"]) -> Fp8Keys:
    """Quantise keys to E4M3 times a power of two per entry, 2^ceil(log2(amax / 448))."""
    scale_LBS1 = _power_of_two(keys_LBSJ, 448.0)
    codes_LBSJ = (keys_LBSJ.astype(jnp.float32) / scale_LBS1).astype(jnp.float8_e4m3fn)
    return Fp8Keys(codes_LBSJ, _in_rows(scale_LBS1)[:, :, :, 0].astype(jnp.float8_e8m0fnu))


def to_fp4(keys_LBSJ: Float[Array, "L B S J"]) -> Fp4Keys:
    """Quantise keys to E2M1 times a power of two per 32 channels, 2^ceil(log2(amax / 6))."""
    *stack, dim = keys_LBSJ.shape
    blocks = keys_LBSJ.astype(jnp.float32).reshape(*stack, -1, FP4_BLOCK)
    scale = _power_of_two(blocks, 6.0)
    # Rounds to nearest, ties to even.
    e2m1 = (blocks / scale).astype(jnp.float4_e2m1fn)
    code = jax.lax.bitcast_convert_type(e2m1, jnp.uint4).astype(jnp.uint8).reshape(*stack, dim)
    packed = code[..., : dim // 2] | code[..., dim // 2 :] << 4
    scale_LBGKE = _in_rows(scale[..., 0]).astype(jnp.float8_e8m0fnu)
    scale_LBGE = scale_LBGKE.reshape(*scale_LBGKE.shape[:3], -1)
    return Fp4Keys(jnp.swapaxes(packed, -1, -2), scale_LBGE)


def _in_rows(scale_LBSK: Float32[Array, "L B S K"]) -> Float32[Array, "L B G K 128"]:
    """Scales of 128 entries next to each other; 1 where there is no entry."""
    L, B, S, K = scale_LBSK.shape
    ends = ((0, 0), (0, 0), (0, -S % SCALE_ROW), (0, 0))
    padded = jnp.pad(scale_LBSK, ends, constant_values=1.0)
    return jnp.swapaxes(padded.reshape(L, B, -1, SCALE_ROW, K), -1, -2)


def _power_of_two(x: Float[Array, "*rows J"], largest: float) -> Float32[Array, "*rows 1"]:
    """The smallest power of two that brings the largest magnitude into range; 2^-126 for zeros."""
    amax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    fraction, exponent = jnp.frexp(amax / largest)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)
    return jnp.ldexp(jnp.ones_like(amax), jnp.maximum(exponent, -126))
