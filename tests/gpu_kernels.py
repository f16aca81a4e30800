"""Mosaic GPU kernels run on CPU: synchronisation, copies and products as on a GPU, but no layouts.

Its threads block one another, so that there must be several devices for them (see conftest).
"""

import contextlib
import functools
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.state.types import TransposeTransform
from jax.experimental.pallas import mosaic_gpu as plgpu

_OLD = jax.__version_info__ < (0, 11)


@contextlib.contextmanager
def interpreted(*, races: bool = False) -> Iterator[None]:
    """Kernels traced in here are interpreted; trace anew (a fresh `jax.jit`), wait for results.

    Tiles must be copied from whole multiples of their size. JAX 0.11 also looks for races, of which
    the last kernel must have none unless `races`.
    """
    misplaced: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if _OLD:
            _fill_gaps(patch)
        patch.setattr(plgpu, "copy_gmem_to_smem", _watched(plgpu.copy_gmem_to_smem, misplaced))
        stack.callback(gpu_callbacks.reset_gpu_interpret_mode_state)
        look = not (_OLD or races)
        settings = params.InterpretGPUParams(detect_races=look)
        stack.enter_context(params.force_gpu_interpret_mode(settings))
        yield
        jax.effects_barrier()
        assert not misplaced, f"tiles begin at: {misplaced}"
        assert not (look and gpu_callbacks.get_races().races_found)


def _watched(copy: Callable[..., None], misplaced: list[tuple[int, int]]) -> Callable[..., None]:
    """Notes copies that are right here and wrong on a GPU, where a copy does not cross tiles."""

    def note(start: Any, size: int) -> None:
        if int(start) % size:
            misplaced.append((int(start), size))

    def watch(source: Any, to: Any, *rest: Any, **params: Any) -> None:
        tilings = [x.tiling for x in getattr(to, "transforms", ()) if hasattr(x, "tiling")]
        indexers = [x for x in source.transforms if hasattr(x, "indices")]
        for tiling, indexer in itertools.product(tilings, indexers):
            parts = [x for x in indexer.indices if hasattr(x, "start")]
            for part, size in zip(parts[-len(tiling) :], tiling, strict=True):
                jax.debug.callback(functools.partial(note, size=size), part.start)
        copy(source, to, *rest, **params)

    return watch


def _fill_gaps(patch: pytest.MonkeyPatch) -> None:
    """What JAX 0.10 lacks: layouts, which interpreters ignore, and transposed operands."""
    patch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    patch.setattr(plgpu, "load", lambda ref, *_, **__: ref[...])
    keep, here = gpu_callbacks._remove_noop_transforms, threading.local()

    def untransposed(transforms: tuple[Any, ...]) -> tuple[Any, ...]:
        found = tuple(x for x in transforms if not isinstance(x, TransposeTransform))
        here.transposed = len(found) < len(transforms) or getattr(here, "transposed", False)
        return keep(found)

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
        transposed, here.transposed = here.transposed, False
        return np.matmul(a, b.T if transposed else b, dtype=dtype)

    patch.setattr(gpu_callbacks, "_remove_noop_transforms", untransposed)
    patch.setattr(gpu_callbacks, "np", types.SimpleNamespace(**(vars(np) | {"matmul": matmul})))
