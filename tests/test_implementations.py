"""The compile target chooses the implementation, lazily; an explicit choice is never replaced."""

import sys
import types
from pathlib import Path
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

import pallas_kernels
from pallas_kernels import Choice, targets
from pallas_kernels.implementations import LazyForm, Unsupported, dispatch

STRUCT = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def implementation(function: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(scale=function)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("traced unexpectedly")


def unsupported(*_: Any, **__: Any) -> Any:
    raise Unsupported("This one takes no arrays.")


def times(number: float) -> types.SimpleNamespace:
    return implementation(lambda tree, *, by: jax.tree.map(lambda x: x * (number * by), tree))


def operation(impl: Any = "auto", **implementations: Any) -> Any:
    return lambda x: dispatch("op", "scale", impl, implementations, {"x": x}, by=1.0)["x"]


def test_jax_has_the_rules_that_dispatch_relies_on() -> None:
    """Only those documented for primitives: `jax.extend.core` and `jax.interpreters`."""
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
    with pytest.raises(AssertionError, match="traced unexpectedly"):
        jax.jvp(run, (x,), (x,))


def test_kernels_are_not_traced_for_cpu() -> None:
    run = operation(xla=times(2.0), tpu=implementation(never), gpu=implementation(never))
    x = jnp.ones((8, 128))
    for program in (run, jax.jit(run), lambda x: jax.vmap(run)(x)):
        np.testing.assert_array_equal(program(x), 2 * x)


def test_layers_share_one_trace() -> None:
    traces = []

    def traced(tree: Any, *, by: float) -> Any:
        traces.append(by)
        return tree

    run = operation(xla=implementation(traced), tpu=implementation(never))
    jax.jit(lambda x: run(run(x)))(jnp.ones((8, 128)))
    assert traces == [1.0]


def test_a_lazy_form_is_imported_when_its_platform_is_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_kernels.py").write_text("scale = lambda tree, *, by: {'x': tree['x'] * 7.0}")
    monkeypatch.syspath_prepend(tmp_path)
    run = operation(xla=times(3.0), tpu=times(5.0), gpu=LazyForm("lazy_kernels"))
    jax.jit(run)(jnp.ones((8, 128)))
    assert "lazy_kernels" not in sys.modules
    assert "dense<7.0" in targets.lowered("h200", run, STRUCT).as_text()


@pytest.mark.parametrize("target", ["v5p", "h200"])
def test_the_target_chooses_the_implementation(target: Any) -> None:
    implementations: dict[str, Any] = {"tpu": times(5.0), "gpu": times(7.0), "xla": times(3.0)}
    text = targets.lowered(target, operation(**implementations), STRUCT).as_text()
    constants = [number for number in ("3.0", "5.0", "7.0") if f"dense<{number}" in text]
    assert constants == ["5.0" if target == "v5p" else "7.0"]


def test_a_program_for_several_platforms_holds_the_implementation_of_each() -> None:
    implementations: dict[str, Any] = {"tpu": times(5.0), "gpu": times(7.0), "xla": times(3.0)}
    run = jax.jit(jax.vmap(operation(**implementations)))
    module = export.export(run, platforms=["cpu", "tpu", "cuda"])(STRUCT).mlir_module()
    assert all(f"dense<{number}" in module for number in ("3.0", "5.0", "7.0"))
    assert jax.eval_shape(run, STRUCT).shape == STRUCT.shape


def test_the_choice_for_each_target_is_counted_with_its_reason() -> None:
    implementations: dict[str, Any] = {"tpu": implementation(unsupported), "xla": times(3.0)}
    pallas_kernels.clear_choices()
    run = operation(**implementations)
    for target in ("v6e", "h200"):
        targets.lowered(target, lambda x: run(x) + run(x), STRUCT)
    targets.lowered("v6e", operation(tpu=times(5.0), xla=times(3.0)), STRUCT)
    jax.jit(operation(tpu=implementation(never), xla=times(3.0)))(jnp.ones((8, 128)))
    jax.jit(operation(xla=times(3.0)))(jnp.ones((8, 128)))
    arrays = ("float32[8,128]",)
    assert pallas_kernels.choices() == {
        Choice("op.scale", "any", "xla", "there is no kernel", arrays): 1,
        Choice("op.scale", "gpu", "xla", "there is no gpu kernel", arrays): 2,
        Choice("op.scale", "tpu", "tpu", "", arrays): 1,
        Choice("op.scale", "tpu", "xla", "This one takes no arrays.", arrays): 2,
    }
    pallas_kernels.clear_choices()
    assert pallas_kernels.choices() == {}


def test_an_undefined_derivative_is_refused_by_name() -> None:
    run = operation(xla=times(3.0), tpu=times(5.0))
    x = jnp.ones((8, 128))
    with pytest.raises(NotImplementedError, match=r"^op\.scale has no derivative"):
        jax.jvp(run, (x,), (x,))


def test_xla_replaces_a_kernel_that_does_not_take_the_arguments() -> None:
    implementations: dict[str, Any] = {"tpu": implementation(unsupported), "xla": times(3.0)}
    text = targets.lowered("v6e", operation(**implementations), STRUCT).as_text()
    assert "dense<3.0" in text


def test_xla_replaces_a_kernel_that_the_compiler_would_have_to_partition() -> None:
    implementations: dict[str, Any] = {"tpu": times(5.0), "xla": times(3.0)}
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=targets.devices("v5p")[:2])  # noqa: TID251
    x = jax.ShapeDtypeStruct(STRUCT.shape, STRUCT.dtype, sharding=NamedSharding(mesh, P("x")))
    text = lambda run: jax.jit(run).lower(x).as_text()
    by_device = lambda x: jax.shard_map(
        operation(**implementations), in_specs=P("x"), out_specs=P("x")
    )(x)
    with jax.set_mesh(mesh):
        pallas_kernels.clear_choices()
        assert "dense<3.0" in text(operation(**implementations))
        assert [(c.target, c.reason) for c in pallas_kernels.choices()] == [
            ("any", "compilers do not partition kernels")
        ]
        assert "dense<5.0" in text(by_device)
        with pytest.raises(Unsupported, match=r"op\.scale: .* use jax\.shard_map"):
            text(operation("tpu", **implementations))


def test_an_explicit_choice_is_kept_or_refused() -> None:
    implementations: dict[str, Any] = {"tpu": implementation(unsupported), "xla": times(3.0)}
    x = jnp.ones((8, 128))
    np.testing.assert_array_equal(operation("xla", **implementations)(x), 3 * x)
    with pytest.raises(NotImplementedError, match="takes no arrays"):
        operation("tpu", **implementations)(x)
    with pytest.raises(NotImplementedError, match=r"op\.scale has no 'gpu' form; pass one of"):
        operation("gpu", **implementations)(x)
