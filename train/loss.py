"""What training minimises: the cross-entropy of trained tokens, and MTP's beside it.

Axis letters: B batch, T tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from v4jax import model as models
from v4jax.config import ModelConfig
from v4jax.model import Model
from v4jax.numerics import Numerics

Batch = dict[
    str, Array
]  # tokens, trained, document: [B, T] each, as v4jax_train.dataset makes them
_CHUNK = 512  # tokens of a row whose logits exist at a time


def sums(
    model: Model,
    cfg: ModelConfig,
    numerics: Numerics,
    batch: Batch,
    *,
    mtp: bool = False,
    remat: bool = False,
) -> dict[str, Float32[Array, ""]]:
    """Sums over a batch, to be divided by those of all batches of a step.

    Args:
      model: the weights.
      cfg: the configuration that they are of.
      numerics: where rounding happens.
      batch: `tokens` and `document` as `models.forward_rows` takes them, [B, T]; `trained` whether
        a token is to be predicted.
      mtp: predict the token after the next too, within a document.
      remat: compute activations anew in the backward pass.

    Returns:
      `loss` the sum of the trained tokens' cross-entropies, in nats; `mtp_loss` the same of MTP.
    """
    streams_BTM, shared = models.forward_rows(
        model, cfg, numerics, batch["tokens"], batch["document"], remat=remat
    )
    found = {"loss": _predict(model, models.hidden(model, cfg, streams_BTM), batch, ahead=1)}
    if mtp:
        hidden_BTD = models.draft_rows(model, streams_BTM, shared, remat=remat)
        found["mtp_loss"] = _predict(model, hidden_BTD, batch, ahead=2)
    return found


def counts(batch: Batch, *, mtp: bool = False) -> dict[str, Float32[Array, ""]]:
    """How many tokens are in each of the `sums` over all of a batch, whatever its leading dims."""
    ahead = {"loss": 1, "mtp_loss": 2} if mtp else {"loss": 1}
    count = lambda places: jnp.sum(_trained(batch, places), dtype=jnp.float32)
    return {name: count(places) for name, places in ahead.items()}


def _later(x: Shaped[Array, "*rows T"], ahead: int) -> Shaped[Array, "*rows T"]:
    """What stands so many places ahead, zeros at the end."""
    return jnp.pad(x[..., ahead:], [(0, 0)] * (x.ndim - 1) + [(0, ahead)])


def _trained(batch: Batch, ahead: int) -> Bool[Array, "*rows T"]:
    """Where the token so many places ahead is to be predicted; it must be of the same document."""
    document = batch["document"]
    same = (_later(document, ahead) == document) & (document > 0)
    return _later(batch["trained"], ahead) & same


def _predict(
    model: Model, hidden_BTD: Float[Array, "B T D"], batch: Batch, *, ahead: int
) -> Float32[Array, ""]:
    targets_BT = _later(batch["tokens"], ahead)
    return cross_entropy(model, hidden_BTD, targets_BT, _trained(batch, ahead))


def cross_entropy(
    model: Model,
    hidden_BTD: Float[Array, "B T D"],
    target_BT: Int[Array, "B T"],
    trained_BT: Bool[Array, "B T"],
) -> Float32[Array, ""]:
    """The sum of cross-entropies where `trained`.

    Logits of a few hundred tokens per row exist at a time, in the backward pass too.
    """
    length = hidden_BTD.shape[1]
    chunk = next(size for size in range(min(_CHUNK, length), 0, -1) if length % size == 0)
    parts = lambda x: jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden_BCD, target_BC, trained_BC = part
        logits_BCV = models.head(model, hidden_BCD)
        found_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - found_BC
        return total + jnp.sum(jnp.where(trained_BC, loss_BC, 0.0)), None

    every = parts(hidden_BTD), parts(target_BT), parts(trained_BT)
    return jax.lax.scan(of_chunk, jnp.float32(0.0), every)[0]
