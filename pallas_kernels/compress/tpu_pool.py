"""The softmax over a window's tokens inside a kernel, for a column of 128 channels.

Short windows are spread over the sublanes of a register: a strided load reads the token at one
position of each. Long windows, whose stride no load supports, have eight tokens to a register.

Axis letters: as in the package; V channels of a column (128), G windows of a group, N tokens at a
time, Y a register's rows: G windows or 8 tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

SUBLANES = 8
_TOKENS = 128  # tokens of a window at a time

# (unit: kv of each series, then gate; first row, relative to the first that the group's first entry
# pools; number of rows; their stride) -> rows.
Read = Callable[[int, Any, int, int], Float32[Array, "Y V"]]


def pool(
    read: Read,
    bias: Callable[[int, Any, int], Float[Array, "N V"]],
    ratio: int,
    overlap: int,
    windows: int,
    first: Any = None,
) -> Float32[Array, "G V"]:
    """A group's entries.

    Args:
      read: reads tokens.
      bias: (series, first position in the window, count) -> rows of the bias.
      ratio: M.
      overlap: windows per entry.
      windows: G; pooled one by one if M is a multiple of 8.
      first: the group's first window, if it may be window 0, which has no predecessor.
    """
    if windows > 1 and ratio % SUBLANES == 0:
        shifted = lambda w: lambda u, at, *size: read(u, w * ratio + at, *size)
        pool_one = lambda w: pool(
            shifted(w), bias, ratio, overlap, 1, None if first is None else first + w
        )
        return jnp.concatenate([pool_one(w) for w in range(windows)])
    return _together(read, bias, ratio, overlap, windows, first)


def _together(
    read: Read,
    bias: Callable[[int, Any, int], Float[Array, "N V"]],
    ratio: int,
    overlap: int,
    windows: int,
    first: Any,
) -> Float32[Array, "G V"]:
    """Pool N tokens of each series at a time, with a running maximum."""
    rows = windows if ratio % SUBLANES else SUBLANES
    step = math.gcd(ratio, _TOKENS)
    missing = None
    if first is not None and overlap > 1:
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        missing = (first + (row if ratio % SUBLANES else 0 * row)) == 0

    def tokens(turn: Any) -> tuple[list[Any], list[Any]]:
        """Logits and values of N tokens of each series."""
        logits, values = [], []
        for s in range(overlap):
            bias_NV = bias(s, turn * step, step).astype(jnp.float32)
            for i in range(0, step, 1 if ratio % SUBLANES else SUBLANES):
                at = s * ratio + turn * step + i, rows, ratio if ratio % SUBLANES else 1
                bias_YV = bias_NV[i : i + (1 if ratio % SUBLANES else SUBLANES)]
                logit_YV, value_YV = read(overlap + s, *at) + bias_YV, read(s, *at)
                if missing is not None and s < overlap - 1:
                    logit_YV = jnp.where(missing, -jnp.inf, logit_YV)
                    value_YV = jnp.where(missing, 0.0, value_YV)
                logits.append(logit_YV)
                values.append(value_YV)
        return logits, values

    def largest(logits: list[Any]) -> Any:
        most_YV = _tree(jnp.maximum, logits)
        return most_YV if ratio % SUBLANES else jnp.max(most_YV, axis=0, keepdims=True)

    def add(turn: Any, running: Any) -> Any:
        before, total_YV, sum_YV = running
        logits, values = tokens(turn)
        new = jnp.maximum(before, largest(logits))
        rescale = jnp.exp(before - new)
        more_YV, products_YV = _sums(logits, values, new)
        return new, total_YV * rescale + more_YV, sum_YV * rescale + products_YV

    logits, values = tokens(0)
    most = largest(logits)
    running = most, *_sums(logits, values, most)
    _, total_YV, sum_YV = jax.lax.fori_loop(1, ratio // step, add, running)
    if ratio % SUBLANES:
        return sum_YV / total_YV
    total_1V, sum_1V = (jnp.sum(part, axis=0, keepdims=True) for part in (total_YV, sum_YV))
    return sum_1V / total_1V


def _sums(logits: list[Any], values: list[Any], largest: Any) -> tuple[Any, Any]:
    weights = [jnp.exp(logit_YV - largest) for logit_YV in logits]
    products = [w_YV * v_YV for w_YV, v_YV in zip(weights, values, strict=True)]
    return _tree(jnp.add, weights), _tree(jnp.add, products)


def _tree(combine: Callable[[Any, Any], Any], parts: list[Any]) -> Any:
    """Combine all parts pairwise, which keeps chains of dependent operations short."""
    while len(parts) > 1:
        pairs = [combine(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]
