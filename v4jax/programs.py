"""Compiled programs, kept across processes in JAX's compilation cache."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import platformdirs

VARIABLE = "V4JAX_CACHE"
OFF = "off"
# Beyond this size, the least recently used programs are deleted.
_MAX_BYTES = 4 * 2**30
# Programs that compile faster are not worth reading back.
_MIN_SECONDS = 0.2


def keep() -> None:
    """Keep compiled programs in the user's cache directory, unless a JAX cache is configured.

    The environment variable `V4JAX_CACHE` can name another directory, or be 'off'. With several
    processes on CPUs, programs are not kept; see `v4jax_train.processes`.

    Raises:
      ValueError: the directory named by `V4JAX_CACHE` is not writable.
    """
    config: Any = jax.config
    setting = os.environ.get(VARIABLE, "")
    if setting.lower() == OFF or config.jax_compilation_cache_dir or _has_cpu_peers():
        return
    directory = Path(setting).expanduser() if setting else default_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        problem = f"{directory}: compiled programs cannot be kept here ({error.strerror or error})"
        if setting:
            raise ValueError(
                f"{problem}; set {VARIABLE} to another directory or '{OFF}'."
            ) from None
        warnings.warn(f"{problem}; set {VARIABLE} to another directory.", stacklevel=3)
        return
    config.update("jax_compilation_cache_dir", str(directory))
    config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def default_directory() -> Path:
    """The directory for programs unless `V4JAX_CACHE` names another."""
    return platformdirs.user_cache_path("v4jax") / "programs"


def _has_cpu_peers() -> bool:
    # Checked first, as counting processes starts JAX's backends.
    if not jax.distributed.is_initialized():
        return False
    return jax.process_count() > 1 and jax.devices()[0].platform == "cpu"
