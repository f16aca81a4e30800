"""`v4jax generate`: prompts, sampling options and JSON; and the revision of a Hub id."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import v4jax
from tests.checkpoints import tiny, tiny_dspark
from tests.test_cli import run
from v4jax.__main__ import main
from v4jax.checkpoints import random_release
from v4jax.checkpoints.open_checkpoint import OpenCheckpoint
from v4jax.generation import Timings
from v4jax.language_model import Generation
from v4jax.text.chat import encode_chat

Capsys = pytest.CaptureFixture[str]


class Model:
    """Stands in for a loaded model: records what it is asked, and answers with the length."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def generate(self, prompt: Any, **settings: Any) -> Any:
        if isinstance(prompt, list):
            return [self.generate(each, **settings) for each in prompt]
        self.asked.append((prompt, settings))
        return Generation(str(len(prompt)), [7], [-0.5], [()], "stop", Timings(1.0, 2.0, 3.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "checkpoint"
    random_release.make_checkpoint(directory, tiny(), 0)
    return directory


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: model)
    return model


def fails(capsys: Capsys, *args: Any) -> str:
    assert main([str(arg) for arg in args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_every_sampling_option_reaches_the_model(
    model: Model, checkpoint: Path, capsys: Capsys
) -> None:
    options = (
        "--max-tokens 5 --stop a --stop b --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1"
        " --seed 2 --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 2"
        " --speculate mtp:2"
    )
    assert main(["generate", str(checkpoint), "-p", "x", *options.split()]) == 0
    assert capsys.readouterr().out == "1\n"
    expected = {
        **{"max_tokens": 5, "stop": ["a", "b"], "temperature": 0.5, "top_p": 0.9, "top_k": 3},
        **{"min_p": 0.1, "seed": 2, "repetition_penalty": 1.5, "presence_penalty": -1.0},
        **{"frequency_penalty": 2.0, "speculate": "mtp:2"},
    }
    assert model.asked == [("x", expected)]


def test_json_holds_the_answer_and_what_is_known_of_it(
    model: Model, checkpoint: Path, capsys: Capsys
) -> None:
    assert main(["generate", str(checkpoint), "-p", "caf\u00e9", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        **{"prompt": "caf\u00e9", "text": "4", "tokens": [7], "logprobs": [-0.5]},
        "finish_reason": "stop",
        "timings": {"prefill_seconds": 1.0, "decode_seconds": 2.0, "tokens_per_second": 3.0},
    }


def test_each_line_of_a_text_file_is_a_prompt(
    model: Model, checkpoint: Path, tmp_path: Path, capsys: Capsys
) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"one\r\ntwo words\n")
    assert main(["generate", str(checkpoint), "--prompts", str(tmp_path / "prompts.txt")]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two words"]
    assert [answer["text"] for answer in answers] == ["3", "9"]


def test_each_line_of_a_jsonl_file_is_a_prompt_or_a_conversation(
    model: Model, checkpoint: Path, tmp_path: Path, capsys: Capsys
) -> None:
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "How?"},
    ]
    rows = [{"prompt": "two\nlines"}, {"messages": messages}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["generate", str(checkpoint), "--prompts", str(file), "--max-tokens", "3"]) == 0
    answers = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert answers == ["two\nlines", messages]
    assert [prompt for prompt, _ in model.asked] == ["two\nlines", encode_chat(messages)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no prompts; write one per line."),
        ("a.txt", "one\n\ntwo", "line 2: the prompt is empty; pass some text."),
        ("a.jsonl", '{"prompt": "a"}\n[1]', "line 2: not a JSON object"),
        (
            "a.jsonl",
            '{"prompt": 1}',
            "line 1: must have 'prompt', a string, or 'messages', a list.",
        ),
        ("a.jsonl", '{"prompt": "a", "messages": []}', "line 1: must have 'prompt'"),
        ("a.jsonl", '{"prompt": "a", "stop": "b"}', "line 1: must have 'prompt'"),
        ("a.jsonl", '{"messages": "a"}', "line 1: must have 'prompt'"),
        ("a.jsonl", '{"prompt": ""}', "line 1: the prompt is empty"),
        ("a.jsonl", '{"messages": []}', "line 1: the prompt is empty"),
        ("a.jsonl", '{"messages": [{"role": "usr", "content": "a"}]}', "usr"),
    ],
)
def test_a_wrong_line_is_named_before_loading(
    name: str,
    content: str,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / name).write_text(content)
    assert message in fails(capsys, "generate", checkpoint, "--prompts", tmp_path / name)


@pytest.mark.parametrize("flags", [["--json", "--stream"], ["--prompts", "a.txt"]])
def test_options_that_exclude_each_other_are_misuse(flags: list[str], capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "tiny", "-p", "x", *flags])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_no_cache_keeps_no_program(
    model: Model, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V4JAX_CACHE", "somewhere")
    assert main(["generate", str(checkpoint), "-p", "x", "--no-cache"]) == 0
    assert os.environ["V4JAX_CACHE"] == "off"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "org/name", "-p", "x"],
        ["inspect", "org/name"],
        ["convert", "org/name", "{new}"],
        ["export", "org/name", "{new}"],
        ["merge", "org/name", "{run}", "{new}", "--weights", "keep"],
    ],
)
def test_a_revision_reaches_the_hub(
    command: list[str], tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, revision: str | None, **__: Any) -> str:
        raise ConnectionError(f"asked for {revision}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "run").mkdir()
    args = [arg.format(new=tmp_path / "new", run=tmp_path / "run") for arg in command]
    assert "asked for v1" in fails(capsys, *args, "--revision", "v1")


def test_a_directory_has_no_revision(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="is on this machine and has no revisions"):
        v4jax.load(checkpoint, revision="main")


def test_a_preset_has_no_revision(capsys: Capsys) -> None:
    error = fails(capsys, "inspect", "tiny", "--revision", "v1")
    assert "tiny: is a preset and has no revisions; leave revision 'v1' out." in error


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
