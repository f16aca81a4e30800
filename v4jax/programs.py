"""Compiled programs kept from one process to the next, in JAX's compilation cache."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import platformdirs

VARIABLE = "V4JAX_CACHE"
OFF = "off"
# Least recently used programs are deleted beyond this.
_MOST_BYTES = 4 * 2**30
# Reading a program back takes about as long as compiling one that compiles faster than this.
_LEAST_SECONDS = 0.2


def keep() -> None:
    """Keep compiled programs in the user's cache directory, unless a JAX cache is set up already.

    The environment variable `V4JAX_CACHE` names another directory, or is 'off'. Programs of several
    processes on CPUs are not kept: see `v4jax_train.processes`.

    Raises:
      ValueError: the directory that `V4JAX_CACHE` names cannot be written.
    """
    config: Any = jax.config
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() == OFF or config.jax_compilation_cache_dir or _are_several_on_cpus():
        return
    directory = Path(chosen).expanduser() if chosen else default_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        problem = f"{directory}: compiled programs cannot be kept here ({error.strerror or error})"
        if chosen:
            raise ValueError(
                f"{problem}; set {VARIABLE} to another directory or '{OFF}'."
            ) from None
        warnings.warn(f"{problem}; set {VARIABLE} to another directory.", stacklevel=3)
        return
    config.update("jax_compilation_cache_dir", str(directory))
    config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def default_directory() -> Path:
    """Where programs are kept unless `V4JAX_CACHE` names another place."""
    return platformdirs.user_cache_path("v4jax") / "programs"


def _are_several_on_cpus() -> bool:
    # Asked only then: counting processes starts JAX's backends.
    if not jax.distributed.is_initialized():
        return False
    return jax.process_count() > 1 and jax.devices()[0].platform == "cpu"
