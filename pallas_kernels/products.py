"""Matrix products: with float32 sums, and with a transposed weight in the forms XLA runs fast.

Axis letters: R rows, K input channels, N output channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dtypes import accumulator

# Up to jax 0.10, XLA on CPUs reads a weight sliced from a stack in place if it is transposed
# explicitly and x has one row, three times as fast as the other forms; since 0.11, half as fast.
_IN_PLACE = jax.__version_info__ < (0, 11)


def contract(
    a: Array, b: Array, a_dim: int, b_dim: int, precision: jax.lax.PrecisionLike = None
) -> Float32[Array, "_ _"]:
    """Multiply two matrices, summing over one dim of each, in float32."""
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def with_transposed(
    x: Float[Array, "*rows K"], w_NK: Float[Array, "N K"], precision: jax.lax.PrecisionLike = None
) -> Float[Array, "*rows N"]:
    """X times w's transpose, in float32 or wider.

    The incoming gradient is rounded to x's dtype. JAX's own rule would instead widen the factors
    to the gradient's float32, and lose the bfloat16 units of GPUs and some CPUs.
    """
    run = _with_transposed if x.dtype == accumulator(x.dtype) else _narrow
    y_RN = run(x.reshape(-1, x.shape[-1]), w_NK, precision)
    return y_RN.reshape(*x.shape[:-1], w_NK.shape[0])


def _with_transposed(x_RK: Array, w_NK: Array, precision: jax.lax.PrecisionLike) -> Array:
    wide = accumulator(x_RK.dtype)
    transposed = _IN_PLACE if len(x_RK) == 1 else x_RK.dtype == wide
    if transposed:
        return _matmul(x_RK, w_NK.T, precision)
    # bfloat16 without an explicit transpose: XLA then uses the CPU's own bfloat16 units, four times
    # as fast.
    return jnp.einsum("rk,nk->rn", x_RK, w_NK, precision=precision, preferred_element_type=wide)


def _matmul(a: Array, b: Array, precision: jax.lax.PrecisionLike) -> Array:
    return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator(a.dtype))


_narrow = jax.custom_vjp(_with_transposed, nondiff_argnums=(2,))


def _forward(x_RK: Array, w_NK: Array, precision: jax.lax.PrecisionLike) -> tuple[Array, tuple]:
    return _with_transposed(x_RK, w_NK, precision), (x_RK, w_NK)


def _backward(
    precision: jax.lax.PrecisionLike, factors: tuple[Array, Array], grad_RN: Float[Array, "R N"]
) -> tuple[Array, Array]:
    x_RK, w_NK = factors
    grad_RN = grad_RN.astype(x_RK.dtype)
    dx_RK, dw_NK = _matmul(grad_RN, w_NK, precision), _matmul(grad_RN.T, x_RK, precision)
    return dx_RK.astype(x_RK.dtype), dw_NK.astype(w_NK.dtype)


_narrow.defvjp(_forward, _backward)
