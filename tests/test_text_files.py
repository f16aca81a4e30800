"""Text files with byte order marks or in other encodings; control characters are escaped."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from v4jax.__main__ import main
from v4jax.checkpoints import disk, hub, safetensors_directory
from v4jax.checkpoints.disk import CheckpointError
from v4jax.commands import inspect
from v4jax.text import files
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer
from v4jax_train import journal, recipe, runs

MARK = b"\xef\xbb\xbf"


def marked(file: Path, text: str) -> Path:
    file.write_bytes(MARK + text.encode())
    return file


def config(directory: Path) -> object:
    file = marked(directory / "config.json", (hub.TINY / "config.json").read_text())
    return inspect.config_of(str(file)).vocab_size


def weight_map(directory: Path) -> object:
    file = marked(directory / "index.json", '{"weight_map": {"a": "b"}}')
    return safetensors_directory.read_index(file)


def tokenizer(directory: Path) -> object:
    file = marked(directory / "tokenizer.json", build_demo_tokenizer(300).to_str())
    return Tokenizer.load(file).encode("the") == Tokenizer(build_demo_tokenizer(300)).encode("the")


def toml(directory: Path) -> object:
    file = marked(directory / "recipe.toml", "[adapter]\nrank = 3\n[steps]\nsteps = 1\n")
    settings = recipe.read(file)
    return settings.adapter and settings.adapter.rank


def record(directory: Path) -> object:
    marked(directory / "recipe.json", '{"adapter": {}, "steps": {"steps": 7}}')
    return runs.read_recipe(directory).steps.steps


def metrics(directory: Path) -> object:
    marked(directory / journal.FILE, '{"kind": "step", "step": 1}\n')
    return [line["step"] for line in journal.read(directory, "step")]


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (config, 1024),
        (weight_map, {"a": "b"}),
        (tokenizer, True),
        (toml, 3),
        (record, 7),
        (metrics, [1]),
    ],
)
def test_a_byte_order_mark_is_ignored(
    read: Callable[[Path], object], expected: object, tmp_path: Path
) -> None:
    assert read(tmp_path) == expected


def test_a_checkpoint_with_byte_order_marks_is_opened(tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(hub.TINY, directory)
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        if (directory / name).is_file():
            marked(directory / name, (directory / name).read_text())
    with safetensors_directory.Checkpoint.open(directory) as opened:
        assert opened.config == json.loads((hub.TINY / "config.json").read_text())
    assert Tokenizer.load(directory).bos_id == 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    mark = "\ufeff" if encoding.endswith("be") else ""
    file.write_bytes(f"{mark}{{}}".encode(encoding))
    message = f"it is in {encoding[:6].upper()}; save it in UTF-8"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        disk.read_json(file)
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe.read(file)


def test_a_prompt_on_standard_input_may_start_with_a_byte_order_mark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff\n"))
    assert main(["generate", "tiny", "-p", "-"]) == 1
    assert "the prompt is empty" in capsys.readouterr().err


def test_terminal_control_characters_are_escaped() -> None:
    text = "a\x1b[2J\x07b\r\x7f\x9b31m\x00\u202e\ud800"
    assert files.visible(text) == r"a\x1b[2J\x07b\r\x7f\x9b31m\x00\u202e\ud800"
    plain = "lines\n\tand \u4f60\u597d, \u00e9, \U0001f468\u200d\U0001f469"
    assert files.visible(plain) == plain
