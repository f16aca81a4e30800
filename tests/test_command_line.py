"""What the commands have in common: streams that are closed, full or left by their reader."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from v4jax.commands import command_line

FULL = Path("/dev/full")
# A command of each program that answers at once: it prints, or fails.
INSPECT = ("v4jax", "inspect", "tiny")
HELP = ("v4jax_train", "eval", "--help")
FAILS = ("v4jax_train", "plot", "nothing")


def shell(words: tuple[str, ...], redirections: str, **environment: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command whose streams a shell arranges."""
    line = f'"{sys.executable}" -m {" ".join(words)} {redirections}'
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [INSPECT, HELP, FAILS])
def test_a_closed_output_is_told_before_anything_is_done(words: tuple[str, ...]) -> None:
    program = words[0].replace("_", "-")
    told = f"{program}: standard output is closed, so nothing was done.\n"
    assert shell(words, ">&-") == (1, "", told)
    assert shell(words, ">&- 2>&-") == (1, "", "")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "told"),
    [(INSPECT, "v4jax inspect: standard output: No space left on device.\n"), (HELP, "")],
)
def test_an_output_that_is_full_fails(words: tuple[str, ...], told: str, unbuffered: str) -> None:
    assert shell(words, "> /dev/full", PYTHONUNBUFFERED=unbuffered) == (1, "", told)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [INSPECT, HELP])
def test_an_output_whose_reader_has_gone_fails_without_a_word(
    words: tuple[str, ...], unbuffered: str
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as gone:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full", "2> >(true)"])
@pytest.mark.parametrize(("words", "status"), [(INSPECT, 0), (FAILS, 1)])
def test_standard_error_that_takes_nothing_changes_nothing(
    words: tuple[str, ...], status: int, where: str
) -> None:
    found, out, _ = shell(words, where)
    assert found == status
    assert ("DeepSeek-V4 tiny" in out) == (status == 0)


def test_a_closed_input_is_an_empty_one(tmp_path: Path) -> None:
    status, out, err = shell(("v4jax", "generate", "tiny", "-p", "-"), "<&-")
    assert (status, out) == (1, "")
    assert err == "v4jax generate: the prompt is empty; give a text.\n"


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library writes to standard error would go into them."""
    file = tmp_path / "file"
    code = (
        "import os, sys; from v4jax.commands import command_line;"
        f"context = command_line.process('x'); context.__enter__(); open({str(file)!r}, 'w');"
        f"opened = open({str(file)!r}, 'w'); sys.exit(opened.fileno())"
    )
    line = f"""'{sys.executable}' -c "{code}" <&- 2>&-"""
    assert subprocess.run(["bash", "-c", line]).returncode > 2


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with command_line.process("v4jax-train"):
        warnings.simplefilter("default")
        warnings.warn("small", stacklevel=1)
    assert capsys.readouterr().err == "v4jax-train: warning: small\n"


def platforms(monkeypatch: pytest.MonkeyPatch, devices: list[str], **environment: str) -> Any:
    """What JAX_PLATFORMS is after the choice, on a machine with these files in /dev."""
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    matching = lambda _, pattern: (d for d in map(Path, devices) if d.match(pattern))
    monkeypatch.setattr(Path, "glob", matching)
    command_line.choose_platform()
    return os.environ.get("JAX_PLATFORMS")


@pytest.mark.skipif(sys.platform != "linux", reason="device files are Linux's")
def test_jax_keeps_to_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platforms(monkeypatch, ["/dev/null", "/dev/vfio/vfio"]) == "cpu"
    for device in ("nvidia0", "nvidiactl", "dxg", "accel0", "vfio/0", "kfd"):
        assert platforms(monkeypatch, [f"/dev/{device}"]) is None
    assert platforms(monkeypatch, [], JAX_PLATFORMS="tpu") == "tpu"
    assert platforms(monkeypatch, [], JAX_PLATFORM_NAME="gpu") is None
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda **_: type("Points", (), {"names": {"xla_cuda13", "elsewhere"}}),
    )
    assert platforms(monkeypatch, []) is None


@pytest.mark.skipif(
    any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia*", "accel*")),
    reason="there are devices, of which plugins may speak",
)
def test_plugins_without_devices_say_nothing() -> None:
    """The compilers that tests need are plugins, and look for their devices when JAX starts."""
    code = (
        "from v4jax.commands import command_line\nwith command_line.process('x'):"
        "\n import jax; print([d.platform for d in jax.devices()])"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "XLA_"))
    }
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['cpu']\n", "")
