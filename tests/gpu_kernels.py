"""Mosaic GPU kernels run on CPU: synchronisation, copies and products as on a GPU, but no layouts.

Its threads block one another, so that there must be several devices for them (see conftest).
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted(*, races: bool = False) -> Iterator[None]:
    """Kernels traced in here are interpreted; trace anew (a fresh `jax.jit`), wait for results.

    Tiles must be copied from whole multiples of their size, and a race is an error unless `races`.
    """
    interpreters: Any = plgpu
    if not hasattr(interpreters, "force_gpu_interpret_mode"):
        pytest.skip(f"JAX {jax.__version__} has no public interpreter of GPU kernels; 0.12 has.")
    misplaced: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "copy_gmem_to_smem", _watched(plgpu.copy_gmem_to_smem, misplaced))
        params = interpreters.InterpretGPUParams(detect_races=not races)
        with interpreters.force_gpu_interpret_mode(params):
            yield
        jax.effects_barrier()
        assert not misplaced, f"tiles begin at: {misplaced}"


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
