"""Gathers each query's entries, a few queries at a time, beside its own window.

Axis letters: as in the package; Q queries of a block, Y keys of its window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax

_QUERIES = 16


def decode(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    window_mask_BTR: Bool[Array, "B T R"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    scale: float,
) -> Float[Array, "B T H K"]:
    def one(row: Any) -> Any:
        return _attend(
            q_BTHK[row],
            window_BRK[row],
            window_mask_BTR[row],
            pool_LBSK,
            layer,
            row,
            indices_BTk[row],
            sink_H,
            scale,
        )

    return jax.lax.map(one, jnp.arange(q_BTHK.shape[0], dtype=jnp.int32))


def prefill(
    q_BTHK: Float[Array, "B T H K"],
    window_BXK: Float[Array, "B X K"],
    start_B: Int[Array, " B"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    indices_BTk: Int[Array, "B T k"],
    sink_H: Float[Array, " H"],
    *,
    window: int,
    scale: float,
) -> Float[Array, "B T H K"]:
    batch, queries = indices_BTk.shape[:2]
    block = min(queries, _QUERIES)
    blocks = -(-queries // block)
    pad = lambda x, fill: jnp.pad(
        x,
        ((0, 0), (0, blocks * block - queries), *((0, 0),) * (x.ndim - 2)),
        constant_values=fill,
    )
    padded_q, padded_window, padded_indices = (
        pad(q_BTHK, 0),
        pad(window_BXK, 0),
        pad(indices_BTk, -1),
    )

    def one(index: Any) -> Any:
        row, first = index // blocks, index % blocks * block
        take = lambda x, size=block: jax.lax.dynamic_slice_in_dim(x[row], first, size)
        e_Y, j_Q1 = jnp.arange(block + window), jnp.arange(block)[:, None]
        exists_Y = start_B[row] - window + first + e_Y >= 0
        near_QY = (e_Y[None] > j_Q1) & (e_Y[None] <= j_Q1 + window) & exists_Y[None]
        return _attend(
            take(padded_q),
            take(padded_window, block + window),
            near_QY,
            pool_LBSK,
            layer,
            row,
            take(padded_indices),
            sink_H,
            scale,
        )

    out = jax.lax.map(one, jnp.arange(batch * blocks, dtype=jnp.int32))
    return out.reshape(batch, blocks * block, *q_BTHK.shape[2:])[:, :queries]


def _attend(
    q_QHK: Float[Array, "Q H K"],
    window_YK: Float[Array, "Y K"],
    mask_QY: Bool[Array, "Q Y"],
    pool_LBSK: Float[Array, "L B S K"],
    layer: Int[Array, ""],
    row: Int[Array, ""],
    indices_Qk: Int[Array, "Q k"],
    sink_H: Float[Array, " H"],
    scale: float,
) -> Float[Array, "Q H K"]:
    """All heads of a block of queries of one row: the window together, entries query by query."""
    queries, heads, dim = q_QHK.shape
    seen_Y = jnp.any(mask_QY, axis=0)
    window_YK = jnp.where(seen_Y[:, None], window_YK, jnp.zeros((), window_YK.dtype))
    # Rows are query by query here, so that a query's heads lie together.
    q_RK = q_QHK.reshape(queries * heads, dim)
    near = softmax.part(q_RK, window_YK, jnp.repeat(mask_QY, heads, axis=0), scale)
    listed_Qk = indices_Qk >= 0
    chosen_QkK = pool_LBSK[layer, row, jnp.maximum(indices_Qk, 0)]
    chosen_QkK = jnp.where(listed_Qk[..., None], chosen_QkK, jnp.zeros((), chosen_QkK.dtype))

    def entries(q_HK: Any, chosen_kK: Any, listed_k: Any) -> softmax.Part:
        mask_Hk = jnp.broadcast_to(listed_k[None], (heads, listed_k.shape[0]))
        return softmax.part(q_HK, chosen_kK, mask_Hk, scale)

    if queries == 1:
        far = entries(q_QHK[0], chosen_QkK[0], listed_Qk[0])
    else:
        far = jax.vmap(entries)(q_QHK, chosen_QkK, listed_Qk)
        far = jax.tree.map(lambda x: x.reshape(queries * heads, *x.shape[2:]), far)
    out_RK = softmax.finish(softmax.merge(near, far), jnp.tile(sink_H.astype(jnp.float32), queries))
    return out_RK.reshape(queries, heads, dim).astype(q_QHK.dtype)
