"""Mosaic GPU kernels run on CPU: synchronisation, copies and products as on a GPU, but no layouts.

Its threads block one another, so that there must be several devices for them (see conftest).
"""

import contextlib
import threading
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.state.types import TransposeTransform
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import mlir

_OLD = jax.__version_info__ < (0, 11)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in here are interpreted; trace anew (a fresh `jax.jit`), wait for results.

    JAX 0.11 also looks for races, of which the last kernel must have none.
    """
    with contextlib.ExitStack() as stack:
        if _OLD:
            _fill_gaps(stack)
        settings = params.InterpretGPUParams(detect_races=not _OLD)
        stack.enter_context(params.force_gpu_interpret_mode(settings))
        yield
        if not _OLD:
            assert not gpu_callbacks.get_races().races_found  # pyright: ignore


def _fill_gaps(stack: contextlib.ExitStack) -> None:
    """What the interpreter of JAX 0.10 lacks: layouts that are no-ops, transposed operands."""
    mlir.register_lowering(core.layout_cast_p, lambda _, x, **__: [x], platform="cpu")
    patch = lambda where, name, new: stack.enter_context(mock.patch.object(where, name, new))

    def load(ref: Any, idx: Any, *, layout: Any, optimized: bool) -> jax.Array:
        del idx, optimized
        return plgpu.layout_cast(ref[...], layout)

    # The signature tells kernels which version of JAX there is.
    patch(plgpu, "load", load)
    keep, here = gpu_callbacks._remove_noop_transforms, threading.local()

    def untransposed(transforms: tuple[Any, ...]) -> tuple[Any, ...]:
        found = tuple(x for x in transforms if not isinstance(x, TransposeTransform))
        here.transposed = len(found) < len(transforms) or getattr(here, "transposed", False)
        return keep(found)

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
        transposed, here.transposed = here.transposed, False
        return np.matmul(a, b.T if transposed else b, dtype=dtype)

    patch(gpu_callbacks, "_remove_noop_transforms", untransposed)
    patch(gpu_callbacks, "np", types.SimpleNamespace(**(vars(np) | {"matmul": matmul})))
