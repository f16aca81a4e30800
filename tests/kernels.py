"""TPU kernels run on CPU, where every access is checked."""

import contextlib
import io
from collections.abc import Iterator
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
