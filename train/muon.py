"""Muon: orthogonalised updates of matrices.

Axis letters: M rows, N columns of a matrix, K the smaller of both; `...` stacks of matrices. Stacks
are never flattened: a stack of experts stays sharded, and each device works on its own experts
without gathering.

Source: the report's section 2.4.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from v4jax.model import sharding
from v4jax.model.params import path_name

# Coefficients (a, b, c) of X <- aX + b(XX')X + c(XX')(XX')X: eight fast iterations that bring
# singular values near one, and two that converge to it.
HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
_MOMENTUM = 0.95  # decay of the sum of gradients
# Root mean square of an update's entries: that of AdamW, so that its learning rates carry over.
_RMS = 0.18
# So many layers take turns.
_FEW = 8


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
        total = jax.tree.map(_ahead, state.momentum, updates)
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        names = [path_name(path) for path, _ in leaves]
        gradients = [leaf for _, leaf in leaves]
        steps = _steps(
            [*zip(jax.tree.leaves(total), gradients, strict=True)], list(map(parts, names)), dtype
        )
        return tree.unflatten(steps), MuonState(total)

    return optax.GradientTransformation(init, update)


def _ahead(momentum: Array, gradient: Array) -> Array:
    return _MOMENTUM * momentum + gradient.astype(momentum.dtype)


def _check(name: str, weight: Array, parts: Callable[[str], int]) -> None:
    if weight.ndim < 2 or weight.shape[-2] % parts(name):
        raise ValueError(
            f"Muon needs matrices; '{name}' of shape {weight.shape} is not {parts(name)} of them."
        )


class _Kind(NamedTuple):
    """What weights have in common whose matrices are orthogonalised in the same loop.

    Programs would take minutes to compile if each weight had a loop of its own.

    Attributes:
      short, long: sides of their matrices.
      experts: number of experts; 0 if they are not of experts.
      layers: number of layers, which take turns, so that few temporaries exist at a time; 0 for any
        number below `_FEW`, all at once.
    """

    short: int
    long: int
    experts: int
    layers: int


def _kind(shape: tuple[int, ...], parts: int) -> _Kind:
    *stack, rows, columns = shape
    short, long = sorted((rows // parts, columns))
    layers = stack[0] if stack and stack[0] >= _FEW else 0
    return _Kind(short, long, stack[1] if len(stack) > 1 else 0, layers)


def _steps(pairs: list[tuple[Array, Array]], parts: list[int], dtype: Any) -> list[Array]:
    """The update of each weight, from its momentum and its gradient."""
    kinds = [
        _kind(gradient.shape, count) for (_, gradient), count in zip(pairs, parts, strict=True)
    ]
    steps: dict[int, Array] = {}
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        run = functools.partial(_together, kind, [parts[i] for i in members], dtype)
        some = [pairs[i] for i in members]
        if kind.layers:
            of_layer = lambda slices, run=run: run(jax.tree.map(lambda x: x[None], slices))
            outs = jax.lax.map(of_layer, some)
            outs = [out.reshape(pair[0].shape) for out, pair in zip(outs, some, strict=True)]
        else:
            outs = run(some)
        steps |= zip(members, outs, strict=True)
    return [steps[i] for i in range(len(pairs))]


def _together(
    kind: _Kind, parts: list[int], dtype: Any, pairs: list[tuple[Array, Array]]
) -> list[Array]:
    """The updates of weights of one kind, orthogonalised as one stack."""
    lead = (kind.experts,) if kind.experts else ()
    stacks = []
    for (momentum, gradient), count in zip(pairs, parts, strict=True):
        x = _ahead(momentum, gradient).astype(jnp.float32)
        x = x.reshape(-1, *lead, x.shape[-2] // count, x.shape[-1])
        stacks.append(x if x.shape[-2] == kind.short else jnp.swapaxes(x, -1, -2))
    # An orthogonal matrix's entries have a root mean square of 1 / sqrt(longer side).
    out = orthogonal(_spread(jnp.concatenate(stacks)), dtype=dtype) * _RMS * math.sqrt(kind.long)
    ends = np.cumsum([len(stack) for stack in stacks])[:-1]
    steps = []
    for step, (_, x), count in zip(jnp.split(out, ends), pairs, parts, strict=True):
        is_tall = x.shape[-2] // count != kind.short
        step = jnp.swapaxes(step, -1, -2) if is_tall else step
        steps.append(step.reshape(x.shape).astype(x.dtype))
    return steps


def _spread(x: Float[Array, "n *experts K N"]) -> Float[Array, "n *experts K N"]:
    """The matrices as devices share their work: by expert, or by parts of their longer side."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if x.ndim == 4:
        return sharding.constrain(x, None, "experts", None, None)
    axes = tuple(mesh.axis_names)
    axes = axes if x.shape[-1] % mesh.size == 0 else ("fsdp",)
    if x.shape[-1] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, None, axes))


def newton_schulz_flops(shape: Sequence[int], parts: int = 1) -> int:
    """Floating-point operations of `orthogonal` on a stack of matrices."""
    *stack, rows, columns = shape
    short, long = sorted((rows // parts, columns))
    each = 2 * short * short * (2 * long + short)
    return math.prod(stack) * parts * len(HYBRID) * each
