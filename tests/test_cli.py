"""The command line: output, exit status and error messages."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import v4jax
from tests.checkpoints import tiny, tiny_dspark
from v4jax.__main__ import main
from v4jax.checkpoints import native, random_release
from v4jax.checkpoints.open_checkpoint import OpenCheckpoint
from v4jax.text.chat import encode_chat

COMMANDS = ("demo", "inspect", "convert", "export", "export-adapter", "merge", "generate")
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


def generated(capsys: Capsys, checkpoint: Path, *args: str) -> str:
    assert main(["generate", str(checkpoint), "--seed", "0", "--max-tokens", "16", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_generated_text_equals_the_librarys(checkpoint: Path, capsys: Capsys) -> None:
    expected = v4jax.load(checkpoint).generate("Once upon a time", max_tokens=16, seed=0).text
    assert generated(capsys, checkpoint, "-p", "Once upon a time") == expected + "\n"
    assert generated(capsys, checkpoint, "-p", "Once upon a time", "--stream") == expected + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n"))
    piped = generated(capsys, checkpoint, "-p", "-")
    assert piped == generated(capsys, checkpoint, "-p", "Once upon a time")


def test_standard_input_that_is_not_text_is_rejected(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert "not text in utf-8" in fails(capsys, "generate", str(checkpoint), "-p", "-")


class _Recorder:
    """Stands in for a loaded model and records its prompt."""

    def __init__(self, cfg: Any) -> None:
        self.config = cfg
        self.prompt = ""

    def generate(self, prompt: str, **_: Any) -> Any:
        self.prompt = prompt
        return type("Generation", (), {"text": "an answer"})


@pytest.mark.parametrize(
    ("cfg", "args", "encoding"),
    [
        (tiny(), ["--chat"], {"revision": "april"}),
        (tiny(), ["--thinking", "high"], {"thinking_mode": "thinking", "revision": "april"}),
        (
            tiny(),
            ["--thinking", "max"],
            {"thinking_mode": "thinking", "reasoning_effort": "max", "revision": "april"},
        ),
        (
            tiny_dspark(),
            ["--thinking", "low"],
            {"thinking_mode": "thinking", "reasoning_effort": "low", "revision": "0731"},
        ),
    ],
)
def test_chat_options_choose_the_encoding(
    cfg: Any,
    args: list[str],
    encoding: dict[str, Any],
    checkpoint: Path,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _Recorder(cfg)
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: model)
    function = "v4jax.checkpoints.open_checkpoint.open_checkpoint"
    monkeypatch.setattr(function, lambda directory: OpenCheckpoint(directory, cfg))
    assert generated(capsys, checkpoint, "-p", "Why?", *args) == "an answer\n"
    assert model.prompt == encode_chat([{"role": "user", "content": "Why?"}], **encoding)


def test_an_unsupported_effort_is_reported_before_loading(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: pytest.fail("it was loaded"))
    error = fails(capsys, "generate", str(checkpoint), "-p", "x", "--thinking", "low")
    assert "--thinking low: not supported by this checkpoint (revision april)" in error
    assert "use one of high, max." in error


def test_an_adapter_is_passed_to_the_loader(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(
        v4jax, "load", lambda *_, **options: passed.update(options) or _Recorder(tiny())
    )
    generated(capsys, checkpoint, "-p", "Why?", "--adapter", "runs/a")
    assert passed["adapter"] == "runs/a"


def test_a_path_without_an_adapter_is_reported_before_loading(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "v4jax.checkpoints.release_weights.load", lambda *_, **__: pytest.fail("loaded")
    )
    error = fails(capsys, "generate", str(checkpoint), "-p", "Why?", "--adapter", str(checkpoint))
    assert "is neither an adapter (adapter_config.json) nor the directory of a run" in error


def test_a_system_message_precedes_the_prompt(
    checkpoint: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _Recorder(tiny())
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: model)
    generated(capsys, checkpoint, "-p", "Why?", "--system", "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert model.prompt == encode_chat(messages)


def test_output_to_a_pipe_is_plain_text() -> None:
    result = run("inspect", "flash")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "159,609,485,896" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_broken_pipe_prints_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "v4jax", "inspect", "flash"]
    with os.fdopen(write) as broken_pipe:
        result = subprocess.run(
            command, stdout=broken_pipe, stderr=subprocess.PIPE, timeout=120, check=False
        )
    assert result.returncode == 1
    assert result.stderr == b""


def test_control_c_ends_the_process_with_one_line(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "v4jax", "generate", str(checkpoint), "-p", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        # More than a pipe buffers: this returns once the command is reading its prompt.
        process.stdin.write("word " * 100_000)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "v4jax generate: interrupted.\n"
