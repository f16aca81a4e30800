"""The command line: output, exit status and error messages."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import v4jax
from tests.checkpoints import tiny
from v4jax.__main__ import main
from v4jax.checkpoints import native, random_release

COMMANDS = (
    *("demo", "inspect", "convert", "export", "export-adapter", "merge", "generate", "chat"),
    "launch",
)
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    random_release.make_checkpoint(directory, tiny(), 0)
    return directory


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def run(*args: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    command = [sys.executable, "-m", "v4jax", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


def fails(capsys: Capsys, *args: str) -> str:
    """The single line that a command which fails with status 1 writes to standard error."""
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"v4jax {args[0]}: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Errno" not in err
    return err


def misused(capsys: Capsys, *args: str) -> str:
    """Standard error of a misused command, which exits with status 2."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(
    "code",
    [
        "import v4jax",
        "from v4jax.__main__ import main; main(['--help'])",
        "from v4jax.__main__ import main; main(['generate', '--help'])",
    ],
)
def test_instant_commands_import_nothing_slow(code: str) -> None:
    check = "import sys, atexit; atexit.register(lambda: print('\\nimported', *sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", f"{check}; {code}"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.rpartition("imported")[2].split())
    assert "v4jax" in imported
    assert not {"jax", "flax", "orbax", "ml_dtypes", "tokenizers", "huggingface_hub"} & imported


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str, capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"  v4jax {command}" in out.split("example")[-1]


def test_help_names_every_command_and_the_exit_statuses(capsys: Capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "0 done, 1 failed, 2 misuse" in out
    for command in COMMANDS:
        assert f"v4jax {command}" in out


def test_version_is_printed(capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"v4jax {v4jax.__version__}\n"
    assert v4jax.__version__.startswith("0.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "COMMAND"),
        (("run",), "invalid choice"),
        (("inspect",), "path"),
        (("inspect", "flash", "--verbose"), "--verbose"),
        (("convert", "a", "b", "--weights", "int8"), "int8"),
        (("generate", "a"), "--prompt"),
        (("generate", "a", "-p", "b", "--max", "3"), "--max"),
        (
            ("generate", "a", "-p", "b", "--max-tokens", "0"),
            "'0' is not an integer of 1 or more",
        ),
        (("generate", "a", "-p", "b", "--max-tokens", "many"), "'many' is not an integer"),
        (
            ("generate", "a", "-p", "b", "--temperature", "nan"),
            "'nan' is not a number of 0 or more",
        ),
        (("generate", "a", "-p", "b", "--temperature=-1"), "'-1' is not a number of 0 or more"),
        (("generate", "a", "-p", "b", "--top-p", "0"), "'0' is not a number above 0 and at most 1"),
        (("generate", "a", "-p", "b", "--top-p", "x"), "'x' is not a number above 0 and at most 1"),
        (("generate", "a", "-p", "b", "--top-k", "1.5"), "'1.5' is not an integer"),
        (("generate", "a", "-p", "b", "--seed", "-1"), "'-1' is not an integer"),
        (("generate", "a", "-p", "b", "--thinking", "hard"), "hard"),
    ],
)
def test_misuse_is_explained(args: tuple[str, ...], message: str, capsys: Capsys) -> None:
    assert message in misused(capsys, *args)


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "{}"),
        ("convert", "{}", "{}-out"),
        ("export", "{}", "{}-out"),
        ("generate", "{}", "-p", "x"),
    ],
)
def test_a_wrong_path_is_named(args: tuple[str, ...], tmp_path: Path, capsys: Capsys) -> None:
    missing = str(tmp_path / "nothing")
    assert missing in fails(capsys, *(arg.format(missing) for arg in args))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "{}"),
        ("convert", "{}", "{}-out"),
        ("export", "{}", "{}-out"),
        ("generate", "{}", "-p", "x"),
    ],
)
def test_a_directory_without_a_checkpoint_is_rejected(
    args: tuple[str, ...], tmp_path: Path, capsys: Capsys
) -> None:
    directory = tmp_path / "letters"
    directory.mkdir()
    error = fails(capsys, *(arg.format(directory) for arg in args))
    assert f"{directory}: is not a" in error
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize(
    "args", [("inspect", "{}"), ("convert", "{}", "{}-out"), ("generate", "{}", "-p", "x")]
)
def test_a_truncated_file_is_named(args: tuple[str, ...], copy: Path, capsys: Capsys) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert str(shard) in fails(capsys, *(arg.format(copy) for arg in args))
    assert not Path(f"{copy}-out").exists()


def test_a_broken_configuration_is_named(copy: Path, capsys: Capsys) -> None:
    (copy / "config.json").write_text('{"model_type": ')
    assert f"{copy / 'config.json'}: line 1" in fails(capsys, "inspect", str(copy))


def test_a_missing_tokenizer_is_reported_before_loading(
    copy: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "tokenizer.json").unlink()
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert "has no tokenizer.json" in fails(capsys, "generate", str(copy), "-p", "x")


def test_an_empty_prompt_is_rejected(checkpoint: Path, capsys: Capsys) -> None:
    assert "the prompt is empty" in fails(capsys, "generate", str(checkpoint), "-p", "")


@pytest.mark.parametrize("command", ["convert", "demo"])
def test_an_output_that_cannot_be_created_is_named(
    command: str, checkpoint: Path, tmp_path: Path, capsys: Capsys
) -> None:
    (tmp_path / "file").write_text("in the way")
    target = str(tmp_path / "file" / "output")
    args = (
        ("demo", "--directory", target)
        if command == "demo"
        else ("convert", str(checkpoint), target)
    )
    assert str(tmp_path / "file") in fails(capsys, *args)


def test_an_existing_output_is_left_alone(checkpoint: Path, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "letter").write_text("Dear all")
    assert "exists" in fails(capsys, "convert", str(checkpoint), str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["letter"]


def test_an_unknown_name_prints_one_line(capsys: Capsys) -> None:
    assert "Did you mean 'flash'?" in fails(capsys, "inspect", "flahs")


def test_an_interruption_prints_one_line(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(v4jax, "load", interrupted)
    assert "interrupted" in fails(capsys, "generate", str(checkpoint), "-p", "x")


def test_out_of_memory_prints_one_line(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(v4jax, "load", out_of_memory)
    assert "out of memory" in fails(capsys, "generate", str(checkpoint), "-p", "x")


def test_an_internal_error_keeps_its_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("internal")

    monkeypatch.setattr(v4jax, "load", broken)
    with pytest.raises(RuntimeError, match="internal"):
        main(["generate", str(checkpoint), "-p", "x"])


def test_convert_and_export_round_trip(checkpoint: Path, tmp_path: Path, capsys: Capsys) -> None:
    to, back = tmp_path / "native", tmp_path / "hf"
    assert main(["convert", str(checkpoint), str(to)]) == 0
    assert main(["export", str(to), str(back)]) == 0
    assert capsys.readouterr() == (f"Wrote {to}.\nWrote {back}.\n", "")
    assert native.is_native(to)
    for file in checkpoint.glob("*.safetensors"):
        assert (back / file.name).read_bytes() == file.read_bytes()
