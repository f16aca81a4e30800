"""Settings of all tests: CPU, eight simulated devices, strict dtype and rank promotion."""

import gc
import os
import re
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Another process may be compiling for TPUs at the same time.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Tests neither use nor fill the user's cache of compiled programs.
os.environ.setdefault("V4JAX_CACHE", "off")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from jaxtyping import install_import_hook

from tests import house


def annotated_modules() -> Iterator[str]:
    """Modules with array annotations. Checking all others would take most of the tests' time."""
    for name, file in house.files().items():
        if re.search("^from jaxtyping import", file.read_text("utf-8"), re.MULTILINE):
            yield name


install_import_hook(list(annotated_modules()), "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def clear_caches() -> Iterator[None]:
    """Drop a module's compiled programs, or their memory maps would exceed the process's limit."""
    yield
    jax.clear_caches()


def pytest_collection_finish() -> None:
    """Exempt modules and tests, which are many, from garbage collection, and collect rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: a long one at the end would leave the other worker idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
