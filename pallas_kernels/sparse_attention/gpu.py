"""Attention to listed entries by a Pallas kernel for Hopper GPUs (Mosaic).

The window is a list too: of the rows of its ring that a query sees, or of the rows before it. So
one kernel serves decode and prefill, and gathers window and entries alike, each in place. If there
are few queries, each query's list is split among multiprocessors, and XLA merges the parts;
otherwise the kernel's result, which includes the sink, is final.

Axis letters: as in the package; r rows of the window listed, Z parts of a list.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.byte_rows import FP8
from pallas_kernels.implementations import Unsupported
from pallas_kernels.paged import Paged
from pallas_kernels.sparse_attention import gpu_gather
from pallas_kernels.sparse_attention.gpu_attend import HEADS, attend
from pallas_kernels.sparse_attention.gpu_gather import CHUNK
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.rows import Fp8Rows

_MULTIPROCESSORS = 132


def decode(inputs: DecodeInputs, *, scale: float) -> Float[Array, "B T H K"]:
    """Attend to lists of the window's rows and of entries.

    Raises:
      Unsupported: dtypes other than bfloat16, or heads or channels that do not fill tiles.
    """
    row_R = jnp.arange(inputs.window_BRK.shape[1], dtype=jnp.int32)
    near_BTr = jnp.where(inputs.window_mask_BTR, row_R[None, None], -1)
    return _attend(inputs, inputs.window_BRK, near_BTr, scale)


def prefill(inputs: PrefillInputs, *, window: int, scale: float) -> Float[Array, "B T H K"]:
    """Like `decode`; query j sees the rows j + 1 .. j + window of its chunk's window.

    Raises:
      Unsupported: as for `decode`, and for rows of several documents.
    """
    if inputs.first_BT is not None:
        raise Unsupported("sparse_attention.prefill on GPUs does not take first_BT.")
    near_BTr = window_rows(inputs.start_B, inputs.q_BTHK.shape[1], window)
    return _attend(inputs, inputs.window_BXK, near_BTr, scale)


def window_rows(start_B: Int[Array, " B"], queries: int, window: int) -> Int32[Array, "B T r"]:
    """Rows of a chunk's window that each query sees, -1 for negative positions."""
    row_Tr = jnp.arange(queries, dtype=jnp.int32)[:, None] + 1 + jnp.arange(window)[None]
    position_BTr = start_B.astype(jnp.int32)[:, None, None] - window + row_Tr[None]
    return jnp.where(position_BTr >= 0, row_Tr[None], -1)


def parts_of(chunks: int, blocks: int) -> int:
    """Number of parts to split a list into: enough to fill the GPU once, and none empty."""
    most = max(1, min(chunks, _MULTIPROCESSORS // blocks))
    return -(-chunks // -(-chunks // most))


def joined(
    value_BTZHK: Float32[Array, "B T Z H K"], lse_BTZH: Float32[Array, "B T Z H"]
) -> Float32[Array, "B T H K"]:
    """Merge parts: the mean of their values, weighted by exp(lse)."""
    largest_BT1H = jnp.max(lse_BTZH, axis=2, keepdims=True)
    largest_BT1H = jnp.where(largest_BT1H == -jnp.inf, 0.0, largest_BT1H)
    weight_BTZH = jnp.exp(lse_BTZH - largest_BT1H)
    total_BTH = jnp.sum(weight_BTZH, axis=2)
    value_BTHK = jnp.sum(value_BTZHK * weight_BTZH[..., None], axis=2)
    return value_BTHK / jnp.where(total_BTH == 0, 1.0, total_BTH)[..., None]


def _attend(
    inputs: DecodeInputs | PrefillInputs,
    window_BRK: Float[Array, "B R K"],
    near_BTr: Int[Array, "B T r"],
    scale: float,
) -> Float[Array, "B T H K"]:
    pool, far_BTk = inputs.pool_LBSK, inputs.indices_BTk
    if isinstance(pool, Paged):
        pool, far_BTk = _in_one_row(pool, far_BTk)
    _check(inputs.q_BTHK, window_BRK, pool)
    B, T, H, _ = inputs.q_BTHK.shape
    near_BTr, far_BTk = _full_chunks(near_BTr), _full_chunks(far_BTk)
    rows_BTX = jnp.concatenate([near_BTr, far_BTk], axis=2)
    parts = parts_of(rows_BTX.shape[2] // CHUNK, B * T * (H // HEADS))
    rows_BTX = _padded(rows_BTX, parts * CHUNK)
    value_BTZHK, lse_BTZH = attend(
        inputs.q_BTHK,
        window_BRK,
        pool,
        inputs.layer,
        rows_BTX,
        inputs.sink_H.astype(jnp.float32),
        near=near_BTr.shape[2],
        parts=parts,
        scale=scale,
    )
    if parts == 1:
        return value_BTZHK[:, :, 0]
    return joined(value_BTZHK, lse_BTZH).astype(inputs.q_BTHK.dtype)


def _in_one_row(
    pool: Paged, indices_BTk: Int[Array, "B T k"]
) -> tuple[Float[Array, "L 1 S K"] | Fp8Rows, Int32[Array, "B T k"]]:
    """All pages one after another, as one row that the batch shares, and lists of its entries."""
    layers, pages, size, width = pool.pages.shape
    place_BTk, within_BTk = jnp.divmod(jnp.maximum(indices_BTk.astype(jnp.int32), 0), size)
    row_B11 = jnp.arange(indices_BTk.shape[0], dtype=jnp.int32)[:, None, None]
    page_BTk = pool.table.astype(jnp.int32).at[row_B11, place_BTk].get(mode="clip")
    entry_BTk = jnp.clip(page_BTk, 0, pages - 1) * size + within_BTk
    one_row = pool.pages.reshape(layers, 1, -1, width)
    stored = Fp8Rows(one_row) if pool.codec == FP8 else one_row
    return stored, jnp.where(indices_BTk < 0, -1, entry_BTk)


def _full_chunks(rows_BTX: Int[Array, "B T X"]) -> Int32[Array, "B T Y"]:
    return _padded(rows_BTX.astype(jnp.int32), CHUNK)


def _padded(rows_BTX: Int32[Array, "B T X"], unit: int) -> Int32[Array, "B T Y"]:
    missing = -rows_BTX.shape[2] % unit
    return jnp.pad(rows_BTX, ((0, 0), (0, 0), (0, missing)), constant_values=-1)


def _check(q_BTHK: Array, window_BRK: Array, pool_LBSK: Float[Array, "L B S K"] | Fp8Rows) -> None:
    gpu_gather.check(pool_LBSK)
    if q_BTHK.dtype != jnp.bfloat16 or window_BRK.dtype != jnp.bfloat16:
        raise Unsupported(
            f"The GPU kernel takes queries and window in bfloat16, not {q_BTHK.dtype} and "
            f"{window_BRK.dtype}."
        )
    B, T, H, K = q_BTHK.shape
    if H % HEADS or K % 128 or K > 512 or 0 in (B, T, H, window_BRK.shape[1], pool_LBSK.shape[2]):
        raise Unsupported(
            f"The GPU kernel takes heads in multiples of {HEADS}, 128, 256, 384 or 512 channels, "
            f"and no empty arrays, not queries {q_BTHK.shape}, window {window_BRK.shape} and pool "
            f"{pool_LBSK.shape}."
        )
