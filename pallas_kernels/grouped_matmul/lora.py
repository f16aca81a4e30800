"""Low-rank updates of experts' matrices.

Axis letters: N output channels, K input channels, r rank; stacks of layers and experts may come
first.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import quantize
from pallas_kernels.dtypes import accumulator
from pallas_kernels.implementations import check_arrays, check_shape
from pallas_kernels.quantize import Fp4Weight, Fp8Weight
from pallas_kernels.quantize.leaves import check_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A matrix W + scale * (b a), whose base W gets no gradient.

    Attributes:
      base: [..., N, K], an array or quantised.
      a: float [..., r, K].
      b: float [..., N, r].
      scale: alpha / r.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix: [..., N, K]."""
        return self.base.shape


Weight = Float[Array, "..."] | Fp8Weight | Fp4Weight | LoraWeight


def check_expert(op: str, name: str, w: Any, sizes: dict[str, int]) -> dict[str, int]:
    """Reject a stack that contradicts its name, or whose parts do not match.

    Returns:
      The sizes of the letters: those passed in and those of the name.

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong shape.
    """
    base = w.base if isinstance(w, LoraWeight) else w
    if isinstance(base, Fp8Weight | Fp4Weight):
        check_weight(op, name, base)
        sizes = sizes | check_shape(op, name, base, sizes)
    else:
        sizes = check_arrays(op, {name: base}, sizes=sizes)
    if isinstance(w, LoraWeight):
        factors = {f"{name}.a_LErK": w.a, f"{name}.b_LENr": w.b}
        check_arrays(op, factors, sizes=dict(zip("LENK", base.shape, strict=True)))
    return sizes


def linear(x: Float[Array, "R K"], w: Weight, *, impl: Any) -> Float[Array, "R N"]:
    """`quantize.linear` with the update added; the base is a constant, the sum in x's dtype."""
    if not isinstance(w, LoraWeight):
        return quantize.linear(x, w, impl=impl)
    wide = accumulator(x.dtype)
    plain = lambda x, w: quantize.linear(x, w.astype(x.dtype), impl=impl)
    base_RN = quantize.linear(x, jax.lax.stop_gradient(w.base), impl=impl)
    delta_RN = plain(plain(x, w.a), w.b)
    return (base_RN.astype(wide) + w.scale * delta_RN.astype(wide)).astype(x.dtype)


def learned(w: Weight) -> list[Array]:
    """What can get a gradient: an array itself, the two factors, nothing if quantised."""
    if isinstance(w, LoraWeight):
        return [w.a, w.b]
    return [] if isinstance(w, Fp8Weight | Fp4Weight) else [w]


def replaced(w: Weight, parts: list[Array]) -> Weight:
    """The weight with other arrays in place of its `learned` ones."""
    if isinstance(w, LoraWeight):
        a, b = parts
        return dataclasses.replace(w, a=a, b=b)
    return parts[0] if parts else w


def gradient(w: Weight, parts: list[Array]) -> Any:
    """The cotangent of a weight, given those of its `learned` arrays; None if there are none."""
    if not parts:
        return None
    if isinstance(w, LoraWeight):
        a, b = parts
        return LoraWeight(None, a, b, w.scale)
    return parts[0]
