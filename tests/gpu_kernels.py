"""Mosaic GPU kernels run on CPU: synchronisation, copies and matmuls as on a GPU, but no layouts.

The interpreter's threads block one another, so it needs several devices (see conftest).
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
    """Interpret kernels traced in this context: use a fresh `jax.jit`, and wait for results.

    Tiles must be copied from multiples of their size, and a race is an error unless `races`.
    """
    interpreters: Any = plgpu
    if not hasattr(interpreters, "force_gpu_interpret_mode"):
        pytest.skip(
            f"JAX {jax.__version__} has no public interpreter for GPU kernels; 0.12 has one."
        )
    misplaced: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "copy_gmem_to_smem", _checked(plgpu.copy_gmem_to_smem, misplaced))
        params = interpreters.InterpretGPUParams(detect_races=not races)
        with interpreters.force_gpu_interpret_mode(params):
            yield
        jax.effects_barrier()
        assert not misplaced, f"copies that cross tiles, as (start, tile size): {misplaced}"


def _checked(copy: Callable[..., None], misplaced: list[tuple[int, int]]) -> Callable[..., None]:
    """Record copies that cross tiles: the interpreter allows them, a GPU does not."""

    def record(start: Any, size: int) -> None:
        if int(start) % size:
            misplaced.append((int(start), size))

    def checked(source: Any, to: Any, *rest: Any, **params: Any) -> None:
        tilings = [x.tiling for x in getattr(to, "transforms", ()) if hasattr(x, "tiling")]
        indexers = [x for x in source.transforms if hasattr(x, "indices")]
        for tiling, indexer in itertools.product(tilings, indexers):
            parts = [x for x in indexer.indices if hasattr(x, "start")]
            for part, size in zip(parts[-len(tiling) :], tiling, strict=True):
                jax.debug.callback(functools.partial(record, size=size), part.start)
        copy(source, to, *rest, **params)

    return checked
