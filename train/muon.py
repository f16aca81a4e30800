"""Muon: orthogonalised updates of matrices.

Axis letters: M rows, N columns of a matrix, K the smaller of both; `...` stacks of matrices. Stacks
are never flattened: a stack of experts stays sharded, and each device works on its own experts
without gathering.

Source: the report's section 2.4.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from v4jax.model.params import path_name

# Coefficients (a, b, c) of X <- aX + b(XX')X + c(XX')(XX')X: eight fast iterations that bring
# singular values near one, and two that converge to it.
HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
_MOMENTUM = 0.95  # decay of the sum of gradients
# Root mean square of an update's entries: that of AdamW, so that its learning rates carry over.
_RMS = 0.18


class MuonState(NamedTuple):
    """Momentum: decaying sums of gradients, one for each weight."""

    momentum: Any


def orthogonal(
    x: Float[Array, "*stack M N"], dtype: Any = jnp.float32
) -> Float[Array, "*stack M N"]:
    """Set the matrices' singular values to one, by Newton-Schulz iterations.

    Args:
      x: matrices; a zero matrix stays zero.
      dtype: dtype of the products' factors; products accumulate in float32.

    Returns:
      The matrices in float32.
    """
    x32 = x.astype(jnp.float32)
    # Divide by the largest magnitude first: squares of small values would underflow.
    tiny = jnp.finfo(jnp.float32).tiny
    x32 /= jnp.maximum(jnp.max(jnp.abs(x32), axis=(-2, -1), keepdims=True), tiny)
    x32 /= jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x32), axis=(-2, -1), keepdims=True)), tiny)
    rows, columns = x.shape[-2:]
    # Use the smaller of XX' and X'X.
    gram, left = ("...mn,...kn->...mk", "...mk,...kn->...mn")
    if rows > columns:
        gram, left = ("...mn,...mk->...nk", "...nk,...mk->...mn")

    def product(spec: str, *factors: Array) -> Array:
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        narrow = [factor.astype(dtype) for factor in factors]
        return jnp.einsum(spec, *narrow, precision=precision, preferred_element_type=jnp.float32)

    def iterate(x32: Array, abc: Array) -> tuple[Array, None]:
        a, b, c = abc
        gram_KK = product(gram, x32, x32)
        mixed_KK = b * gram_KK + c * product("...mk,...kn->...mn", gram_KK, gram_KK)
        return a * x32 + product(left, mixed_KK, x32), None

    return jax.lax.scan(iterate, x32, jnp.asarray(HYBRID, jnp.float32))[0]


def scale_by_muon(
    *, parts: Callable[[str], int] = lambda name: 1, dtype: Any = jnp.float32
) -> optax.GradientTransformation:
    """Replace gradients of matrices by orthogonal updates, with Nesterov momentum.

    Args:
      parts: maps a weight's dotted name to the number of independent matrices stacked along the
        rows of each of its matrices.
      dtype: as for `orthogonal`.

    Raises:
      ValueError: at `init`, a weight is not a stack of matrices, or not evenly divisible.
    """

    def init(params: Any) -> MuonState:
        jax.tree_util.tree_map_with_path(lambda path, x: _check(path_name(path), x, parts), params)
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        ahead = lambda m, g: _MOMENTUM * m + g.astype(m.dtype)
        total = jax.tree.map(ahead, state.momentum, updates)
        nesterov = jax.tree.map(ahead, total, updates)
        step = lambda path, x: _step(x, parts(path_name(path)), dtype)
        return jax.tree_util.tree_map_with_path(step, nesterov), MuonState(total)

    return optax.GradientTransformation(init, update)


def _check(name: str, weight: Array, parts: Callable[[str], int]) -> None:
    if weight.ndim < 2 or weight.shape[-2] % parts(name):
        raise ValueError(
            f"Muon needs matrices; '{name}' of shape {weight.shape} is not {parts(name)} of them."
        )


def _step(x: Array, count: int, dtype: Any) -> Array:
    *stack, rows, columns = x.shape
    matrices = x.reshape(*stack, count, rows // count, columns) if count > 1 else x
    # An orthogonal matrix's entries have a root mean square of 1 / sqrt(longer side).
    scale = _RMS * math.sqrt(max(rows // count, columns))
    return (orthogonal(matrices, dtype=dtype) * scale).reshape(x.shape).astype(x.dtype)


def newton_schulz_flops(shape: Sequence[int], parts: int = 1) -> int:
    """Floating-point operations of `orthogonal` on a stack of matrices."""
    *stack, rows, columns = shape
    short, long = sorted((rows // parts, columns))
    each = 2 * short * short * (2 * long + short)
    return math.prod(stack) * parts * len(HYBRID) * each
