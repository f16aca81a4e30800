"""Rotary embedding of attention's heads, and their norm before it.

The last 2Q channels turn, neighbouring channels paired (report, section 2.3). Everything is
computed in float32 but the norm, where that is asked for. A TPU kernel reads and writes the heads
once, where XLA's form lays them out anew, in float32, for the pairs; on GPUs XLA's form keeps one
copy, of the normed heads. Gradients are computed anew, by XLA.

Axis letters: B batch, T tokens, H heads, K head dim, Q rotary pairs.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.implementations import Impl, check_arrays, dispatch, shown
from pallas_kernels.rotary import reference, tpu
from pallas_kernels.rotary.reference import Norm

__all__ = ["Norm", "rotate"]

_FORMS = {"tpu": tpu, "xla": reference, "reference": reference}


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    cos_BTQ: Float[Array, "B T Q"],
    sin_BTQ: Float[Array, "B T Q"],
    *,
    norm: Norm | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """Turn each pair of channels by its angle at the token's position.

    Args:
      x_BTHK: heads.
      cos_BTQ: of the angles.
      sin_BTQ: of the angles; of their negatives to turn back.
      norm: applied to each head first; None for none.
      impl: 'auto' takes the best form for the compile target.
    Raises:
      NotImplementedError: no such form, or it does not take these arguments.
      TypeError: an array that is not of floats.
      ValueError: shapes that do not fit together.
    """
    arrays = {"x_BTHK": x_BTHK, "cos_BTQ": cos_BTQ, "sin_BTQ": sin_BTQ}
    sizes = check_arrays("rotary.rotate", arrays)
    if not isinstance(norm, Norm | None):
        raise TypeError(f"rotary.rotate: norm is {shown(norm)}; it takes a Norm or None.")
    if 2 * sizes["Q"] > sizes["K"]:
        raise ValueError(
            f"rotary.rotate: x_BTHK has {sizes['K']} channels; {sizes['Q']} pairs do not fit."
        )
    return _rotate(norm, impl, (x_BTHK, cos_BTQ, sin_BTQ))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(norm: Norm | None, impl: Impl, args: tuple[Any, ...]) -> Any:
    return dispatch("rotary", "rotate", impl, _FORMS, *args, norm=norm)


def _forward(norm: Norm | None, impl: Impl, args: Any) -> Any:
    return _rotate(norm, impl, args), args


def _backward(norm: Norm | None, impl: Impl, args: Any, grad_BTHK: Any) -> Any:
    """Of the reference, whatever ran forward."""
    del impl
    return (jax.vjp(functools.partial(reference.rotate, norm=norm), *args)[1](grad_BTHK),)


_rotate.defvjp(_forward, _backward)
