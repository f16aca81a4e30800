"""A preview refuses what training refuses, and shows rows that a terminal can bear; a run's record
is read the same from any folder.
"""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from v4jax.checkpoints import hub
from v4jax_train import preparation, preview, recipe, runs
from v4jax_train.__main__ import main
from v4jax_train.data import documents

TEXT = "word " * 150


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has a recipe, a file to train on and one to measure on, and is the current."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        '[model]\npath = "tiny"\n[data]\nfiles = ["rows.jsonl"]\nseq_len = 128\n'
        'too_long = "split"\n[adapter]\n[steps]\nsteps = 1\n'
    )
    for name in ("rows", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": TEXT}))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--data", "rows.jsonl:-2"], "files has rows.jsonl:-2; a weight is a number above 0."),
        (["--data", "rows.jsonl:nan"], "files has rows.jsonl:nan; a weight"),
        (["--data", "rows.jsonl:0"], "files has rows.jsonl:0; a weight"),
        (["--data", ":-2"], "files has :-2; a weight"),
        (["--evaluation.files", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--evaluation.files", "other.jsonl:2"], "files of an evaluation have no weights"),
        (["--samples", "-1"], "samples is -1; it is at least 0."),
        (["--adapter.alpha", "nan"], "adapter.alpha is nan; it is a finite number."),
        (["--adapter.alpha", "0.0"], "alpha is 0.0; it is a finite number other than 0."),
        (["--guard.spike", "inf"], "guard.spike is inf; it is a finite number."),
        (["--optimizer.rate", "nan"], "optimizer.rate is nan"),
        (["--optimizer.rule", "muon"], "Muon trains weights in full; for an adapter"),
        (["--data.format", "csv"], "data: format is 'csv'; it is one of auto, messages"),
        (["--data.untrained", "keep"], "data: untrained is 'keep'; use drop or error."),
        (["--data", "rows.jsonl", "--data", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--data.too_long", "error"], "rows.jsonl:1 has"),
    ],
)
def test_a_preview_refuses_what_training_refuses(
    words: list[str], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", "recipe.toml", *words]) == 1
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    if "--samples" not in words:
        assert main(["recipe.toml", *words, "--out", "run"]) == 1
        assert problem in capsys.readouterr().err
        assert not (folder / "run").exists()


def test_a_preview_tells_of_the_model_what_loading_would(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes((hub.TINY / "tokenizer.json").read_bytes())
    chosen = recipe.read("recipe.toml", {"model.path": str(model)})
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        preview.show(chosen, Console(file=io.StringIO()))
    cfg = json.loads((hub.TINY / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(cfg | {"vocab_size": 512}))
    with pytest.raises(ValueError, match="tokens, but the model's vocabulary has 512"):
        preview.show(chosen, Console(file=io.StringIO()))


def test_a_preview_says_what_files_are_and_shows_both_kinds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", "recipe.toml", "--evaluation.files", "other.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "rows.jsonl: JSON lines, 1 of text." in said
    assert "other.jsonl: JSON lines, 1 of text." in said
    assert "(1 of 3)" in said


@pytest.mark.parametrize(
    "text", ["\x1b[2Jgone", "bell\x07", "back\x08\x08", "c1 \x9b31m", "\x7f\r"]
)
def test_rows_cannot_speak_to_the_terminal(text: str, folder: Path) -> None:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"text": f"{text}\n\tmore"}))
    out = io.StringIO()
    wide = Console(file=out, width=200, force_terminal=True, color_system=None)
    preview.show(recipe.read("recipe.toml"), wide)
    shown = out.getvalue()
    assert not any((ord(c) < 32 and c not in "\n\x1b") or 126 < ord(c) < 160 for c in shown)
    assert text not in shown
    for char in set(text) & {*map(chr, range(32)), *map(chr, range(127, 160))}:
        assert repr(char)[1:-1] in shown


def test_a_runs_record_has_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model").symlink_to(hub.TINY)
    words = {"model.path": "model", "out": "run", "data.files": '["rows.jsonl:2", "other.jsonl"]'}
    chosen = recipe.read("recipe.toml", words | {"evaluation.files": '["other.jsonl"]'})
    runs.write_recipe(Path("run"), chosen)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text(json.dumps({"text": "not the same"}))
    monkeypatch.chdir(elsewhere)
    kept = runs.read_recipe(folder / "run")
    assert kept.data.files == (f"{folder / 'rows.jsonl'}:2", str(folder / "other.jsonl"))
    assert kept.evaluation.files == (str(folder / "other.jsonl"),)
    assert (kept.out, kept.model.path) == (str(folder / "run"), str(folder / "model"))
    tokenizer = preparation.text_tokenizer(kept)
    read: list[documents.Documents] = preparation.read_data(kept, tokenizer, kept.data.files)
    assert tokenizer.decode(read[0].ids_S.tolist()).count("word") == 150


@pytest.mark.parametrize("name", ["tiny", "deepseek-ai/DeepSeek-V4-Flash"])
def test_names_that_are_no_paths_stay(name: str, folder: Path) -> None:
    runs.write_recipe(Path("run"), recipe.read("recipe.toml", {"model.path": name}))
    kept = runs.read_recipe(Path("run"))
    assert kept.model.path == name
    assert kept.out == ""
