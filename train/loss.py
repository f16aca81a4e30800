"""What training minimises: the cross-entropy of trained tokens, and what stands beside it.

Axis letters: B batch, T tokens, N chunks, C tokens of a chunk, D hidden, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from v4jax.model import layers, transformer
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.transformer import Model

from . import balance

Batch = dict[str, Array]  # [B, T] each, as `dataset` makes them
# As many logits exist at a time, or those of as many tokens of each row, whichever is more.
_LOGITS, _TOKENS = 1 << 24, 512
# How many places ahead the token is that a hidden state predicts.
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
    remat: bool = False,
    unroll: bool = False,
) -> tuple[dict[str, Float32[Array, ""]], dict[str, Float32[Array, "L E"]]]:
    """Sums over a batch, to be divided by the `counts` of all batches of a step.

    Args:
      model: the weights.
      cfg: the configuration that they are of.
      numerics: where rounding happens.
      batch: `tokens` and `document` as `models.forward_rows` takes them, [B, T]; `trained` whether
        a token is to be predicted.
      mtp: predict the token after the next too, within a document.
      agreement: count where MTP's most probable token is the model's too.
      indexer: compare sparse attention's indexers with it.
      remat: as for `v4jax.model.transformer.forward_rows`.
      unroll: the same.

    Returns:
      Sums: `loss` of the trained tokens' cross-entropies, in nats; `mtp_loss` the same of MTP;
      `mtp_agreement`, of those tokens, how many a greedy decoder would take from MTP;
      `balance_loss` and `indexer_loss` over all tokens and layers. And how many tokens chose each
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
    found = {"loss": _predict(model, hidden_BTD, batch, "loss")}
    drafters = []
    if mtp:
        drafted_BTD, seen = transformer.draft_rows(
            model, streams_BTM, shared, remat=remat, watch=balance.watch
        )
        found["mtp_loss"] = _predict(model, drafted_BTD, batch, "mtp_loss")
        drafters.append(seen)
        if agreement:
            same_BT = _later(_greedy(model, hidden_BTD), 1) == _greedy(model, drafted_BTD)
            counted_BT = same_BT & _trained(batch, "mtp_agreement")
            found["mtp_agreement"] = jnp.sum(counted_BT, dtype=jnp.float32)
    for name in ("balance_loss", "indexer_loss") if indexer else ("balance_loss",):
        found[name] = _over_layers(name, [*watched, *drafters])
    return found, balance.biases(watched, drafters)


def _over_layers(name: str, watched: list[list[dict[str, Array]]]) -> Float32[Array, ""]:
    found = [jnp.sum(kept[name]) for part in watched for kept in part if name in kept]
    return sum(found, jnp.float32(0.0))


def counts(batch: Batch, names: Any) -> dict[str, Float32[Array, ""]]:
    """What each of the named `sums` is divided by, over a batch with any leading dims."""
    count = lambda marks: jnp.sum(marks, dtype=jnp.float32)
    tokens = count(batch["document"] > 0)
    return {name: count(_trained(batch, name)) if name in _AHEAD else tokens for name in names}


def _later(x: Shaped[Array, "*rows T"], ahead: int) -> Shaped[Array, "*rows T"]:
    """What stands so many places ahead, zeros at the end."""
    return jnp.pad(x[..., ahead:], [(0, 0)] * (x.ndim - 1) + [(0, ahead)])


def _trained(batch: Batch, name: str) -> Bool[Array, "*rows T"]:
    """Where the token that a loss predicts is to be trained; it must be of the same document."""
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
    """The sum of cross-entropies where `trained`.

    Logits of a part of the tokens exist at a time, in the backward pass too.
    """

    @jax.checkpoint
    def of_chunk(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden_BCD, target_BC, trained_BC = part
        logits_BCV = transformer.head(model, hidden_BCD)
        found_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - found_BC
        return total + jnp.sum(jnp.where(trained_BC, loss_BC, 0.0)), None

    every = tuple(_chunks(model, x) for x in (hidden_BTD, target_BT, trained_BT))
    return jax.lax.scan(of_chunk, jnp.float32(0.0), every)[0]


def _chunks(model: Model, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "N B C *rest"]:
    rows, length = x.shape[:2]
    vocabulary = layers.value(model.head_VD).shape[0]
    most = min(max(_TOKENS, _LOGITS // (rows * vocabulary)), length)
    chunk = next(size for size in range(most, 0, -1) if length % size == 0)
    return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)


def _greedy(model: Model, hidden_BTD: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """The most probable token at each place."""
    choose = lambda hidden_BCD: jnp.argmax(transformer.head(model, hidden_BCD), axis=-1)
    chosen_NBC = jax.lax.map(choose, _chunks(model, hidden_BTD))
    return jnp.moveaxis(chosen_NBC, 0, 1).reshape(hidden_BTD.shape[:2])
