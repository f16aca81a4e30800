"""TPU kernels interpreted on CPU with every access checked; operations called in other ways."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted(**params: Any) -> Iterator[None]:
    """Interpret kernels traced in this context: out of bounds raises, unwritten memory is NaN.

    Trace in here (with a fresh `jax.jit`) and wait for the results: what has been compiled before
    is not traced again. With `detect_races=True` a race is an error.
    """
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(pltpu.reset_tpu_interpret_mode_state)
        stack.enter_context(pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)))
        # JAX 0.10 prints its report of a race, 0.12 raises it.
        stack.enter_context(contextlib.redirect_stdout(printed))
        yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


def in_order(op: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """`op` with its arrays as positional arguments, in the order of the fields of `inputs`."""
    return lambda *arrays, **static: op(**inputs(*arrays)._asdict(), **static)


def by_name(implementation: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """`implementation` with the fields of `inputs` as keyword arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = {name: kwargs.pop(name) for name in inputs._fields if name in kwargs}
        return implementation(*args, inputs(**arrays), **kwargs)

    return run
