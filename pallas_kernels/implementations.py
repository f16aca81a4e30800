"""How a public function picks the form that runs: by request, or by the compile target.

A form is a module whose functions keep the public function's contract: 'tpu' and 'gpu' hold Pallas
kernels, 'xla' is plain XLA for every platform, 'reference' plain maths.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from pallas_kernels.choice_log import record

Impl = Literal["auto", "tpu", "gpu", "xla", "reference"]
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
_KINDS = {
    "signed integer": jnp.signedinteger,
    "boolean": jnp.bool_,
    "floating-point": jnp.floating,
}
_Form = Callable[..., Any]


class LazyForm:
    """A form whose module is imported when it is first used: Mosaic GPU takes half a second.

    Args:
      module: name of the module.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


class Unsupported(NotImplementedError):
    """A form does not support these arguments; raised while tracing, before anything is built."""


def require(op: str, impl: str, known: Collection[str]) -> None:
    """Reject an unknown form.

    Raises:
      NotImplementedError: listing the known ones.
    """
    if not isinstance(impl, str) or impl not in known:
        raise NotImplementedError(f"{op} has no {shown(impl)} form; pass one of {sorted(known)}.")


def shown(value: Any) -> str:
    """A value as error messages show it: an array's shape, another object's type."""
    if isinstance(value, str | bool | int | float) or value is None:
        return repr(value)
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    return f"an object of type {type(value).__name__}"


def check_arrays(
    op: str,
    arrays: Mapping[str, Any],
    *,
    integers: Collection[str] = (),
    booleans: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Check arrays against their names: x_BTD has dims B, T and D, scale_3 has 3 elements.

    Called before any form is traced, so that a mistake gets the same error whichever form runs.

    Args:
      op: the operation, for error messages.
      arrays: arrays by name; a name without an underscore is a scalar.
      integers: names of the signed integer arrays.
      booleans: names of the boolean arrays; all others are floating-point.
      sizes: sizes of the letters known so far.

    Returns:
      The sizes of all letters.

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong number of dims, or a size that contradicts an earlier array.
    """
    known = dict(sizes or {})
    for name, array in arrays.items():
        kind = "floating-point"
        if name in integers or name in booleans:
            kind = "signed integer" if name in integers else "boolean"
        check_kind(op, name, array, kind)
        known |= check_shape(op, name, array, known)
    return known


def check_kind(op: str, name: str, array: Any, kind: str = "floating-point") -> None:
    """Require a floating-point dtype, or another kind of `_KINDS`.

    Raises:
      TypeError: anything else.
    """
    if not jnp.issubdtype(dtype := dtype_of(op, name, array), _KINDS[kind]):
        raise TypeError(f"{op}: {name} is {dtype}; it must have a {kind} dtype.")


def dtype_of(op: str, name: str, array: Any) -> Any:
    """The dtype of an array or a Python number.

    Raises:
      TypeError: neither of them.
    """
    if isinstance(array, bool | int | float):
        return jnp.result_type(array)
    dtype = getattr(array, "dtype", None)
    if not isinstance(dtype, np.dtype):
        raise TypeError(f"{op}: {name} is {shown(array)}; it must be an array.")
    return dtype


def check_whole(op: str, name: str, value: Any, *, least: int = 1) -> None:
    """Require an integer of at least `least`.

    Raises:
      ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{op}: {name} is {shown(value)}; it must be an integer >= {least}.")


def check_number(op: str, **values: Any) -> None:
    """Require settings that are numbers, not arrays.

    Raises:
      TypeError: anything else.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{op}: {name} is {shown(value)}; it must be a number.")


def check_flag(op: str, **values: Any) -> None:
    """Require settings that are True or False.

    Raises:
      TypeError: anything else.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {shown(value)}; it must be True or False.")


def check_shape(op: str, name: str, array: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Check an array's shape against its name; returns the sizes of the name's letters.

    Raises:
      ValueError: as for `check_arrays`.
    """
    axes = name.rpartition("_")[2] if "_" in name else ""
    shape = getattr(array, "shape", ())
    known = {axis: int(axis) for axis in axes if axis.isdigit()} | dict(sizes)
    same = all(known.get(axis, size) == size for axis, size in zip(axes, shape, strict=False))
    if len(axes) != len(shape) or not same:
        as_is = lambda axis: axis.isdigit() or axis not in known
        expected = ", ".join(axis if as_is(axis) else f"{axis}={known[axis]}" for axis in axes)
        raise ValueError(f"{op}: {name} has shape {shape}, not ({expected}).")
    return dict(zip(axes, shape, strict=True))


def check_dtype(op: str, name: str, array: Any, *dtypes: Any) -> None:
    """Require one of these dtypes.

    Raises:
      TypeError: listing them.
    """
    if (dtype := dtype_of(op, name, array)) not in [jnp.dtype(allowed) for allowed in dtypes]:
        expected = " or ".join(jnp.dtype(allowed).name for allowed in dtypes)
        raise TypeError(f"{op}: {name} is {dtype}; it must be {expected}.")


def dispatch(
    op: str, name: str, impl: str, forms: Mapping[str, Any], *args: Any, **static: Any
) -> Any:
    """Run the function `name` of one form.

    'auto' leaves the choice to the compile target, not to the tracing host. XLA's form runs where
    there is no kernel, where the kernel does not support these arguments, and where the compiler
    would have to partition it.

    Args:
      op: the operation, for error messages.
      name: the function's name.
      impl: 'auto', or a key of `forms`.
      forms: modules by name; 'xla' is among them.
      args: arrays, trees of arrays, or None.
      static: arguments that are not arrays.

    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
    """
    operation = f"{op}.{name}"
    has = lambda key: hasattr(forms[key], name)
    run = lambda key: lambda *args: getattr(forms[key], name)(*args, **static)
    if impl != "auto":
        require(operation, impl, {key for key in forms if has(key)} | {"auto"})
    if impl in _PLATFORMS and _partitioned():
        raise Unsupported(f"{operation}: compilers do not partition kernels; use jax.shard_map.")
    if impl != "auto":
        return run(impl)(*args)
    kernels = any(has(key) for key in _PLATFORMS if key in forms)
    if not kernels or _partitioned():
        why = "compilers do not partition kernels" if kernels else "there is no kernel"
        record(operation, "any", "xla", jax.tree.leaves(args), why)
        return run("xla")(*args)
    xla = _jitted(getattr(forms["xla"], name), tuple(static.items()))
    kernel = lambda key: lambda: run(key) if key in forms and has(key) else None
    forms_by_platform = {
        platform: _recorded(operation, key, kernel(key), xla)
        for key, platform in _PLATFORMS.items()
    }
    return _by_target(operation, xla, forms_by_platform, args)


@functools.lru_cache(maxsize=1024)
def _jitted(form: _Form, static: tuple[tuple[str, Any], ...]) -> _Form:
    """A form that is traced once for all calls with arguments like these, in whichever layer."""
    return jax.jit(functools.partial(form, **dict(static)))


def _partitioned() -> bool:
    """Whether the compiler is to partition what is being traced over a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(mesh.axis_names) > set(mesh.manual_axes)


def _recorded(operation: str, target: str, kernel: Callable[[], _Form | None], xla: _Form) -> _Form:
    """A target's kernel, or XLA's form where it has none for the arguments; each is recorded."""

    def run(*args: Any) -> Any:
        leaves, reason = jax.tree.leaves(args), f"there is no {target} kernel"
        if form := kernel():
            try:
                result = form(*args)
                record(operation, target, target, leaves)
                return result
            except Unsupported as error:
                reason = str(error)
        record(operation, target, "xla", leaves, reason)
        return xla(*args)

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """The forms of one call, as functions from flat arrays to flat results.

    A single opaque parameter of the primitive: JAX inspects parameters that are jaxprs, and expects
    more rules of a primitive that has them.
    """

    name: str
    default: _Form
    kernels: Mapping[str, _Form]
    mesh: Any
    results: Sequence[Any]


# Like `jax.lax.platform_dependent`, except that a kernel is traced only once its platform is known:
# tracing all of them makes tracing and lowering a step for a CPU 2 to 4 times as slow
# (`benchmarks.tracing`). It follows the rules that JAX documents for custom primitives;
# `tests/test_implementations.py` lists the ones it relies on.
_choice_p = Primitive("kernel_choice")
_choice_p.multiple_results = True


def _by_target(
    name: str, default: _Form, kernels: Mapping[str, _Form], args: tuple[Any, ...]
) -> Any:
    leaves, tree = jax.tree.flatten(args)
    jaxpr, out = jax.make_jaxpr(default, return_shape=True)(*args)
    flat = lambda form: lambda *leaves: jax.tree.leaves(form(*tree.unflatten(leaves)))
    choice = _Choice(
        name=name,
        default=jaxpr_as_fun(jaxpr),
        kernels={platform: flat(form) for platform, form in kernels.items()},
        mesh=jax.sharding.get_abstract_mesh(),
        results=jaxpr.out_avals,
    )
    return jax.tree.unflatten(jax.tree.structure(out), _choice_p.bind(*leaves, choice=choice))


@_choice_p.def_abstract_eval
def _(*_: Any, choice: _Choice) -> Any:
    return choice.results


@_choice_p.def_impl
def _(*leaves: Any, choice: _Choice) -> Any:
    return jax.jit(lambda *leaves: _choice_p.bind(*leaves, choice=choice))(*leaves)


def _lowering(platform: str | None) -> Callable[..., Any]:
    def rule(context: Any, *values: Any, choice: _Choice) -> Any:
        run = choice.kernels.get(platform or "", choice.default)
        with jax.sharding.use_abstract_mesh(choice.mesh):
            return mlir.lower_fun(run, multiple_results=True)(context, *values)

    return rule


mlir.register_lowering(_choice_p, _lowering(None))
for _platform in _PLATFORMS.values():
    mlir.register_lowering(_choice_p, _lowering(_platform), platform=_platform)


def _batched(leaves: Any, dims: Any, *, choice: _Choice) -> Any:
    batched = lambda form: jax.vmap(form, in_axes=tuple(dims))
    kernels = {platform: batched(form) for platform, form in choice.kernels.items()}
    outs = _by_target(choice.name, batched(choice.default), kernels, tuple(leaves))
    return outs, [0] * len(outs)


batching.primitive_batchers[_choice_p] = _batched


def _differentiated(*_: Any, choice: _Choice) -> Any:
    raise NotImplementedError(
        f"{choice.name} has no derivative of this order with impl='auto'; "
        "impl='reference' may have one."
    )


# Public functions define their derivatives before they get here.
ad.primitive_jvps[_choice_p] = _differentiated
