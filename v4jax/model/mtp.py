"""The multi-token prediction block of the preview checkpoints (report, section 2).

Position t takes the backbone's streams at t and the embedding of token t + 1, and predicts token
t + 2. Its attention is sliding; embedding and head are the model's.

Axis letters: B batch, T tokens, D hidden, N streams, M = N * D.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.residuals import Remat
from v4jax.model import hyper, layers
from v4jax.model.block import Stack, Watch, run_stack, train_stack
from v4jax.model.cache import LayerCache
from v4jax.model.config import ModelConfig
from v4jax.model.context import Context
from v4jax.model.params import Declare
from v4jax.model.segments import mtp_segment


class Mtp(nnx.Module):
    """Weights of one MTP block."""

    def __init__(self, cfg: ModelConfig) -> None:
        weight, D = Declare(std=cfg.initializer_range), cfg.hidden_size
        self.embed_DD = weight((D, D), (None, None), "fp8")
        self.streams_DD = weight((D, D), (None, None), "fp8")
        self.embed_norm_D = weight((D,), (None,), constant=1.0)
        self.streams_norm_D = weight((D,), (None,), constant=1.0)
        self.stack = Stack(cfg, mtp_segment(cfg))
        self.hyper_head = hyper.HyperHead(cfg, weight)
        self.norm_D = weight((D,), (None,), constant=1.0)


def run(
    p: Mtp,
    streams_BTM: Float[Array, "B T M"],
    embedded_BTD: Float[Array, "B T D"],
    state: LayerCache,
    context: Context,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T M"], LayerCache]:
    """The normed hidden state for the head, the block's streams, and its cache.

    Args:
      p: the weights.
      streams_BTM: the backbone's streams, before their final collapse.
      embedded_BTD: the embedding of each position's next token.
      state: the block's own cache.
      context: context of the next tokens, at the positions of `streams_BTM`.
    """
    cfg = context.cfg
    x_BTM = _mixed(p, streams_BTM, embedded_BTD, context)
    x_BTM, (state,), _ = run_stack(p.stack, x_BTM, (state,), mtp_segment(cfg), context)
    return hyper.collapse(p.hyper_head, x_BTM, p.norm_D, cfg), x_BTM, state


def run_rows(
    p: Mtp,
    streams_BTM: Float[Array, "B T M"],
    embedded_BTD: Float[Array, "B T D"],
    context: Context,
    *,
    remat: Remat,
    watch: Watch | None,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """`run` over entire rows without a cache: the hidden state, and the results of `watch`."""
    cfg = context.cfg
    x_BTM = _mixed(p, streams_BTM, embedded_BTD, context)
    part = mtp_segment(cfg)
    x_BTM, watched = train_stack(p.stack, x_BTM, part, context, remat=remat, watch=watch)
    return hyper.collapse(p.hyper_head, x_BTM, p.norm_D, cfg), watched


def _mixed(
    p: Mtp,
    streams_BTM: Float[Array, "B T M"],
    embedded_BTD: Float[Array, "B T D"],
    context: Context,
) -> Float[Array, "B T M"]:
    cfg = context.cfg
    eps = cfg.rms_norm_eps
    embedded_BTD = layers.rms_norm(embedded_BTD, p.embed_norm_D, eps)
    embedded_BTD = layers.linear(embedded_BTD, p.embed_DD)
    x_BTND = streams_BTM.reshape(*streams_BTM.shape[:2], cfg.hc_mult, cfg.hidden_size)
    x_BTND = layers.linear(layers.rms_norm(x_BTND, p.streams_norm_D, eps), p.streams_DD)
    return x_BTND.reshape(streams_BTM.shape) + hyper.expand(embedded_BTD, cfg)
