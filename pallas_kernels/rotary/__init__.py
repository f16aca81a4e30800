"""Rotary embedding of attention heads, optionally after a norm.

The last 2Q channels are rotated in pairs of adjacent channels (report, section 2.3). Everything is
computed in float32, except for a norm that asks for the heads' dtype. The TPU kernel reads and
writes the heads once, where XLA's form makes a float32 copy in another layout for the pairs; on
GPUs XLA's form has one temporary, the normalised heads. XLA computes gradients, from the inputs.

Axis letters: B batch, T tokens, H heads, K head dim, Q rotary pairs.
"""

from jaxtyping import Array, Float

from pallas_kernels.implementations import Impl, check_arrays, shown
from pallas_kernels.reference_gradients import differentiable
from pallas_kernels.rotary import reference, tpu
from pallas_kernels.rotary.reference import Norm

__all__ = ["Norm", "rotate"]

_run = differentiable("rotary", {"tpu": tpu, "xla": reference, "reference": reference})


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    cos_BTQ: Float[Array, "B T Q"],
    sin_BTQ: Float[Array, "B T Q"],
    *,
    norm: Norm | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B T H K"]:
    """Rotate each pair of channels by its angle at the token's position.

    Args:
      x_BTHK: heads.
      cos_BTQ: cosines of the angles.
      sin_BTQ: sines of the angles; negate them to rotate back.
      norm: norm applied to each head first; None for none.
      impl: 'auto' picks the best form for the compile target.
    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: an array that is not floating-point, or `norm` is neither a Norm nor None.
      ValueError: shapes that do not match.
    """
    arrays = {"x_BTHK": x_BTHK, "cos_BTQ": cos_BTQ, "sin_BTQ": sin_BTQ}
    sizes = check_arrays("rotary.rotate", arrays)
    if not isinstance(norm, Norm | None):
        raise TypeError(f"rotary.rotate: norm is {shown(norm)}; it must be a Norm or None.")
    if 2 * sizes["Q"] > sizes["K"]:
        raise ValueError(
            f"rotary.rotate: x_BTHK has {sizes['K']} channels; {sizes['Q']} pairs do not fit."
        )
    return _run("rotate", impl, (x_BTHK, cos_BTQ, sin_BTQ), norm=norm)
