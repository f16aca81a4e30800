"""Top-k and top-p, which find the smallest kept logit by bisection over all float32 values.

That takes at most 32 passes over the vocabulary: as exact as sorting, and on CPU 20 times faster at
V = 129280.

Axis letters: B batch, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


def top_k_top_p(
    x_BV: Float32[Array, "B V"], top_k_B: Int32[Array, " B"], tail_B: Float32[Array, " B"]
) -> Float32[Array, "B V"]:
    """Top-k (0 is off), then top-p (a tail of 0 is off)."""
    x_BV = jnp.where(x_BV >= _kth_largest(x_BV, top_k_B)[:, None], x_BV, -jnp.inf)
    edge_B, kept_ties_B = _nucleus_edge(x_BV, tail_B)
    tie_BV = x_BV == edge_B[:, None]
    last_B1 = _id_of_nth(tie_BV, kept_ties_B)[:, None]
    ids_1V = jnp.arange(x_BV.shape[1], dtype=jnp.uint32)[None]
    keep_BV = (x_BV > edge_B[:, None]) | (tie_BV & (ids_1V <= last_B1))
    return jnp.where(keep_BV, x_BV, -jnp.inf)


def _kth_largest(x_BV: Float32[Array, "B V"], top_k_B: Int32[Array, " B"]) -> Float32[Array, " B"]:
    """The k-th largest value of each row; -inf where k is 0."""

    def holds(code_B):
        threshold_B1 = _decoded(code_B)[:, None]
        return jnp.sum(x_BV >= threshold_B1, axis=-1, dtype=jnp.int32) >= top_k_B

    low_B = _encoded(jnp.full_like(x_BV[:, 0], -jnp.inf))
    high_B = jnp.where(top_k_B > 0, _encoded(jnp.max(x_BV, axis=-1)), low_B)
    return _decoded(_last_that_holds(holds, low_B, high_B))


def _nucleus_edge(
    x_BV: Float32[Array, "B V"], tail_B: Float32[Array, " B"]
) -> tuple[Float32[Array, " B"], Int32[Array, " B"]]:
    """The smallest logit that top-p keeps, and how many of the tokens with that logit are kept.

    Tokens are cut from the least probable up, while their probabilities sum to at most `tail_B`;
    the last token is kept (transformers' TopPLogitsWarper). Among ties, for which transformers
    has no fixed order, the lower ids are kept, so that the smallest top_p is greedy. A tail of 0
    keeps all tokens.
    """
    max_B = jnp.max(x_BV, axis=-1)
    mass_BV = jnp.exp(x_BV - max_B[:, None])
    cut_B = tail_B * jnp.sum(mass_BV, axis=-1)

    def mass_below(edge_B):
        return jnp.sum(jnp.where(x_BV < edge_B[:, None], mass_BV, 0.0), axis=-1)

    low_B = _encoded(jnp.full_like(max_B, -jnp.inf))
    high_B = jnp.where(tail_B > 0, _encoded(max_B), low_B)
    is_cut = lambda code_B: mass_below(_decoded(code_B)) <= cut_B
    edge_B = _decoded(_last_that_holds(is_cut, low_B, high_B))
    ties_B = jnp.sum(x_BV == edge_B[:, None], axis=-1, dtype=jnp.int32)
    cut_ties_B = ((cut_B - mass_below(edge_B)) / jnp.exp(edge_B - max_B)).astype(jnp.int32)
    return edge_B, ties_B - jnp.where(tail_B > 0, jnp.minimum(cut_ties_B, ties_B - 1), 0)


def _id_of_nth(marked_BV: Bool[Array, "B V"], n_B: Int32[Array, " B"]) -> UInt32[Array, " B"]:
    """The id of each row's n-th marked token, n from 1; V - 1 if there are only n marked tokens."""
    V = marked_BV.shape[1]
    ids_1V = jnp.arange(V, dtype=jnp.uint32)[None]

    def fewer_below(id_B):
        below_BV = marked_BV & (ids_1V < id_B[:, None])
        return jnp.sum(below_BV, axis=-1, dtype=jnp.int32) < n_B

    high_B = jnp.full(n_B.shape, V - 1, jnp.uint32)
    all_B = n_B >= jnp.sum(marked_BV, axis=-1, dtype=jnp.int32)
    return _last_that_holds(fewer_below, jnp.where(all_B, high_B, jnp.uint32(0)), high_B)


def _last_that_holds(
    holds: Callable[[Array], Array], low_B: UInt32[Array, " B"], high_B: UInt32[Array, " B"]
) -> UInt32[Array, " B"]:
    """Bisect each row for the largest number in [low, high] that `holds`; low always does."""

    def halve(span):
        low_B, high_B = span
        middle_B = low_B + (high_B - low_B + 1) // 2
        holds_B = holds(middle_B)
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B - 1)

    unsettled = lambda span: jnp.any(span[0] < span[1])
    return jax.lax.while_loop(unsettled, halve, (low_B, high_B))[0]


def _encoded(x_B: Float32[Array, " B"]) -> UInt32[Array, " B"]:
    """Floats as integers of the same order."""
    bits_B = jax.lax.bitcast_convert_type(x_B, jnp.uint32)
    return jnp.where(bits_B >> 31 == 1, ~bits_B, bits_B | jnp.uint32(1 << 31))


def _decoded(code_B: UInt32[Array, " B"]) -> Float32[Array, " B"]:
    bits_B = jnp.where(code_B >> 31 == 1, code_B ^ jnp.uint32(1 << 31), ~code_B)
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)
