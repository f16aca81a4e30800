"""GPU kernels run on CPU, where shared memory, barriers and copies are simulated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, params
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted(**settings: Any) -> Iterator[None]:
    """Kernels traced in here are interpreted. Trace anew in here, with a fresh `jax.jit`."""
    with contextlib.ExitStack() as stack:
        if jax.__version_info__ < (0, 11):
            # Its interpreter does not know layouts, which mean nothing to it anyway.
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(plgpu, "layout_cast", lambda x, layout: x)
            patch.setattr(plgpu, "load", lambda ref, *_, **__: ref[...])
        stack.callback(interpret_pallas_call.reset_gpu_interpret_mode_state)
        stack.enter_context(params.force_gpu_interpret_mode(params.InterpretGPUParams(**settings)))
        yield


def races_found() -> bool:
    """Whether a run under `interpreted(detect_races=True)` raced; ask while in there."""
    return gpu_callbacks.get_races().races_found
