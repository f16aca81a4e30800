"""A door's form is chosen by the compile target, lazily, and never silently against a wish."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.implementations import Unsupported, dispatch

STRUCT = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def form(function: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(scale=function)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("traced though not wanted")


def unable(*_: Any, **__: Any) -> Any:
    raise Unsupported("This one takes no arrays.")


def times(number: float) -> types.SimpleNamespace:
    return form(lambda tree, *, by: jax.tree.map(lambda x: x * (number * by), tree))


def door(impl: Any = "auto", **forms: Any) -> Any:
    return lambda x: dispatch("op", "scale", impl, forms, {"x": x}, by=1.0)["x"]


def test_jax_has_the_rules_that_the_choice_stands_on() -> None:
    """Those of its page on primitives: `jax.extend.core` and `jax.interpreters`, nothing else."""
    twice = Primitive("twice")
    twice.multiple_results = True
    twice.def_abstract_eval(lambda x, *, opaque: [x])
    twice.def_impl(lambda x, *, opaque: [opaque(x)])
    lower = lambda run: lambda context, x, *, opaque: mlir.lower_fun(run(opaque))(context, x)
    mlir.register_lowering(twice, lower(lambda opaque: lambda x: [opaque(x)]))
    mlir.register_lowering(twice, lower(lambda _: lambda x: [x * 5.0]), platform="tpu")
    batching.primitive_batchers[twice] = lambda xs, dims, **opaque: (
        twice.bind(*xs, **opaque),
        dims,
    )
    ad.primitive_jvps[twice] = never
    doubled = jaxpr_as_fun(jax.make_jaxpr(lambda x: x * 2.0)(STRUCT))
    run = lambda x: twice.bind(x, opaque=lambda x: doubled(x)[0])[0]
    x = jnp.ones(STRUCT.shape)
    for program in (run, jax.jit(run), jax.jit(jax.vmap(run))):
        np.testing.assert_array_equal(program(x), 2 * x)
    assert "dense<5.0" in targets.lowered("v6e", run, STRUCT).as_text()
    with pytest.raises(AssertionError, match="traced though not wanted"):
        jax.jvp(run, (x,), (x,))


def test_kernels_are_not_traced_for_a_cpu() -> None:
    run = door(xla=times(2.0), tpu=form(never), gpu=form(never))
    x = jnp.ones((8, 128))
    for program in (run, jax.jit(run), lambda x: jax.vmap(run)(x)):
        np.testing.assert_array_equal(program(x), 2 * x)


@pytest.mark.parametrize("target", ["v5p", "h200"])
def test_the_target_chooses(target: Any) -> None:
    forms: dict[str, Any] = {"tpu": times(5.0), "gpu": times(7.0), "xla": times(3.0)}
    text = targets.lowered(target, door(**forms), STRUCT).as_text()
    found = [number for number in ("3.0", "5.0", "7.0") if f"dense<{number}" in text]
    assert found == ["5.0" if target == "v5p" else "7.0"]


def test_a_program_for_several_platforms_holds_the_form_of_each() -> None:
    forms: dict[str, Any] = {"tpu": times(5.0), "gpu": times(7.0), "xla": times(3.0)}
    run = jax.jit(jax.vmap(door(**forms)))
    module = export.export(run, platforms=["cpu", "tpu", "cuda"])(STRUCT).mlir_module()
    assert all(f"dense<{number}" in module for number in ("3.0", "5.0", "7.0"))
    assert jax.eval_shape(run, STRUCT).shape == STRUCT.shape


def test_a_derivative_that_no_door_defines_is_refused_by_name() -> None:
    run = door(xla=times(3.0), tpu=times(5.0))
    x = jnp.ones((8, 128))
    with pytest.raises(NotImplementedError, match=r"^op\.scale has no derivative"):
        jax.jvp(run, (x,), (x,))


def test_xla_serves_where_the_kernel_does_not() -> None:
    forms: dict[str, Any] = {"tpu": form(unable), "xla": times(3.0)}
    text = targets.lowered("v6e", door(**forms), STRUCT).as_text()
    assert "dense<3.0" in text


def test_where_the_compiler_would_have_to_partition_a_kernel_xla_serves() -> None:
    forms: dict[str, Any] = {"tpu": times(5.0), "xla": times(3.0)}
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=targets.devices("v5p")[:2])  # noqa: TID251
    x = jax.ShapeDtypeStruct(STRUCT.shape, STRUCT.dtype, sharding=NamedSharding(mesh, P("x")))
    text = lambda run: jax.jit(run).lower(x).as_text()
    by_device = lambda x: jax.shard_map(door(**forms), in_specs=P("x"), out_specs=P("x"))(x)
    with jax.set_mesh(mesh):
        assert "dense<3.0" in text(door(**forms))
        assert "dense<5.0" in text(by_device)
        with pytest.raises(Unsupported, match=r"op\.scale: .* use jax\.shard_map"):
            text(door("tpu", **forms))


def test_a_wish_is_kept_or_refused() -> None:
    forms: dict[str, Any] = {"tpu": form(unable), "xla": times(3.0)}
    x = jnp.ones((8, 128))
    np.testing.assert_array_equal(door("xla", **forms)(x), 3 * x)
    with pytest.raises(NotImplementedError, match="takes no arrays"):
        door("tpu", **forms)(x)
    with pytest.raises(NotImplementedError, match=r"op\.scale has no 'gpu' form; pass one of"):
        door("gpu", **forms)(x)
