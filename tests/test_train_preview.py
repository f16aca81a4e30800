"""A preview rejects what training rejects and shows rows safely on a terminal; a run's record reads
the same from any directory.
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
    """The current directory, with a recipe, a training file and an evaluation file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        '[model]\npath = "tiny"\n[data]\nfiles = ["rows.jsonl"]\nseq_len = 128\n'
        'too_long = "split"\n[adapter]\n[steps]\nsteps = 1\n'
    )
    for name in ("rows", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": TEXT}))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (
            ["--data", "rows.jsonl:-2"],
            "files has rows.jsonl:-2; a weight must be a number above 0.",
        ),
        (["--data", "rows.jsonl:nan"], "files has rows.jsonl:nan; a weight"),
        (["--data", "rows.jsonl:0"], "files has rows.jsonl:0; a weight"),
        (["--data", ":-2"], "files has :-2; a weight"),
        (["--evaluation.files", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--evaluation.files", "other.jsonl:2"], "evaluation files take no weights"),
        (["--samples", "-1"], "samples is -1; it must be at least 0."),
        (["--adapter.alpha", "nan"], "adapter.alpha is nan; it must be a finite number."),
        (["--adapter.alpha", "0.0"], "alpha is 0.0; it must be a finite number other than 0."),
        (["--guard.spike", "inf"], "guard.spike is inf; it must be a finite number."),
        (["--optimizer.rate", "nan"], "optimizer.rate is nan"),
        (["--optimizer.rule", "muon"], "Muon only trains in full; for an adapter"),
        (["--data.format", "csv"], "data: format is 'csv'; it must be one of auto, messages"),
        (["--data.untrained", "keep"], "data: untrained is 'keep'; use drop or error."),
        (["--data", "rows.jsonl", "--data", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--data.too_long", "error"], "rows.jsonl:1 has"),
    ],
)
def test_a_preview_rejects_what_training_rejects(
    args: list[str], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", "recipe.toml", *args]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    if "--samples" not in args:
        assert main(["recipe.toml", *args, "--out", "run"]) == 1
        assert problem in capsys.readouterr().err
        assert not (folder / "run").exists()


def test_a_preview_reports_what_loading_the_model_would(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes((hub.TINY / "tokenizer.json").read_bytes())
    settings = recipe.read("recipe.toml", {"model.path": str(model)})
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no config\.json"):
        preview.show(settings, Console(file=io.StringIO()))
    cfg = json.loads((hub.TINY / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(cfg | {"vocab_size": 512}))
    with pytest.raises(ValueError, match="tokens, but the model's vocabulary has 512"):
        preview.show(settings, Console(file=io.StringIO()))


def test_a_preview_describes_files_and_shows_both_kinds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", "recipe.toml", "--evaluation.files", "other.jsonl"]) == 0
    output = capsys.readouterr().out
    assert "rows.jsonl: JSON lines, 1 of text." in output
    assert "other.jsonl: JSON lines, 1 of text." in output
    assert "(1 of 3)" in output


@pytest.mark.parametrize(
    "text", ["\x1b[2Jgone", "bell\x07", "back\x08\x08", "c1 \x9b31m", "\x7f\r"]
)
def test_rows_cannot_control_the_terminal(text: str, folder: Path) -> None:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"text": f"{text}\n\tmore"}))
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    preview.show(recipe.read("recipe.toml"), console)
    shown = out.getvalue()
    assert not any((ord(c) < 32 and c not in "\n\x1b") or 126 < ord(c) < 160 for c in shown)
    assert text not in shown
    for char in set(text) & {*map(chr, range(32)), *map(chr, range(127, 160))}:
        assert repr(char)[1:-1] in shown


def test_a_runs_record_has_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model").symlink_to(hub.TINY)
    overrides = {
        "model.path": "model",
        "out": "run",
        "data.files": '["rows.jsonl:2", "other.jsonl"]',
    }
    settings = recipe.read("recipe.toml", overrides | {"evaluation.files": '["other.jsonl"]'})
    runs.write_recipe(Path("run"), settings)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text(json.dumps({"text": "not the same"}))
    monkeypatch.chdir(elsewhere)
    recorded = runs.read_recipe(folder / "run")
    assert recorded.data.files == (f"{folder / 'rows.jsonl'}:2", str(folder / "other.jsonl"))
    assert recorded.evaluation.files == (str(folder / "other.jsonl"),)
    assert (recorded.out, recorded.model.path) == (str(folder / "run"), str(folder / "model"))
    tokenizer = preparation.text_tokenizer(recorded)
    read: list[documents.Documents] = preparation.read_data(
        recorded, tokenizer, recorded.data.files
    )
    assert tokenizer.decode(read[0].ids_S.tolist()).count("word") == 150


@pytest.mark.parametrize("name", ["tiny", "deepseek-ai/DeepSeek-V4-Flash"])
def test_names_that_are_not_paths_are_kept(name: str, folder: Path) -> None:
    runs.write_recipe(Path("run"), recipe.read("recipe.toml", {"model.path": name}))
    recorded = runs.read_recipe(Path("run"))
    assert recorded.model.path == name
    assert recorded.out == ""
