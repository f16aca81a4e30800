"""Behaviour common to all commands: standard streams that are closed, full or broken pipes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from v4jax.commands import command_line

FULL = Path("/dev/full")
# Quick commands of both programs, which print or fail.
INSPECT = ("v4jax", "inspect", "tiny")
HELP = ("v4jax_train", "eval", "--help")
FAILS = ("v4jax_train", "plot", "nothing")


def shell(words: tuple[str, ...], redirections: str, **environment: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command with shell redirections."""
    line = f'"{sys.executable}" -m {" ".join(words)} {redirections}'
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | environment
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("words", [INSPECT, HELP, FAILS])
def test_a_closed_output_is_reported_before_any_work(words: tuple[str, ...]) -> None:
    program = words[0].replace("_", "-")
    message = f"{program}: standard output is closed, so nothing was done.\n"
    assert shell(words, ">&-") == (1, "", message)
    assert shell(words, ">&- 2>&-") == (1, "", "")


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full does not exist")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "message"),
    [(INSPECT, "v4jax inspect: standard output: No space left on device.\n"), (HELP, "")],
)
def test_a_full_output_fails(words: tuple[str, ...], message: str, unbuffered: str) -> None:
    assert shell(words, "> /dev/full", PYTHONUNBUFFERED=unbuffered) == (1, "", message)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [INSPECT, HELP])
def test_a_broken_pipe_fails_silently(words: tuple[str, ...], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as broken_pipe:
        result = subprocess.run(
            [sys.executable, "-m", *words],
            stdout=broken_pipe,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full", "2> >(true)"])
@pytest.mark.parametrize(("words", "status"), [(INSPECT, 0), (FAILS, 1)])
def test_an_unwritable_standard_error_changes_nothing(
    words: tuple[str, ...], status: int, where: str
) -> None:
    returned, out, _ = shell(words, where)
    assert returned == status
    assert ("DeepSeek-V4 tiny" in out) == (status == 0)


def test_a_closed_input_reads_as_empty(tmp_path: Path) -> None:
    status, out, err = shell(("v4jax", "generate", "tiny", "-p", "-"), "<&-")
    assert (status, out) == (1, "")
    assert err == "v4jax generate: the prompt is empty; pass some text.\n"


def test_files_do_not_reuse_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    """Or what libraries write to standard error would go into them."""
    file = tmp_path / "file"
    code = (
        "import os, sys; from v4jax.commands import command_line;"
        f"context = command_line.process('x'); context.__enter__(); open({str(file)!r}, 'w');"
        f"opened = open({str(file)!r}, 'w'); sys.exit(opened.fileno())"
    )
    line = f"""'{sys.executable}' -c "{code}" <&- 2>&-"""
    assert subprocess.run(["bash", "-c", line]).returncode > 2


def test_warnings_print_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with command_line.process("v4jax-train"):
        warnings.simplefilter("default")
        warnings.warn("small", stacklevel=1)
    assert capsys.readouterr().err == "v4jax-train: warning: small\n"


def platforms(monkeypatch: pytest.MonkeyPatch, devices: list[str], **environment: str) -> Any:
    """JAX_PLATFORMS after `choose_platform`, on a machine with these device files."""
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    matching = lambda _, pattern: (d for d in map(Path, devices) if d.match(pattern))
    monkeypatch.setattr(Path, "glob", matching)
    command_line.choose_platform()
    return os.environ.get("JAX_PLATFORMS")


@pytest.mark.skipif(sys.platform != "linux", reason="device files exist on Linux only")
def test_jax_uses_only_the_cpu_where_there_is_no_other_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    reason="plugins may report devices of this machine",
)
def test_plugins_without_devices_print_nothing() -> None:
    """The compilers used by tests are plugins, which look for their devices when JAX starts."""
    code = (
        "from v4jax.commands import command_line\nwith command_line.process('x'):"
        "\n import jax; print([d.platform for d in jax.devices()])"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "XLA_"))
    }
    result = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("['cpu']\n", "")
