"""Losses: the cross-entropy of trained tokens, and auxiliary ones.

Axis letters: B batch, T tokens, N chunks, C tokens of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from pallas_kernels.residuals import Remat
from v4jax.model import layers, sharding, storage, transformer
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.sharding import ROWS
from v4jax.model.transformer import Model

from . import balance

Batch = dict[str, Array]  # [B, T] each, from `dataset`
# Limits of a chunk of logits: this many logits, or this many tokens per row if that is more.
_LOGITS, _TOKENS = 1 << 24, 512
# How many positions ahead of a hidden state the predicted token is.
_AHEAD = {"loss": 1, "mtp_loss": 2, "mtp_agreement": 2}


def sums(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    batch: Batch,
    *,
    mtp: bool = False,
    agreement: bool = False,
    indexer: bool = False,
    remat: Remat | Sequence[Remat] = "light",
    unroll: bool = False,
) -> tuple[dict[str, Float32[Array, ""]], dict[str, Float32[Array, "L E"]]]:
    """Sums over a batch, to be divided by the `counts` of all batches of a step.

    Args:
      model: the model.
      cfg: the model's configuration.
      numerics: where rounding happens.
      batch: `tokens` and `document` as for `transformer.forward_rows`, and `trained`, whether each
        token is a training target; [B, T].
      mtp: also predict the token after the next one, within a document.
      agreement: count how often MTP's most probable token is the model's too.
      indexer: compare sparse attention's indexers with the attention.
      remat: as for `v4jax.model.transformer.forward_rows`; MTP has the last segment's.
      unroll: as for `v4jax.model.transformer.forward_rows`.

    Returns:
      Sums: `loss`, the trained tokens' cross-entropies in nats; `mtp_loss`, the same for MTP;
      `mtp_agreement`, how many of the latter tokens a greedy decoder would accept from MTP;
      `balance_loss` and `indexer_loss`, over all tokens and layers. And how many tokens chose each
      expert, by the name of the router's bias.
    """
    tokens_BT, document_BT = batch["tokens"], batch["document"]
    streams_BTM, shared, watched = transformer.forward_rows(
        model,
        cfg,
        numerics,
        tokens_BT,
        document_BT,
        remat=remat,
        unroll=unroll,
        watch=balance.watch,
        watch_indexer=indexer,
    )
    hidden_BTD = transformer.hidden(model, cfg, streams_BTM)
    losses = {"loss": _predict(model, hidden_BTD, batch, "loss")}
    drafters = []
    if mtp:
        last = remat if isinstance(remat, str) else remat[-1]
        drafted_BTD, seen = transformer.draft_rows(
            model, streams_BTM, shared, remat=last, watch=balance.watch
        )
        losses["mtp_loss"] = _predict(model, drafted_BTD, batch, "mtp_loss")
        drafters.append(seen)
        if agreement:
            losses["mtp_agreement"] = _agreement(model, hidden_BTD, drafted_BTD, batch)
    for name in ("balance_loss", "indexer_loss") if indexer else ("balance_loss",):
        losses[name] = _over_layers(name, [*watched, *drafters])
    return losses, balance.biases(watched, drafters)


def _agreement(
    model: Model,
    hidden_BTD: Float[Array, "B T D"],
    drafted_BTD: Float[Array, "B T D"],
    batch: Batch,
) -> Float32[Array, ""]:
    """How many of the trained tokens a greedy decoder would accept from MTP."""
    same_BT = _later(_greedy(model, hidden_BTD), 1) == _greedy(model, drafted_BTD)
    return jnp.sum(same_BT & _trained(batch, "mtp_agreement"), dtype=jnp.float32)


def _over_layers(name: str, watched: list[list[dict[str, Array]]]) -> Float32[Array, ""]:
    values = [jnp.sum(layer[name]) for part in watched for layer in part if name in layer]
    return sum(values, jnp.float32(0.0))


def counts(batch: Batch, names: Any) -> dict[str, Float32[Array, ""]]:
    """The divisor of each of the named `sums`, for a batch with any leading dims."""
    count = lambda marks: jnp.sum(marks, dtype=jnp.float32)
    tokens = count(batch["document"] > 0)
    return {name: count(_trained(batch, name)) if name in _AHEAD else tokens for name in names}


def _later(x: Shaped[Array, "*rows T"], ahead: int) -> Shaped[Array, "*rows T"]:
    """The values `ahead` positions later, zeros at the end."""
    return jnp.pad(x[..., ahead:], [(0, 0)] * (x.ndim - 1) + [(0, ahead)])


def _trained(batch: Batch, name: str) -> Bool[Array, "*rows T"]:
    """Where the token that a loss predicts is trained and of the same document."""
    document, ahead = batch["document"], _AHEAD[name]
    same = (_later(document, ahead) == document) & (document > 0)
    return _later(batch["trained"], ahead) & same


def _predict(
    model: Model, hidden_BTD: Float[Array, "B T D"], batch: Batch, name: str
) -> Float32[Array, ""]:
    targets_BT = _later(batch["tokens"], _AHEAD[name])
    return cross_entropy(model, hidden_BTD, targets_BT, _trained(batch, name))


def cross_entropy(
    model: Model,
    hidden_BTD: Float[Array, "B T D"],
    target_BT: Int[Array, "B T"],
    trained_BT: Bool[Array, "B T"],
) -> Float32[Array, ""]:
    """The sum of the trained tokens' cross-entropies.

    Only the logits of a chunk of tokens exist at a time, also in the backward pass; on a mesh, each
    device has those of its rows and of its part of the vocabulary.
    """
    rows = len(hidden_BTD)
    vocabulary = layers.value(model.head_VD).shape[0]

    def run(
        hidden_BTD: Array, target_BT: Array, trained_BT: Array, weight_VD: Any, _: Any
    ) -> Array:
        is_split = len(weight_VD) < vocabulary
        axes = sharding.mesh_axes("vocab") if is_split else ()

        @jax.checkpoint
        def of_chunk(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
            hidden_BCD, target_BC, trained_BC = part
            logits_BCV = transformer.logits(hidden_BCD, weight_VD)
            loss_BC = _cross_entropy(logits_BCV, target_BC, axes)
            return total + jnp.sum(jnp.where(trained_BC, loss_BC, 0.0)), None

        chunks = tuple(_chunks(x, len(weight_VD)) for x in (hidden_BTD, target_BT, trained_BT))
        total = jax.lax.scan(of_chunk, jnp.float32(0.0), chunks)[0]
        return jax.lax.psum(total, sharding.mesh_axes("batch")) if len(hidden_BTD) < rows else total

    return storage.per_device(
        run,
        *(hidden_BTD, target_BT, trained_BT),
        weight=model.head_VD,
        axes=(ROWS, ROWS, ROWS),
        weight_axes=("vocab", None),
        out=(),
    )


def _cross_entropy(
    logits_BCV: Float32[Array, "B C V"], target_BC: Int[Array, "B C"], axes: tuple[str, ...]
) -> Float32[Array, "B C"]:
    """Cross-entropies; `axes` are the mesh axes over which the vocabulary is split, if any."""
    vocabulary = logits_BCV.shape[-1]
    largest_BC1 = jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1, keepdims=True))
    if axes:
        largest_BC1 = jax.lax.pmax(largest_BC1, axes)
        target_BC = target_BC - jax.lax.axis_index(axes) * vocabulary
    is_here_BC = (target_BC >= 0) & (target_BC < vocabulary)
    index_BC1 = jnp.clip(target_BC, 0, vocabulary - 1)[..., None]
    logit_BC = jnp.take_along_axis(logits_BCV, index_BC1, axis=-1)[..., 0]
    logit_BC = jnp.where(is_here_BC, logit_BC, 0.0)
    sum_BC = jnp.sum(jnp.exp(logits_BCV - largest_BC1), axis=-1)
    if axes:
        logit_BC, sum_BC = jax.lax.psum((logit_BC, sum_BC), axes)
    return jnp.log(sum_BC) + largest_BC1[..., 0] - logit_BC


def _chunks(x: Shaped[Array, "B T *rest"], vocabulary: int) -> Shaped[Array, "N B C *rest"]:
    rows, length = x.shape[:2]
    most = min(max(_TOKENS, _LOGITS // (rows * vocabulary)), length)
    chunk = next(size for size in range(most, 0, -1) if length % size == 0)
    return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)


def _greedy(model: Model, hidden_BTD: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """The most probable token at each position."""
    choose = lambda hidden_BCD: jnp.argmax(transformer.head(model, hidden_BCD), axis=-1)
    chosen_NBC = jax.lax.map(choose, _chunks(hidden_BTD, layers.value(model.head_VD).shape[0]))
    return jnp.moveaxis(chosen_NBC, 0, 1).reshape(hidden_BTD.shape[:2])
