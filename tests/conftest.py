"""Settings every test runs under: CPU, eight simulated devices, strict dtypes and ranks."""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Another process may be compiling for TPUs too.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from jax._src import compiler

from tests import quick

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drop each module's compiled programs: their memory maps would exhaust the process's."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Host programs compiled as `tests.quick` says.

    For whole models and for forms of XLA on many shapes; what tests bits, kernels or other
    compilers is compiled as for users.
    """
    options = compiler.get_compile_options

    def quicker(*args: Any, backend: Any, **kwargs: Any) -> Any:
        made = options(*args, backend=backend, **kwargs)
        # JAX's own switch would change the programs for chips too.
        if backend.platform == "cpu":
            debug = made.executable_build_options.debug_options
            debug.xla_backend_optimization_level = 0
            debug.xla_llvm_disable_expensive_passes = True
            made.env_option_overrides += list(quick.OPTIONS.items())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quicker)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests first: a long one begun last would leave the other worker idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
