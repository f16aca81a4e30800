"""`v4jax generate`: prompts, sampling options and JSON; and the revision of a Hub id."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import v4jax
from tests.checkpoints import tiny
from v4jax.__main__ import main
from v4jax.checkpoints import random_release
from v4jax.decoding.loop import Timings
from v4jax.language_model import Generation
from v4jax.text.chat import encode_chat

Capsys = pytest.CaptureFixture[str]


class Model:
    """Stands in for a loaded model: records what it is asked, and answers with the length."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def generate(self, prompt: str, **settings: Any) -> Generation:
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
    )
    assert main(["generate", str(checkpoint), "-p", "x", *options.split()]) == 0
    assert capsys.readouterr().out == "1\n"
    expected = {
        **{"max_tokens": 5, "stop": ["a", "b"], "temperature": 0.5, "top_p": 0.9, "top_k": 3},
        **{"min_p": 0.1, "seed": 2, "repetition_penalty": 1.5, "presence_penalty": -1.0},
        "frequency_penalty": 2.0,
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
