"""`v4jax chat`: answers, commands, and the keys of a terminal."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import v4jax
from tests import quick, serving
from tests.checkpoints import tiny
from v4jax.__main__ import main
from v4jax.text.chat import encode_chat

Capsys = pytest.CaptureFixture[str]


class Engine(serving.ScriptedEngine):
    """Stands in for the engine; `settings` are those it was created with."""

    settings = types.SimpleNamespace()

    def __call__(self, _: Any, **settings: Any) -> Any:
        self.settings = types.SimpleNamespace(**settings)
        return contextlib.nullcontext(self)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine(lambda _: "")
    model = types.SimpleNamespace(config=tiny(), tokenizer=serving.tokenizer())
    monkeypatch.setattr("v4jax.engine.engine.Engine", engine)
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: model)
    return engine


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> Callable[..., tuple[str, str]]:
    """Runs the command on lines of input; returns its output and what it says beside it."""

    def run(lines: str, *args: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main(["chat", "tiny", *args]) == 0
        out, err = capsys.readouterr()
        return out, err

    return run


def test_each_turn_has_the_turns_before_it(engine: Engine, chat: Any, tmp_path: Path) -> None:
    engine.script = lambda prompt: f"{prompt.count('?')} so far."
    file = tmp_path / "messages.json"
    lines = f"Why?\n\nHow?\n/save {file}\n/reset\n /etc?\n/exit\nNot read?"
    out, err = chat(lines, "--system", "Be brief.", "--temperature", "0", "--max-tokens", "50")
    assert out == "1 so far.\n2 so far.\n1 so far.\n"
    assert err.count("cache hit: 0 of ") == 3
    messages = json.loads(file.read_text())
    assert [m["content"] for m in messages] == [
        *("Be brief.", "Why?", "1 so far.", "How?", "2 so far."),
    ]
    assert serving.tokenizer().decode(engine.requests[1].tokens) == encode_chat(messages[:-1])
    assert {r.max_tokens for r in engine.requests} == {50}
    assert {r.sampling.temperature for r in engine.requests} == {0.0}
    assert serving.tokenizer().decode(engine.requests[2].tokens).count("?") == 1


def test_thinking_is_apart_from_the_answer_and_not_repeated(engine: Engine, chat: Any) -> None:
    engine.script = lambda _: "First.</think>Then, caf\u00e9.\n<b>"
    out, err = chat("Why?\nHow?\n", "--thinking", "high")
    assert out == "First.\n\nThen, caf\u00e9.\n<b>\n" * 2
    assert "\x1b" not in out + err
    prompt = serving.tokenizer().decode(engine.requests[1].tokens)
    assert "Then, caf\u00e9.\n<b>" in prompt
    assert "First." not in prompt


def test_a_stop_string_ends_the_answer(engine: Engine, chat: Any) -> None:
    engine.script, engine.delay = (lambda _: "One. Two. " + "Three. " * 500), 0.005
    out, err = chat("Why?\n", "--stop", "wo.")
    assert out == "One. T\n"
    assert "stopped" not in err
    assert engine.finished == ["stop"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "/nothing: is not a command; /help lists them."),
        ("/save", "/save: is not a command"),
        ("/save missing/file", "missing/file: No such file or directory."),
        ("word " * 200, "The conversation fills the context of 128 tokens; /reset it."),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    line: str, message: str, engine: Engine, chat: Any
) -> None:
    engine.script = lambda _: "Yes."
    out, err = chat(f"{line}\nWhy?\n/help\n", "--context", "128")
    assert message in err
    assert out.startswith("Yes.\n/reset ")


def test_an_engine_that_fails_ends_the_command(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    engine.fault = "error"
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    assert main(["chat", "tiny"]) == 1
    assert capsys.readouterr().err.startswith("v4jax chat: the logits of the model are not finite")


def test_an_unsupported_effort_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert main(["chat", "tiny", "--thinking", "low"]) == 1
    assert "--thinking low: not supported by this checkpoint" in capsys.readouterr().err


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self._end, terminal = pty.openpty()
        command = [sys.executable, "-m", "v4jax", *args]
        environment = os.environ | quick.ENVIRONMENT | {"TERM": "xterm", "NO_COLOR": ""}
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
        )
        os.close(terminal)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_until(self, text: str) -> str:
        """What is shown up to a text, within three minutes."""
        shown, end = "", time.monotonic() + 180
        while text not in shown:
            assert select.select([self._end], [], [], max(0.0, end - time.monotonic()))[0], shown
            shown += os.read(self._end, 4096).decode(errors="replace")
        return shown

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_prompt(self) -> None:
        """Interrupt until there is a new prompt: Python misses a signal right before it waits."""
        while not select.select([self._end], [], [], 2)[0]:
            self.interrupt()
        self.read_until("> ")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    # A penalty that rewards repetition: no answer ends by itself.
    options = ("--thinking", "high", "--frequency-penalty", "-2", "--context", "1024")
    terminal = Terminal("chat", "tiny", *options, "--max-tokens", "600")
    yield terminal
    terminal.close()


@pytest.mark.slow
def test_a_conversation_on_a_terminal(terminal: Terminal) -> None:
    terminal.read_until("> ")
    for cached in (0, 128):
        terminal.type("word " * 100 + "\n")
        terminal.read_until("\x1b[2m")
        terminal.interrupt()
        shown = terminal.read_until("> ")
        assert f"cache hit: {cached} of " in shown
        assert "stopped]" in shown
        terminal.interrupt_prompt()
        terminal.type("/reset\n")
        terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
