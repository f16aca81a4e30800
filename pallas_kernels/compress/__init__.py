"""Compression of token windows into entries (report, sections 2.3.1 and 2.3.2).

With ratio M, entry i pools window i, tokens i * M .. i * M + M - 1, by a softmax per channel. With
overlap (CSA) each token has two series side by side: the first half of its channels serves
the next window's entry, the second half its own. The pooled sum, in float32, is rounded to the
model's dtype, normed, rotated to the position of its window's first token (RoPE on the last 2Q
channels, adjacent channels paired) and rounded as the cache stores it:

  none  unchanged;
  fp8   all but the rotated channels to E4M3, in blocks of 64;
  fp4   a Hadamard transform of all channels, then E2M1 in blocks of 32.

XLA recomputes gradients from the tokens; they pass straight through the rounding.

Axis letters: L layers of a stack, B batch, T tokens, M ratio, C channels (overlap * K), K entry
channels, C2 = 2 * C of kv and gate side by side, P = overlap * M tokens before a chunk, R ring
rows, n entries, Q rotary pairs, X tokens of the windows.
"""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.compress import reference, tpu, xla
from pallas_kernels.implementations import (
    Impl,
    LazyForm,
    check_arrays,
    check_number,
    check_whole,
    shown,
)
from pallas_kernels.reference_gradients import differentiable

Rounding = Literal["none", "fp8", "fp4"]
_FORMS = {"tpu": tpu, "gpu": LazyForm(f"{__name__}.gpu"), "xla": xla, "reference": reference}
_run = differentiable("compress", _FORMS)


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
    """Entries of the windows that a chunk may complete: start // M, start // M + 1, ...

    Args:
      rows_BTC: the chunk's tokens, at positions start, start + 1, ...
      before_BPC: the P tokens before them; positions below 0 are ignored.
      start_B: position of each row's first token, which need not begin a window.
      bias_MC: added to the gate by position in the window (the checkpoint's `ape`).
      scale_K: weight of the norm.
      table: cosine and sine for each entry.
      overlap: windows per entry, 1 or 2.
      eps: eps of the norm.
      rounding: how entries are finally rounded.
      dtype: dtype of the entries and of intermediate rounding.
      impl: 'auto' picks the best form for the compile target.

    Returns:
      ceil(T / M) entries. Those whose windows the chunk does not complete are arbitrary.

    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: a dtype that the contract does not allow.
      ValueError: shapes that do not match, or an unknown overlap or rounding.
    """
    tokens = {"rows_BTC": rows_BTC, "before_BPC": before_BPC, "start_B": start_B}
    rest = bias_MC, scale_K, table
    static = {"overlap": overlap, "eps": eps, "rounding": rounding, "dtype": dtype}
    check_number("compress.prefill", eps=eps)
    _check_entries("compress.prefill", tokens, rest, overlap, rounding)
    return _run("prefill", impl, (*tokens.values(), *rest), **static)


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
    """The entry of the window that each row has just completed, if any.

    Args:
      ring_LBRC: tokens of all layers of a stack, position p in row p mod R; a window may begin in
        any row and wrap around.
      layer: the layer to read.
      window_B: index of the window; the ring must have all of its tokens, and those of the window
        before. Negative for no entry: the result is then 0.
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
    return _run("decode", impl, (*tokens.values(), *rest), **static)


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
      first_B: index of the first entry; windows with a negative index are ignored.
      overlap: as for `prefill`.
      impl: as for `prefill`.

    Returns:
      One row per entry, in float32. Tokens beyond the end of the text are pooled like others: the
      caller must not use such entries.

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
    return _run("pool", impl, (kv_BXC, gate_BXC, bias_MC, first_B), overlap=overlap)


def _check_windows(op: str, bias_MC: Any, overlap: int) -> dict[str, int]:
    """The sizes M, C, K and P."""
    check_whole(op, "overlap", overlap)
    if overlap not in (1, 2):
        raise ValueError(f"{op}: overlap is {overlap}; it must be 1 or 2.")
    sizes = check_arrays(op, {"bias_MC": bias_MC})
    if not sizes["M"] or sizes["C"] % overlap:
        raise ValueError(f"{op}: bias_MC has shape {bias_MC.shape}, not (M, {overlap} * K).")
    return sizes | {"K": sizes["C"] // overlap, "P": overlap * sizes["M"]}


def _check_entries(op: str, tokens: Any, rest: Any, overlap: int, rounding: str) -> None:
    """Check arguments of `prefill` (an entry per window of the chunk) or `decode` (one entry)."""
    if not isinstance(rounding, str) or rounding not in get_args(Rounding):
        known = get_args(Rounding)
        raise ValueError(f"{op}: rounding is {shown(rounding)}; it must be one of {known}.")
    bias_MC, scale_K, table = rest
    sizes = _check_windows(op, bias_MC, overlap)
    integers = ("start_B", "layer", "window_B")
    sizes = check_arrays(op, tokens, integers=integers, sizes=sizes | {"C": 2 * sizes["C"]})
    if not isinstance(table, tuple | list) or len(table) != 2:
        raise TypeError(f"{op}: table is {shown(table)}; it must be (cosine, sine).")
    sizes["n"] = -(-sizes.get("T", 1) // sizes["M"])
    ends = {"scale_K": scale_K, "table[0]_BnQ": table[0], "table[1]_BnQ": table[1]}
    sizes = check_arrays(op, ends, sizes=sizes)
    if 2 * sizes["Q"] > sizes["K"]:
        raise ValueError(f"{op}: scale_K has {sizes['K']} channels; {sizes['Q']} pairs do not fit.")
