"""Compiled programs that are kept between processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import platformdirs
import pytest
from jax.experimental.compilation_cache import compilation_cache

import v4jax
from v4jax import programs
from v4jax_train.__main__ import main as train_main

# Compiles for longer than the shortest compilation that is kept, and reports what came from disk.
SCRIPT = """
import collections, jax, jax.numpy as jnp
from v4jax import programs
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
programs.keep()
def slow(x):
    for i in range(400):
        x = jnp.sin(x @ x) + i
    return x
print(float(jax.jit(slow)(jnp.ones((8, 8))).sum()))
print(events["/jax/compilation_cache/cache_hits"])
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"V4JAX_CACHE": str(cache), "XLA_FLAGS": ""}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> tuple[str, int, str]:
    """The number computed, the programs that came from disk, and standard error."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    number, hits = out.split()
    return number, int(hits), err


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """JAX's configuration without a cache, restored afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    config: Any = jax.config
    before = {name: getattr(config, name) for name in names}
    config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("V4JAX_CACHE")
    yield config
    for name, value in before.items():
        config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_is_compiled_once_by_two_processes_together_and_again_once_it_is_damaged(
    tmp_path: Path,
) -> None:
    together = [start(tmp_path), start(tmp_path)]
    numbers = {result(process)[0] for process in together}
    number, hits, err = result(start(tmp_path))
    assert numbers == {number}
    assert hits >= 1
    assert err == ""
    for file in tmp_path.glob("*-cache"):
        file.write_bytes(file.read_bytes()[:100])
    again, hits, err = result(start(tmp_path))
    assert (again, hits) == (number, 0)
    assert "Traceback" not in err


def test_programs_are_kept_in_the_users_cache_directory_up_to_a_size(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    programs.keep()
    assert config.jax_compilation_cache_dir == str(tmp_path / "v4jax" / "programs")
    assert (tmp_path / "v4jax" / "programs").is_dir()
    assert config.jax_compilation_cache_max_size == 4 * 2**30


def test_a_cache_that_jax_has_already_is_left_alone(config: Any, tmp_path: Path) -> None:
    config.update("jax_compilation_cache_dir", str(tmp_path))
    limit = config.jax_compilation_cache_max_size
    programs.keep()
    assert config.jax_compilation_cache_dir == str(tmp_path)
    assert config.jax_compilation_cache_max_size == limit


def test_nothing_is_kept_when_switched_off(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4JAX_CACHE", "off")
    programs.keep()
    assert config.jax_compilation_cache_dir is None


def test_a_chosen_directory_that_cannot_be_created_is_an_error(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("V4JAX_CACHE", str(tmp_path / "file" / "programs"))
    with pytest.raises(ValueError, match="set V4JAX_CACHE to another directory or 'off'"):
        programs.keep()
    assert config.jax_compilation_cache_dir is None


def test_a_default_directory_that_cannot_be_created_is_a_warning(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "v4jax").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    with pytest.warns(UserWarning, match="compiled programs cannot be kept here"):
        programs.keep()
    assert config.jax_compilation_cache_dir is None


def test_loading_a_model_turns_the_cache_on(config: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("V4JAX_CACHE", str(tmp_path))
    v4jax.load("tiny")
    assert config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize("command", ["train", "resume", "eval", "demo"])
def test_training_commands_turn_the_cache_off(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V4JAX_CACHE", str(tmp_path))
    with pytest.raises(SystemExit):
        train_main([command, "--no-cache", "--help"])
    assert os.environ["V4JAX_CACHE"] == "off"
