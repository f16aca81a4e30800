"""Top k with the entries sharded: each device selects its k best, and all merge them.

A device's k best include every entry of its slice that is among the global k best, so the merge is
exact. Devices exchange candidates (n * k indices and scores per query), never keys.

Axis letters: as in the package; C candidates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.implementations import Impl, LazyForm, dispatch
from pallas_kernels.indexer_topk import reference, tpu, xla
from pallas_kernels.indexer_topk.keys import Keys, check, clipped, entries, gathered

_FORMS = {"tpu": tpu, "gpu": LazyForm(f"{__package__}.gpu"), "xla": xla, "reference": reference}


def select_sharded(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys: Keys,
    layer: Int[Array, ""],
    visible_BT: Int[Array, "B T"],
    hidden_BT: Int[Array, "B T"] | None = None,
    *,
    k: int,
    axis: str,
    impl: Impl = "auto",
) -> Int32[Array, "B T k"]:
    """`select` over entries that are sharded along a mesh axis.

    Call it inside `jax.shard_map` with `check_vma=False`: JAX cannot infer that every device
    returns the same result.

    Args:
      q_BTIJ: index queries, the same on every device.
      weights_BTI: each head's weight.
      keys: this device's slice: entries d * S .. (d + 1) * S - 1 on device d of the axis.
      layer: the layer to read.
      visible_BT: the query sees the entries below this, counted over all slices.
      hidden_BT: must be None; supported by `select` only.
      k: entries to choose, 1 or more.
      axis: the mesh axis.
      impl: form of the local selection.
    Returns:
      Indices into the entries of all slices, ascending, then -1; the same on every device.
    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError, ValueError: as for `select`.
    """
    if hidden_BT is not None:
        raise NotImplementedError("indexer_topk.select_sharded does not take hidden_BT.")
    arrays = {"q_BTIJ": q_BTIJ, "weights_BTI": weights_BTI, "layer": layer}
    check("indexer_topk.select_sharded", arrays | {"visible_BT": visible_BT}, keys, k)
    slice_size = entries(keys)
    if 0 in (*visible_BT.shape, slice_size):
        return jnp.full((*visible_BT.shape, k), -1, jnp.int32)
    first = jax.lax.axis_index(axis).astype(jnp.int32) * slice_size
    visible_BT = clipped(visible_BT, slice_size * jax.lax.axis_size(axis))
    local_visible_BT = clipped(visible_BT - first, slice_size)
    args = q_BTIJ, weights_BTI, keys, jnp.asarray(layer), local_visible_BT
    args = jax.lax.stop_gradient(args)
    local_BTk = dispatch("indexer_topk", "select", impl, _FORMS, *args, k=min(k, slice_size))
    score_BTk = _scores_of(*args[:4], local_BTk)
    index_BTk = jnp.where(local_BTk >= 0, local_BTk + first, -1)
    gather = lambda x: jax.lax.all_gather(x, axis, axis=2, tiled=True)
    return merged(gather(score_BTk), gather(index_BTk), k)


def _scores_of(
    q_BTIJ: Float[Array, "B T I J"],
    weights_BTI: Float[Array, "B T I"],
    keys: Keys,
    layer: Int[Array, ""],
    index_BTk: Int32[Array, "B T k"],
) -> Float32[Array, "B T k"]:
    """Scores of the chosen entries, recomputed from their keys; arbitrary where there is none."""
    rows = jax.lax.broadcasted_iota(jnp.int32, index_BTk.shape, 0)
    keys_BTkJ = gathered(keys, layer, rows, jnp.maximum(index_BTk, 0))
    flat = lambda x: x.reshape(-1, 1, *x.shape[2:])
    score_R1k = reference.scores(
        flat(q_BTIJ), flat(weights_BTI), keys_BTkJ.reshape(-1, *keys_BTkJ.shape[2:])
    )
    return score_R1k.reshape(index_BTk.shape)


def merged(
    score_BTC: Float32[Array, "B T C"], index_BTC: Int32[Array, "B T C"], k: int
) -> Int32[Array, "B T k"]:
    """Indices of the k best candidates, ascending, then -1; a missing candidate has index -1."""
    missing = max(0, k - index_BTC.shape[2])
    score_BTC, index_BTC = (
        jnp.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
        for x in (score_BTC, index_BTC)
    )
    worst = jnp.iinfo(jnp.int32).max
    rank_BTC = jnp.where(index_BTC < 0, worst, ~reference.ordered(score_BTC))
    best_BTk = jax.lax.sort((rank_BTC, index_BTC), num_keys=2)[1][..., :k]
    chosen_BTk = jnp.sort(jnp.where(best_BTk < 0, worst, best_BTk))
    return jnp.where(chosen_BTk == worst, -1, chosen_BTk)
