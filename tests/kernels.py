"""TPU kernels run on CPU, where every access is checked."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted(**params: Any) -> Iterator[None]:
    """Kernels traced in here are interpreted: out of bounds raises, what was not written is NaN.

    Trace anew in here (a fresh `jax.jit`): what is compiled already is not traced again.
    """
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)):
        try:
            yield
        finally:
            pltpu.reset_tpu_interpret_mode_state()


def races_found() -> bool:
    """Whether the last run under `interpreted(detect_races=True)` raced; ask while in there."""
    assert interpret_pallas_call.races is not None, "no kernel ran with detect_races=True"
    return interpret_pallas_call.races.races_found
