"""TPU kernels run on CPU, where every access is checked; doors and forms called in other ways."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted(**params: Any) -> Iterator[None]:
    """Kernels traced in here are interpreted: out of bounds raises, what was not written is NaN.

    Trace anew in here (a fresh `jax.jit`), and wait for results: what is compiled already is not
    traced again. With `detect_races=True` a race is an error.
    """
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(pltpu.reset_tpu_interpret_mode_state)
        stack.enter_context(pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)))
        # JAX 0.10 prints what it says of a race, 0.12 raises it.
        stack.enter_context(contextlib.redirect_stdout(printed))
        yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


def in_order(door: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """A door that takes its arrays by place, in the order of the record of its inputs."""
    return lambda *arrays, **static: door(**inputs(*arrays)._asdict(), **static)


def by_name(form: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """A form that takes the arrays of its record by name, after what it takes by place."""

    def run(*before: Any, **given: Any) -> Any:
        arrays = {name: given.pop(name) for name in inputs._fields if name in given}
        return form(*before, inputs(**arrays), **given)

    return run
