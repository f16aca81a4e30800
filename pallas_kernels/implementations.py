"""How a door finds the form that answers: by wish, or by the compile target.

A form is a module whose functions keep the door's contract: 'tpu' and 'gpu' hold Pallas kernels,
'xla' plain XLA for every platform, 'reference' the plain maths.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax

Impl = Literal["auto", "tpu", "gpu", "xla", "reference"]
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}


class Unsupported(NotImplementedError):
    """A form does not take these arguments; raised while tracing, before anything is built."""


def require(op: str, impl: str, known: Collection[str]) -> None:
    """Refuse what there is not, never silently.

    Raises:
      NotImplementedError: naming what there is.
    """
    if impl not in known:
        raise NotImplementedError(f"{op} has no '{impl}' form; pass one of {sorted(known)}.")


def dispatch(
    op: str, name: str, impl: str, forms: Mapping[str, Any], *args: Any, **static: Any
) -> Any:
    """Run the function `name` of one form.

    'auto' leaves the choice to the compile target, not to the host that traces: kernels trace on
    every host. Where there is no kernel, or it does not take these arguments, XLA's form serves.

    Args:
      op: for messages.
      name: the function.
      impl: 'auto', or a key of `forms`.
      forms: modules; 'xla' is among them.
      args: arrays, trees of arrays, None.
      static: what is no array.
    Raises:
      NotImplementedError: there is no such form, or it does not take these arguments.
    """
    having = {key for key, form in forms.items() if hasattr(form, name)}
    require(f"{op}.{name}", impl, having | {"auto"})
    run = lambda key: lambda *args: getattr(forms[key], name)(*args, **static)
    if impl != "auto":
        return run(impl)(*args)
    kernels = {
        platform: _or_else(run(key), run("xla"))
        for key, platform in _PLATFORMS.items()
        if key in having
    }
    if not kernels:
        return run("xla")(*args)
    return jax.lax.platform_dependent(*args, default=run("xla"), **kernels)


def _or_else(kernel: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except Unsupported:
            return other(*args)

    return run
