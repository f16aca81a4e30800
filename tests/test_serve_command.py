"""The `v4jax-serve` command: its options, its file of options, and its refusals."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from v4jax_serve import __main__ as command


def test_help_needs_no_model_and_no_jax() -> None:
    code = (
        "import sys; from v4jax_serve import __main__ as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: print('jax' in sys.modules, 'starlette' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")
    assert "--speculate mtp:N" in done.stdout


def test_options_of_a_file_come_before_those_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'path = "DIR"\nport = 9000\nmax_seqs = 4\ncache-ram = "2GiB"\nstrict-deepseek = true\n'
        'adapter = ["a=x", "b=y"]\nkeep-quantised = false\n'
    )
    args = command.read_arguments(["--config", str(file), "--port", "9001", "--adapter", "c=z"])
    assert (args.path, args.port, args.max_seqs, args.cache_ram) == ("DIR", 9001, 4, 2**31)
    assert (args.strict_deepseek, args.keep_quantised) == (True, False)
    assert args.adapter == [("a", "x"), ("b", "y"), ("c", "z")]
    assert command.read_arguments(["OTHER", "--config", str(file)]).path == "OTHER"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the checkpoint is missing; pass its path"),
        (["tiny", "--cache-ram", "4GB"], "'4GB' is not a size such as 512MiB or 4GiB"),
        (["tiny", "--adapter", "name"], "'name' is not NAME=PATH"),
        (["tiny", "--config", "missing.toml"], "missing.toml: "),
    ],
)
def test_misuse_is_explained(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_address_in_use_and_a_file_without_keys_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["missing", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    keys = tmp_path / "keys"
    keys.write_text("\n")
    assert command.main(["missing", "--port", "0", "--api-key-file", str(keys)]) == 1
    assert "has no API keys; write one per line" in capsys.readouterr().err
