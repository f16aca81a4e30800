"""What a run does besides its steps: evaluation, early ends, bad steps, curves, previews."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from v4jax import presets
from v4jax.checkpoints import random_release
from v4jax_train import display, journal, loop, plot, preparation, preview, recipe, runs
from v4jax_train.__main__ import LARGE_PAGES, main
from v4jax_train.trainable import Full

TINY = presets.get("tiny")
SMALL = dataclasses.replace(TINY, layers=TINY.layers[:1], num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "small"
    random_release.make_checkpoint(directory, SMALL, 0)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen texts of one letter, and one of random bytes."""
    texts = [letter * 100 for letter in "abcdefghijklmno"]
    texts.append(np.random.default_rng(0).bytes(400).decode("latin1"))
    return write(tmp_path_factory.mktemp("data") / "texts.jsonl", texts)


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def make(model: Path, data: Path, tmp_path: Path) -> Any:
    """A recipe with some of its tables changed."""

    def build(**tables: dict[str, Any]) -> recipe.Recipe:
        base: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"files": [str(data)], "seq_len": 128, "too_long": "truncate"},
            "adapter": {"rank": 2},
            "optimizer": {"rate": 1e-2},
            "steps": {"steps": 4},
        }
        for name, table in tables.items():
            base[name] = base.get(name, {}) | table
        return recipe.from_table(base)

    return build


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def silent(_: dict[str, Any]) -> None:
    """Show nothing."""


def test_evaluations_are_recorded_and_the_best_state_is_kept(make: Any, data: Path) -> None:
    evaluation = {"files": [str(data)], "every": 2, "prompts": ["aaa"], "tokens": 3}
    settings = make(evaluation=evaluation)
    assert loop.begin(settings, show=silent).why == "finished"
    directory = Path(settings.out)
    lines = journal.read(directory, "evaluation")
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
        (sample,) = line["samples"]
        assert sample["prompt"] == "aaa"
        assert sample["text"]
    newest, best = runs.evaluate(directory), runs.evaluate(directory, best=True)
    assert newest["step"] == best["step"] == 4
    assert newest["loss"] == pytest.approx(lines[1]["loss"], rel=1e-6)
    assert newest["samples"] == lines[1]["samples"]


def test_samples_without_files_are_recorded_and_no_state_is_best(make: Any) -> None:
    evaluation = {"every": 1, "prompts": ["aaa", "b"], "tokens": 3}
    settings = make(evaluation=evaluation, steps={"steps": 2})
    assert loop.begin(settings, show=silent).why == "finished"
    directory = Path(settings.out)
    lines = journal.read(directory, "evaluation")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert [sample["prompt"] for sample in line["samples"]] == ["aaa", "b"]
        assert "loss" not in line
    assert not (directory / "best").exists()


def test_a_run_whose_evaluations_do_not_improve_ends_early(make: Any, data: Path) -> None:
    settings = make(
        optimizer={"rate": 1e-30, "weight_decay": 0.0},
        evaluation={"files": [str(data)], "every": 1, "patience": 2},
        steps={"steps": 9},
    )
    outcome = loop.begin(settings, show=silent)
    assert (outcome.why, outcome.step) == ("early", 3)


def test_a_spike_is_not_applied_and_its_batch_is_saved(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_REMEMBERED", 2)
    settings = make(
        optimizer={"rate": 3e-2},
        steps={"steps": 12},
        guard={"spike": 1.05},
    )
    lines: list[dict[str, Any]] = []
    loop.begin(settings, show=lines.append)
    skipped = [line for line in lines if line["skipped"]]
    assert skipped
    assert len(skipped) < len(lines)
    first = skipped[0]
    # A step starts before the loss of the previous one is known.
    before = [line["loss"] for line in lines if line["step"] < first["step"] - 1]
    assert first["loss"] > 1.05 * np.median(before[-2:])
    saved = np.load(Path(settings.out) / loop.BAD / f"step{first['step']}.process0.npz")
    tokenizer = preparation.text_tokenizer(settings)
    expected = preparation.batches(
        settings, preparation.read_data(settings, tokenizer, settings.data.files)
    )[first["step"] - 1]
    np.testing.assert_array_equal(saved["tokens"], expected["tokens"])


def test_a_diverging_run_stops_with_its_last_good_state(make: Any) -> None:
    settings = make(optimizer={"rate": 1e30}, guard={"most": 2}, steps={"steps": 9})
    lines: list[dict[str, Any]] = []
    with pytest.raises(loop.Stopped, match="2 bad steps in a row"):
        loop.begin(settings, show=lines.append)
    assert [line["skipped"] for line in lines] == [0.0, 0.0, 1.0, 1.0]
    directory = Path(settings.out)
    # Two updates were finite and are kept: the first moves one factor, the second the other. Later
    # ones changed nothing.
    logged = journal.read(directory, "step")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert logged[2]["loss"] is None
    assert len(list((directory / loop.BAD).iterdir())) == 2


def test_a_recipe_that_stops_at_bad_steps_stops_at_the_first(make: Any) -> None:
    settings = make(optimizer={"rate": 1e30}, guard={"action": "stop"}, steps={"steps": 9})
    with pytest.raises(loop.Stopped, match="Step 3 had a loss of nan"):
        loop.begin(settings, show=silent)


def test_weights_in_bfloat16_are_trained(make: Any) -> None:
    """Their moments are float32 from the first step on, as the compiled step expects."""
    narrow = make(model={"dtype": "bfloat16", "master": "bfloat16"}, optimizer={"rule": "adamw"})
    settings = dataclasses.replace(narrow, adapter=None, full=Full())
    assert loop.begin(settings, show=silent).why == "finished"
    losses = [line["loss"] for line in journal.read(Path(settings.out), "step")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_a_directory_that_is_not_empty_is_rejected(make: Any) -> None:
    settings = make()
    directory = Path(settings.out)
    directory.mkdir()
    (directory / "letter.txt").write_text("Dear all")
    with pytest.raises(ValueError, match="is not empty"):
        loop.begin(settings, show=silent)
    assert [file.name for file in directory.iterdir()] == ["letter.txt"]


def write_journal(directory: Path, losses: list[float]) -> Path:
    """Write the journal of a made-up run."""
    directory.mkdir()
    metrics = journal.Journal(directory)
    for step, loss in enumerate(losses, 1):
        values = {"gradient_norm": 1.0, "rate": 1e-3, "tokens_per_second_per_device": 5.0}
        metrics.write("step", step, loss=loss, **values)
    metrics.write("evaluation", len(losses), loss=losses[-1])
    metrics.close()
    return directory


def test_curves_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_journal(tmp_path / "run", [3.0, float("nan"), 2.0])
    assert main(["plot", str(directory)]) == 0
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {directory / 'curves.png'}." in capsys.readouterr().out
    both = tmp_path / "both.png"
    plot.draw([directory, write_journal(tmp_path / "other", [4.0, 3.5])], both)
    assert both.stat().st_size > 10_000


def test_a_directory_without_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("plot", "eval", "resume"):
        assert main([command, str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path) in error
        assert "Traceback" not in error


def test_records_of_later_steps_of_a_killed_run_are_dropped(tmp_path: Path) -> None:
    directory = write_journal(tmp_path / "run", [3.0, 2.0, 1.0])
    with (directory / journal.FILE).open("a") as file:
        file.write('{"kind": "step", "st')
    journal.Journal(directory, after=2).close()
    assert [line["step"] for line in journal.read(directory, "step")] == [1, 2]


def test_numbers_go_to_tensorboard_on_request(tmp_path: Path) -> None:
    metrics = journal.Journal(tmp_path, tensorboard=True)
    metrics.write("step", 1, loss=2.5, note="text")
    metrics.close()
    (events,) = (tmp_path / journal.BOARD).iterdir()
    content = events.read_bytes()
    assert b"step/loss" in content
    assert np.float32(2.5).tobytes() in content
    assert b"note" not in content
    assert [line["loss"] for line in journal.read(tmp_path, "step")] == [2.5]


def test_a_preview_shows_rows_and_the_size_of_an_epoch(make: Any, data: Path) -> None:
    out = io.StringIO()
    preview.show(make(), Console(file=out, width=200), samples=1)
    output = out.getvalue()
    assert "a" * 100 in output
    assert "bbb" not in output
    assert f"{data}: an epoch is 2 steps of 8 packs." in output
    assert "16 x 128" in output
    # Fifteen texts of 100 letters with BOS and EOS, and one that is truncated to 128 tokens.
    assert f"{(15 * 102 + 128) / (16 * 128):.1%}" in output


def test_a_preview_colours_what_is_trained(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "asked", "completion": "answered"}) + "\n")
    settings = make(data={"files": [str(file)]})
    tokenizer = preparation.text_tokenizer(settings)
    (documents,) = preparation.read_data(settings, tokenizer, settings.data.files)
    text = preview.coloured(documents[0], tokenizer)
    style_of = {text.plain[span.start : span.end]: span.style for span in text.spans}
    trained = next(part for part in style_of if "answered" in part)
    assert "asked" not in trained
    assert style_of[trained] == "bold green"
    assert all(style == "dim" for part, style in style_of.items() if part != trained)


def test_a_curve_of_bars_follows_its_numbers() -> None:
    heights = lambda values: [ord(bar) - 0x2580 for bar in display.curve(values)]
    assert heights([4.0, 3.0, 2.0, 1.0]) == [8, 6, 3, 1]
    assert heights([1.0]) == [1]
    assert display.curve([]) == ""
    assert len(display.curve(np.linspace(9, 1, 500).tolist())) == 24


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's large pages")
@pytest.mark.parametrize("variables", [{}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_the_command_restarts_with_large_pages_unless_already_configured(
    variables: dict[str, str],
) -> None:
    code = (
        "import os, sys; from v4jax_train import __main__ as program;"
        "program.main = lambda: print(os.environ['GLIBC_TUNABLES'], sys.argv[1:]);"
        "program.command()"
    )
    clean = {name: value for name, value in os.environ.items() if name not in LARGE_PAGES}
    command = [sys.executable, "-c", code, "a b", "--c"]
    result = subprocess.run(
        command, env=clean | variables, capture_output=True, text=True, check=True
    )
    expected = (variables or LARGE_PAGES)["GLIBC_TUNABLES"]
    assert result.stdout == f"{expected} ['a b', '--c']\n"
