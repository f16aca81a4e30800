"""Weights of the hyper-connections around each sublayer, and of the final collapse.

Axis letters: B batch, T tokens, N streams, D hidden, M = N * D, Q mixing weights (2N + N * N).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import hyper
from pallas_kernels.residuals import saveable
from v4jax.model import sharding
from v4jax.model.config import ModelConfig
from v4jax.model.context import Context
from v4jax.model.layers import rms_norm, value
from v4jax.model.params import Declare
from v4jax.model.sharding import ROWS


class HyperConnection(nnx.Module):
    """How a sublayer reads from and writes to the streams (report, section 2.2)."""

    def __init__(self, cfg: ModelConfig, weight: Declare) -> None:
        mixes = cfg.hc_mult * (2 + cfg.hc_mult)
        self.fn_QM = weight((mixes, cfg.hc_mult * cfg.hidden_size), (None, None), "f32")
        self.base_Q = weight((mixes,), (None,), "f32", constant=0.0)
        self.scale_3 = weight((3,), (None,), "f32", constant=1.0)


class HyperHead(nnx.Module):
    """The collapse of the streams before the final norm."""

    def __init__(self, cfg: ModelConfig, weight: Declare) -> None:
        streams = cfg.hc_mult
        self.fn_NM = weight((streams, streams * cfg.hidden_size), (None, None), "f32")
        self.base_N = weight((streams,), (None,), "f32", constant=0.0)
        self.scale_1 = weight((1,), (None,), "f32", constant=1.0)


def around(
    p: HyperConnection,
    x_BTM: Float[Array, "B T M"],
    norm_D: Any,
    context: Context,
    sublayer: Callable[[Any], tuple[Any, Any]],
) -> tuple[Float[Array, "B T M"], Any]:
    """Collapse, norm, run `sublayer`, and mix its output into the streams.

    Returns the new streams, and the second output of the sublayer.
    """
    cfg = context.cfg
    pre = functools.partial(
        hyper.pre,
        streams=cfg.hc_mult,
        steps=cfg.hc_sinkhorn_iters,
        eps=cfg.hc_eps,
        norm_eps=cfg.rms_norm_eps,
    )
    weights = value(p.fn_QM), value(p.base_Q), value(p.scale_3)
    input_BTD, post_BTN, comb_BTNN = saveable(
        sharding.per_device(pre, x_BTM, *weights, axes=(ROWS, (), (), ()), out=ROWS)
    )
    output_BTD, rest = sublayer(rms_norm(input_BTD, norm_D, cfg.rms_norm_eps))
    if not context.numerics.float32_islands:
        post_BTN, comb_BTNN = (part.astype(x_BTM.dtype) for part in (post_BTN, comb_BTNN))
    args = output_BTD, x_BTM, post_BTN, comb_BTNN
    return saveable(sharding.per_device(hyper.post, *args, axes=(ROWS,) * 4, out=ROWS)), rest


def collapse(
    p: HyperHead, x_BTM: Float[Array, "B T M"], norm_D: Any, cfg: ModelConfig
) -> Float[Array, "B T D"]:
    """The streams combined into one, after the final norm."""
    head = functools.partial(hyper.head, eps=cfg.hc_eps, norm_eps=cfg.rms_norm_eps)
    weights = value(p.fn_NM), value(p.base_N), value(p.scale_1)
    x_BTD = sharding.per_device(head, x_BTM, *weights, axes=(ROWS, (), (), ()), out=ROWS)
    return rms_norm(x_BTD, norm_D, cfg.rms_norm_eps)


def expand(x_BTD: Float[Array, "B T D"], cfg: ModelConfig) -> Float[Array, "B T M"]:
    """A token's embedding in each of its streams."""
    return jnp.tile(x_BTD, (1, 1, cfg.hc_mult))
