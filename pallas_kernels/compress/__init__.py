"""Compression of token windows into entries (report, sections 2.3.1 and 2.3.2).

Entry i of ratio M pools the tokens of window i, i * M .. i * M + M - 1, by a softmax per channel.
With overlap (CSA) each token has two series side by side: the first half of its channels serves
the next window's entry, the second half its own. What was pooled, in float32, is rounded to the
model's dtype, normed, turned to the position of its window's first token (RoPE on the last 2Q
channels, neighbouring channels paired) and rounded as the cache keeps it:

  none  as it is;
  fp8   all but the turned channels to E4M3, in blocks of 64;
  fp4   a Hadamard transform of all channels, then E2M1 in blocks of 32.

Gradients are computed anew from the tokens, by XLA; they pass straight through the rounding.

Axis letters: L layers of a stack, B batch, T tokens, M ratio, C channels (overlap * K), K entry
channels, C2 = 2 * C of kv and gate side by side, P = overlap * M tokens before a chunk, R ring
rows, n entries, Q rotary pairs, X tokens of the windows.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.compress import gpu, reference, tpu, xla
from pallas_kernels.implementations import (
    Impl,
    check_arrays,
    check_number,
    check_whole,
    dispatch,
    shown,
)

Rounding = Literal["none", "fp8", "fp4"]
_FORMS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}


def prefill(
    rows_BTC: Float[Array, "B T C2"],
    before_BPC: Float[Array, "B P C2"],
    start_B: Int[Array, " B"],
    bias_MC: Float[Array, "M C"],
    scale_K: Float[Array, " K"],
    table: tuple[Float[Array, "B n Q"], Float[Array, "B n Q"]],
    *,
    overlap: int,
    eps: float,
    rounding: Rounding,
    dtype: Any,
    impl: Impl = "auto",
) -> Float[Array, "B n K"]:
    """The entries of windows start // M, start // M + 1, ... that a chunk may complete.

    Args:
      rows_BTC: the chunk's tokens at positions start, start + 1, ...
      before_BPC: the P tokens before them; those below position 0 count for nothing.
      start_B: position of each row's first token, any.
      bias_MC: added to the gate by position in the window (the checkpoint's `ape`).
      scale_K: the norm's weight.
      table: cosine and sine for each entry.
      overlap: 1 or 2 windows per entry.
      eps: the norm's.
      rounding: how entries are rounded at last.
      dtype: of the entries, and of what is rounded between.
      impl: 'auto' takes the best form for the compile target.

    Returns:
      ceil(T / M) entries. Those whose windows the chunk does not complete are arbitrary.

    Raises:
      NotImplementedError: no such form, or it does not take these arguments.
      TypeError: a dtype that is not the contract's.
      ValueError: shapes that do not fit together, another overlap or rounding.
    """
    tokens = {"rows_BTC": rows_BTC, "before_BPC": before_BPC, "start_B": start_B}
    rest = bias_MC, scale_K, table
    static = {"overlap": overlap, "eps": eps, "rounding": rounding, "dtype": dtype}
    check_number("compress.prefill", eps=eps)
    _check_entries("compress.prefill", tokens, rest, overlap, rounding)
    return _run("prefill", impl, tuple(static.items()), (*tokens.values(), *rest))


def decode(
    ring_LBRC: Float[Array, "L B R C2"],
    layer: Int[Array, ""],
    window_B: Int[Array, " B"],
    bias_MC: Float[Array, "M C"],
    scale_K: Float[Array, " K"],
    table: tuple[Float[Array, "B 1 Q"], Float[Array, "B 1 Q"]],
    *,
    overlap: int,
    eps: float,
    rounding: Rounding,
    dtype: Any,
    impl: Impl = "auto",
) -> Float[Array, "B 1 K"]:
    """The entry of a window that has just been completed, for each row where one has.

    Args:
      ring_LBRC: tokens of all layers of a stack, that of position p in row p mod R; a window may
        begin in any row and wrap.
      layer: the layer to read.
      window_B: the window, all of whose tokens, and those of the one before, are in the ring.
        Negative where no entry is wanted: it becomes 0, and nothing is read.
      bias_MC: as for `prefill`.
      scale_K: as for `prefill`.
      table: as for `prefill`.
      overlap: as for `prefill`.
      eps: as for `prefill`.
      rounding: as for `prefill`.
      dtype: as for `prefill`.
      impl: as for `prefill`.

    Raises:
      NotImplementedError, TypeError, ValueError: as for `prefill`.
    """
    tokens = {"ring_LBRC": ring_LBRC, "layer": layer, "window_B": window_B}
    rest = bias_MC, scale_K, table
    static = {"overlap": overlap, "eps": eps, "rounding": rounding, "dtype": dtype}
    check_number("compress.decode", eps=eps)
    _check_entries("compress.decode", tokens, rest, overlap, rounding)
    tokens["layer"] = jnp.asarray(layer)
    return _run("decode", impl, tuple(static.items()), (*tokens.values(), *rest))


def pool(
    kv_BXC: Float[Array, "B X C"],
    gate_BXC: Float[Array, "B X C"],
    bias_MC: Float[Array, "M C"],
    first_B: Int[Array, " B"],
    *,
    overlap: int,
    impl: Impl = "auto",
) -> Float32[Array, "B n K"]:
    """The first step alone: softmax-gated sums of windows first, first + 1, ...

    Args:
      kv_BXC: tokens of the windows first - overlap + 1 .. first + n - 1: (n + overlap - 1) * M.
      gate_BXC: their gate logits, without the positional bias.
      bias_MC: as for `prefill`.
      first_B: index of the first entry wanted; windows of negative index count for nothing.
      overlap: as for `prefill`.
      impl: as for `prefill`.

    Returns:
      One row per entry, in float32. What a window's tokens beyond the text hold is the caller's
      affair: such entries are not visible yet.

    Raises:
      NotImplementedError, TypeError, ValueError: as for `prefill`.
    """
    op = "compress.pool"
    sizes = _check_windows(op, bias_MC, overlap)
    tokens = {"kv_BXC": kv_BXC, "gate_BXC": gate_BXC, "first_B": first_B}
    sizes = check_arrays(op, tokens, integers=("first_B",), sizes=sizes)
    if sizes["X"] % sizes["M"] or sizes["X"] < (overlap - 1) * sizes["M"]:
        raise ValueError(
            f"{op}: kv_BXC has {sizes['X']} tokens, not those of n + {overlap - 1} windows of "
            f"{sizes['M']}."
        )
    args = kv_BXC, gate_BXC, bias_MC, first_B
    return _run("pool", impl, (("overlap", overlap),), args)


def _check_windows(op: str, bias_MC: Any, overlap: int) -> dict[str, int]:
    """Sizes M, C, K and P."""
    check_whole(op, "overlap", overlap)
    if overlap not in (1, 2):
        raise ValueError(f"{op}: overlap is {overlap}; it takes 1 and 2.")
    sizes = check_arrays(op, {"bias_MC": bias_MC})
    if not sizes["M"] or sizes["C"] % overlap:
        raise ValueError(f"{op}: bias_MC has shape {bias_MC.shape}, not (M, {overlap} * K).")
    return sizes | {"K": sizes["C"] // overlap, "P": overlap * sizes["M"]}


def _check_entries(op: str, tokens: Any, rest: Any, overlap: int, rounding: str) -> None:
    """Entries are as many as the windows of a chunk, or one."""
    if not isinstance(rounding, str) or rounding not in get_args(Rounding):
        raise ValueError(f"{op}: rounding is {shown(rounding)}; it takes {get_args(Rounding)}.")
    bias_MC, scale_K, table = rest
    sizes = _check_windows(op, bias_MC, overlap)
    integers = ("start_B", "layer", "window_B")
    sizes = check_arrays(op, tokens, integers=integers, sizes=sizes | {"C": 2 * sizes["C"]})
    if not isinstance(table, tuple | list) or len(table) != 2:
        raise TypeError(f"{op}: table is {shown(table)}; it takes cosine and sine.")
    sizes["n"] = -(-sizes.get("T", 1) // sizes["M"])
    ends = {"scale_K": scale_K, "table[0]_BnQ": table[0], "table[1]_BnQ": table[1]}
    sizes = check_arrays(op, ends, sizes=sizes)
    if 2 * sizes["Q"] > sizes["K"]:
        raise ValueError(f"{op}: scale_K has {sizes['K']} channels; {sizes['Q']} pairs do not fit.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(name: str, impl: Impl, static: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    return dispatch("compress", name, impl, _FORMS, *args, **dict(static))


def _forward(name: str, impl: Impl, static: Any, args: Any) -> Any:
    return _run(name, impl, static, args), args


def _backward(name: str, impl: Impl, static: Any, args: Any, grad: Any) -> Any:
    """Of the reference, whatever ran forward."""
    run = functools.partial(getattr(reference, name), **dict(static))
    grads = jax.vjp(run, *args)[1](grad)
    return (jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, grads),)


_run.defvjp(_forward, _backward)
