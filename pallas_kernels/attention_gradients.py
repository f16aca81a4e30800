"""Gradients of the two attention operations, and their packing as cotangents."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels import residuals
from pallas_kernels.implementations import Impl, dispatch
from pallas_kernels.paged import Paged


class Gradients(NamedTuple):
    """Gradients of queries, window, pool and sink; `pool` is None without a pool or for Fp8Rows."""

    q: Any
    window: Any
    pool: Any
    sink: Any


def differentiable(op: str, forms: Mapping[str, Any]) -> Callable[..., Any]:
    """`dispatch`, as a function of (name, impl, inputs) and static arguments, with gradients.

    A form computes them in its function `name`_backward. GPUs have no kernel for it and use XLA's.
    There are none with a pool in pages.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
    def run(name: str, impl: Impl, static: tuple[Any, ...], inputs: Any) -> Any:
        return dispatch(op, name, impl, forms, inputs, **dict(static))

    def forward(name: str, impl: Impl, static: tuple[Any, ...], inputs: Any) -> Any:
        if isinstance(inputs.pool_LBSK, Paged):
            raise NotImplementedError(
                f"{op}.{name} has no gradient with a pool in pages; pass the entries as an array."
            )
        out_BTHK = residuals.saveable(run(name, impl, static, inputs))
        return out_BTHK, (out_BTHK, inputs)

    def backward(name: str, impl: Impl, static: Any, saved: Any, grad_BTHK: Any) -> Any:
        impl, args = "xla" if impl == "gpu" else impl, (grad_BTHK, *saved)
        gradients = dispatch(op, f"{name}_backward", impl, forms, *args, **dict(static))
        return (_cotangents(saved[1], gradients),)

    run.defvjp(forward, backward)
    return lambda name, impl, inputs, **static: run(name, impl, tuple(static.items()), inputs)


def of_reference(run: Callable[[Any], Any], grad_BTHK: Any, inputs: Any) -> Gradients:
    """Gradients of a function of `inputs`, in everything that is an array."""
    names = _learned(inputs)
    arrays = {name: x for name in names if hasattr(x := getattr(inputs, name), "dtype")}
    (grads,) = jax.vjp(lambda arrays: run(inputs._replace(**arrays)), arrays)[1](grad_BTHK)
    return Gradients(*map(grads.get, names))


def _learned(inputs: Any) -> Gradients:
    """The names of what has a gradient."""
    window = "window_BRK" if "window_BRK" in inputs._fields else "window_BXK"
    return Gradients("q_BTHK", window, "pool_LBSK", "sink_H")


def _cotangents(inputs: Any, gradients: Gradients) -> Any:
    """A record like `inputs` with gradients in place of arrays, None where there is none."""
    by_name = dict(zip(_learned(inputs), gradients, strict=True))
    return type(inputs)(**{name: by_name.get(name) for name in inputs._fields})
