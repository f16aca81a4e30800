"""Attention in parts: a softmax over each part of the keys, their merge, and the sink at the end.

Axis letters: R rows (a query of one head each), X keys, K head dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.implementations import check_whole
from pallas_kernels.products import contract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Softmax over some keys: largest logit (-inf for no keys), sum of weights, weighted values."""

    largest_R: Any
    total_R: Any
    value_RK: Any


def part(
    q_RK: Float[Array, "R K"],
    keys_XK: Float[Array, "X K"],
    mask_RX: Bool[Array, "R X"],
    scale: float,
) -> Part:
    """The softmax part of these keys, which are also the values.

    Keys that some row sees must be finite; the caller zeroes those that no row sees.
    """
    logits_RX = jnp.where(mask_RX, contract(q_RK, keys_XK, 1, 1) * scale, -jnp.inf)
    largest_R = jnp.max(logits_RX, axis=1)
    weights_RX = jnp.exp(logits_RX - _finite(largest_R)[:, None])
    value_RK = jnp.matmul(
        weights_RX.astype(keys_XK.dtype), keys_XK, preferred_element_type=jnp.float32
    )
    return Part(largest_R, jnp.sum(weights_RX, axis=1), value_RK)


def merge(a: Part, b: Part) -> Part:
    """The softmax part of the keys of `a` and `b` together."""
    largest_R = jnp.maximum(a.largest_R, b.largest_R)
    a_R = jnp.exp(a.largest_R - _finite(largest_R))
    b_R = jnp.exp(b.largest_R - _finite(largest_R))
    return Part(
        largest_R,
        a.total_R * a_R + b.total_R * b_R,
        a.value_RK * a_R[:, None] + b.value_RK * b_R[:, None],
    )


def finish(total: Part, sink_R: Float32[Array, " R"]) -> Float32[Array, "R K"]:
    """Weighted mean of the values; the sink takes its share of the weight and adds no value."""
    largest_R = jnp.maximum(total.largest_R, sink_R)
    keys_R = jnp.exp(total.largest_R - largest_R)
    total_R = total.total_R * keys_R + jnp.exp(sink_R - largest_R)
    return total.value_RK * (keys_R / total_R)[:, None]


class RowTerms(NamedTuple):
    """Per-row terms that the gradient through every part needs.

    Attributes:
      log_total_R: log of the sum of all weights, including the sink's.
      grad_RK: gradient of the output.
      delta_R: grad . output.
    """

    log_total_R: Float32[Array, " R"]
    grad_RK: Float[Array, "R K"]
    delta_R: Float32[Array, " R"]


def pull(
    q_RK: Float[Array, "R K"],
    keys_XK: Float[Array, "X K"],
    mask_RX: Bool[Array, "R X"],
    scale: float,
    terms: RowTerms,
) -> tuple[Float32[Array, "R K"], Float32[Array, "X K"]]:
    """Gradients of queries and keys through one part; logits are recomputed.

    With weights p and output gradient g, d logit = p * (g . key - g . output). A key is also a
    value, so its gradient is p * g + d logit * query * scale. `terms` are those of all parts.
    """
    log_total_R, grad_RK, delta_R = terms
    logits_RX = jnp.where(mask_RX, contract(q_RK, keys_XK, 1, 1) * scale, -jnp.inf)
    weights_RX = jnp.exp(logits_RX - log_total_R[:, None])
    slopes_RX = weights_RX * (contract(grad_RK, keys_XK, 1, 1) - delta_R[:, None]) * scale
    weights_RX, slopes_RX = weights_RX.astype(q_RK.dtype), slopes_RX.astype(q_RK.dtype)
    keys_grad_XK = contract(weights_RX, grad_RK, 0, 0) + contract(slopes_RX, q_RK, 0, 0)
    return contract(slopes_RX, keys_XK, 1, 0), keys_grad_XK


def log_total(total: Part, sink_R: Float32[Array, " R"]) -> Float32[Array, " R"]:
    """Log of the sum of all weights, including the sink's."""
    return jnp.logaddexp(total.largest_R + jnp.log(total.total_R), sink_R)


def require_chunk_window(op: str, keys: int, window: int, queries: int) -> None:
    """Reject a window whose rows would be read as other positions.

    Raises:
      ValueError: unless there are window + queries keys.
    """
    check_whole(op, "window", window, least=0)
    if keys != window + queries:
        raise ValueError(
            f"{op}: window_BXK has {keys} keys; pass those of the {window} positions before the "
            f"chunk and of its {queries} queries, {window + queries} in all."
        )


def _finite(largest_R: Float32[Array, " R"]) -> Float32[Array, " R"]:
    """0 for rows that see no key, to avoid -inf - -inf = NaN."""
    return jnp.where(largest_R == -jnp.inf, 0.0, largest_R)
