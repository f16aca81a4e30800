"""Operations whose gradients are those of the reference, whichever form ran forward."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.implementations import Impl, dispatch


def differentiable(op: str, forms: Mapping[str, Any]) -> Callable[..., Any]:
    """`dispatch`, as a function of (name, impl, args) and static arguments, with gradients."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
    def run(name: str, impl: Impl, static: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        return dispatch(op, name, impl, forms, *args, **dict(static))

    def forward(name: str, impl: Impl, static: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        return run(name, impl, static, args), args

    def backward(name: str, impl: Impl, static: Any, args: Any, grads: Any) -> Any:
        del impl
        reference = functools.partial(getattr(forms["reference"], name), **dict(static))
        grads = jax.vjp(reference, *args)[1](grads)
        return (jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, grads),)

    run.defvjp(forward, backward)
    return lambda name, impl, args, **static: run(name, impl, tuple(static.items()), args)
