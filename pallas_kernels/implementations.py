"""How a door finds the form that answers: by wish, or by the compile target.

A form is a module whose functions keep the door's contract: 'tpu' and 'gpu' hold Pallas kernels,
'xla' plain XLA for every platform, 'reference' the plain maths.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

Impl = Literal["auto", "tpu", "gpu", "xla", "reference"]
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
_KINDS = {"signed integers": jnp.signedinteger, "booleans": jnp.bool_, "floats": jnp.floating}
_Form = Callable[..., Any]


class Unsupported(NotImplementedError):
    """A form does not take these arguments; raised while tracing, before anything is built."""


def require(op: str, impl: str, known: Collection[str]) -> None:
    """Refuse what there is not, never silently.

    Raises:
      NotImplementedError: naming what there is.
    """
    if not isinstance(impl, str) or impl not in known:
        raise NotImplementedError(f"{op} has no {shown(impl)} form; pass one of {sorted(known)}.")


def shown(value: Any) -> str:
    """A value in a refusal: of an array the shape, of other objects the type."""
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
    """Refuse arrays that are not what their names say: x_BTD has dims B, T and D, scale_3 has 3.

    Doors ask before any form is traced, so that a mistake gets one answer whatever form runs.

    Args:
      op: for messages.
      arrays: by name; one without an underscore is a scalar.
      integers: which of them are of signed integers.
      booleans: which of them are of booleans; the others are of floats.
      sizes: of letters that are known already.

    Returns:
      The sizes of all letters.

    Raises:
      TypeError: another dtype.
      ValueError: another number of dims, or a size that differs from that of an array before.
    """
    found = dict(sizes or {})
    for name, array in arrays.items():
        kind = "floats"
        if name in integers or name in booleans:
            kind = "signed integers" if name in integers else "booleans"
        dtype = dtype_of(op, name, array)
        if not jnp.issubdtype(dtype, _KINDS[kind]):
            raise TypeError(f"{op}: {name} is {dtype}; it takes {kind}.")
        found |= check_shape(op, name, array, found)
    return found


def dtype_of(op: str, name: str, array: Any) -> Any:
    """The dtype of an array or a plain number.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(array, bool | int | float):
        return jnp.result_type(array)
    dtype = getattr(array, "dtype", None)
    if not isinstance(dtype, np.dtype):
        raise TypeError(f"{op}: {name} is {shown(array)}; it takes an array.")
    return dtype


def check_whole(op: str, name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number, or less than the least.

    Raises:
      ValueError: with what it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{op}: {name} is {shown(value)}; it takes whole numbers from {least} on.")


def check_number(op: str, **values: Any) -> None:
    """Refuse settings that are no plain numbers.

    Raises:
      TypeError: with what it is.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{op}: {name} is {shown(value)}; it takes a number.")


def check_flag(op: str, **values: Any) -> None:
    """Refuse settings that are neither True nor False.

    Raises:
      TypeError: with what it is.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {shown(value)}; it takes True or False.")


def check_shape(op: str, name: str, array: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the letters of a name.

    Raises:
      ValueError: as for `check_arrays`.
    """
    axes = name.rpartition("_")[2] if "_" in name else ""
    shape = getattr(array, "shape", ())
    known = {axis: int(axis) for axis in axes if axis.isdigit()} | dict(sizes)
    same = all(known.get(axis, size) == size for axis, size in zip(axes, shape, strict=False))
    if len(axes) != len(shape) or not same:
        told = lambda axis: axis.isdigit() or axis not in known
        wanted = ", ".join(axis if told(axis) else f"{axis}={known[axis]}" for axis in axes)
        raise ValueError(f"{op}: {name} has shape {shape}, not ({wanted}).")
    return dict(zip(axes, shape, strict=True))


def check_dtype(op: str, name: str, array: Any, *dtypes: Any) -> None:
    """Refuse other dtypes than these.

    Raises:
      TypeError: naming them.
    """
    if (dtype := dtype_of(op, name, array)) not in [jnp.dtype(wanted) for wanted in dtypes]:
        wanted = " or ".join(jnp.dtype(wanted).name for wanted in dtypes)
        raise TypeError(f"{op}: {name} is {dtype}; it takes {wanted}.")


def dispatch(
    op: str, name: str, impl: str, forms: Mapping[str, Any], *args: Any, **static: Any
) -> Any:
    """Run the function `name` of one form.

    'auto' leaves the choice to the compile target, not to the host that traces. Where there is no
    kernel, it does not take these arguments or the compiler would have to partition it, XLA's form
    serves.

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
    if impl in _PLATFORMS and _partitioned():
        raise Unsupported(f"{op}.{name}: compilers do not partition kernels: use jax.shard_map.")
    if impl != "auto":
        return run(impl)(*args)
    kernels = {
        platform: _or_else(run(key), run("xla"))
        for key, platform in _PLATFORMS.items()
        if key in having and not _partitioned()
    }
    return _by_target(f"{op}.{name}", run("xla"), kernels, args)


def _partitioned() -> bool:
    """Whether what is traced here is for the compiler to split over a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(mesh.axis_names) > set(mesh.manual_axes)


def _or_else(kernel: _Form, other: _Form) -> _Form:
    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except Unsupported:
            return other(*args)

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """The forms of one call: functions of its flat arrays to flat results.

    One opaque parameter of the primitive: JAX looks into parameters that are jaxprs, and expects
    more rules of a primitive that has such.
    """

    name: str
    default: _Form
    kernels: Mapping[str, _Form]
    mesh: Any
    results: Sequence[Any]


# As `jax.lax.platform_dependent`, except that a kernel is not traced before its platform is known:
# tracing all of them makes tracing and lowering a step for a CPU 2 to 4 times as slow
# (`benchmarks.tracing`). By the rules that JAX documents for primitives of one's own;
# `tests/test_implementations.py` names what is relied on.
_choice_p = Primitive("kernel_choice")
_choice_p.multiple_results = True


def _by_target(
    name: str, default: _Form, kernels: Mapping[str, _Form], args: tuple[Any, ...]
) -> Any:
    if not kernels:
        return default(*args)
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
    over = lambda form: jax.vmap(form, in_axes=tuple(dims))
    forms = {platform: over(form) for platform, form in choice.kernels.items()}
    outs = _by_target(choice.name, over(choice.default), forms, tuple(leaves))
    return outs, [0] * len(outs)


batching.primitive_batchers[_choice_p] = _batched


def _differentiated(*_: Any, choice: _Choice) -> Any:
    raise NotImplementedError(
        f"{choice.name} has no derivative of this order with impl='auto'; "
        "impl='reference' may have."
    )


# Doors define the derivatives that there are before they come here.
ad.primitive_jvps[_choice_p] = _differentiated
