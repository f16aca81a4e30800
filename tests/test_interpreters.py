"""The kernel interpreters detect what kernels must not do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from tests import gpu_kernels, kernels

X = jnp.arange(1024, dtype=jnp.float32).reshape(8, 128)


def doubled(x: Any, *, waits: bool) -> Any:
    """Twice x, by a TPU kernel that copies it and waits for the copy or does not."""

    def body(x_ref: Any, out_ref: Any, buffer_ref: Any, sem: Any) -> None:
        copy = pltpu.make_async_copy(x_ref, buffer_ref, sem)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = 2 * buffer_ref[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        body,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


def test_a_tpu_kernel_that_waits_does_not_race() -> None:
    with kernels.interpreted(detect_races=True):
        np.testing.assert_array_equal(jax.jit(lambda: doubled(X, waits=True))(), 2 * X)


def test_a_tpu_kernel_that_does_not_wait_races() -> None:
    with (
        pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"),
        kernels.interpreted(detect_races=True),
    ):
        jax.block_until_ready(jax.jit(lambda: doubled(X, waits=False))())


def reversed_rows(*, commits: bool) -> Any:
    """A GPU kernel that copies what it wrote, ordered by a fence or not."""

    def body(x_ref: Any, out_ref: Any, buffer_ref: Any) -> None:
        buffer_ref[...] = x_ref[...]
        if commits:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer_ref, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(X.shape, X.dtype),
        scratch_types={"buffer_ref": plgpu.SMEM(X.shape, X.dtype)},
    )


@pytest.mark.parametrize("commits", [True, False])
def test_a_gpu_kernel_that_does_not_commit_races(commits: bool) -> None:
    with gpu_kernels.interpreted():
        run = jax.jit(reversed_rows(commits=commits))
        if commits:
            np.testing.assert_array_equal(run(X), X)
            return
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
            jax.block_until_ready(run(X))
