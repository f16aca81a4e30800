"""What commands write: how sources are named, where targets may be, what is checked first."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from tests import checkpoints, training_runs
from v4jax import presets
from v4jax.__main__ import main
from v4jax.adapters import peft, updates
from v4jax.adapters.lora import Lora
from v4jax.checkpoints import convert, hub, native, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.commands import demo
from v4jax_train import loop, recipe

CFG, SETTINGS = presets.get("tiny"), Lora("self_attn.kv_proj", rank=1)
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, a native checkpoint, an adapter and a run."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(hub.TINY, folder / "release")
    checkpoints.write_other_files(folder / "release")
    convert.convert(folder / "release", folder / "native")
    factors = training_runs.learned(CFG, SETTINGS)
    peft.export(folder / "adapter", CFG, SETTINGS, factors)
    training_runs.write(folder / "run", folder / "release", SETTINGS, factors)
    return folder


@pytest.fixture
def places(home: Path, tmp_path: Path) -> Path:
    """A copy of `home` that a test may damage."""
    return shutil.copytree(home, tmp_path / "home")


def error_message(capsys: Capsys, *args: Any) -> str:
    assert main([str(arg) for arg in args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


# The sources of each command, by their names in `home`.
COMMANDS: dict[str, tuple[str, ...]] = {
    "convert": ("release",),
    "export": ("native",),
    "export-adapter": ("run",),
    "merge": ("release", "adapter"),
}
OPTIONS = {"merge": ("--weights", "keep"), "export-adapter": ("--model", "tiny")}


def words(command: str, places: Path, target: Path) -> list[Any]:
    sources = [places / name for name in COMMANDS[command]]
    return [command, *sources, target, *OPTIONS.get(command, ())]


@pytest.mark.parametrize(
    ("command", "source"), [(name, each) for name, sources in COMMANDS.items() for each in sources]
)
@pytest.mark.parametrize("way", ["inside", "deep inside", "by a link", "beside a link", "the same"])
def test_nothing_is_written_into_its_own_source(
    command: str, source: str, way: str, places: Path, capsys: Capsys
) -> None:
    (places / "link").symlink_to(places / source)
    (places / "elsewhere").mkdir()
    (places / "elsewhere" / "link").symlink_to(places / source)
    target = {
        "inside": places / source / "new",
        "deep inside": places / source / "a" / "b" / "new",
        "by a link": places / "link" / "new",
        "beside a link": places / "elsewhere" / ".." / source / "new",
        "the same": places / "link",
    }[way]
    before = contents(places)
    message = (
        "exists; choose another place" if way == "the same" else f"is inside {places / source}"
    )
    assert message in error_message(capsys, *words(command, places, target))
    assert contents(places) == before


def test_a_source_named_by_a_link_is_the_same_source(places: Path, capsys: Capsys) -> None:
    (places / "link").symlink_to(places / "release")
    error = error_message(capsys, "convert", places / "link", places / "release" / "new")
    assert f"is inside {places / 'link'}; choose a place outside of it" in error


def test_an_adapter_is_not_written_into_its_model(places: Path, capsys: Capsys) -> None:
    model, target = places / "release", places / "release" / "adapter"
    error = error_message(capsys, "export-adapter", places / "run", target, "--model", model)
    assert f"is inside {model}" in error


def test_the_demo_and_a_run_are_not_written_into_their_model(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TINY", places / "release")
    with pytest.raises(CheckpointError, match="is inside"):
        demo.copy(places / "release" / "copy")
    settings = recipe.from_table(
        {
            "out": str(places / "release" / "run"),
            "model": {"path": str(places / "release")},
            "adapter": {},
            "steps": {"steps": 1},
        }
    )
    with pytest.raises(CheckpointError, match="is inside"):
        loop.begin(settings, show=lambda _: None)


@pytest.fixture
def fake_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A Hub whose repositories are downloaded already."""
    repositories = {f"org/{name}": home / name for name in ("release", "native", "adapter")}
    download = lambda repo_id, **_: str(repositories[repo_id])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repositories


@pytest.mark.usefixtures("fake_hub")
def test_every_command_takes_every_kind_of_name(
    home: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home))
    keep = ("--weights", "keep")
    lines = [
        ("merge", "tiny", "~/adapter", tmp_path / "1", *keep),
        ("merge", "org/release", "org/adapter", tmp_path / "2", *keep),
        ("merge", "~/release", home / "run", tmp_path / "3", *keep),
        ("convert", "tiny", tmp_path / "4"),
        ("convert", "~/release", tmp_path / "5"),
        ("export", "~/native", tmp_path / "6"),
        ("export", "org/native", tmp_path / "7"),
        ("export-adapter", "~/run", tmp_path / "8", "--model", "tiny"),
        ("export-adapter", "~/run", tmp_path / "9", "--model", "org/native"),
        ("inspect", "~/native"),
    ]
    for line in lines:
        assert main([str(word) for word in line]) == 0, line
        capsys.readouterr()
    assert contents(tmp_path / "2") == contents(tmp_path / "3")
    assert contents(tmp_path / "5") == contents(home / "native")
    assert contents(tmp_path / "6") == contents(tmp_path / "7")
    for name in "89":
        config = json.loads((tmp_path / name / peft.CONFIG).read_text())
        assert config.pop("base_model_name_or_path") in ("tiny", "org/native")
        assert config.items() <= json.loads((home / "adapter" / peft.CONFIG).read_text()).items()
    assert "is already a native checkpoint" in error_message(
        capsys, "convert", "org/native", tmp_path / "x"
    )
    assert "is not a native checkpoint" in error_message(capsys, "export", "tiny", tmp_path / "x")
    assert "no such file" in error_message(capsys, "merge", "tiny", "flsh", tmp_path / "x", *keep)


def test_export_undoes_convert(home: Path, tmp_path: Path) -> None:
    convert.export(home / "native", tmp_path / "exported")
    exported = contents(tmp_path / "exported")
    dropped = (".cache/lock", "pytorch_model.bin", "pytorch_model.bin.index.json")
    assert exported == {
        name: value for name, value in contents(home / "release").items() if name not in dropped
    }


def garbled(name: str, text: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(text)


def too_many_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = {f"t{i}": i for i in range(CFG.vocab_size + 1)}
    file.write_text(json.dumps(tokenizer))


GARBLED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokenizer": (garbled("tokenizer.json", b'{"a": 1}'), "tokenizer.json: not a tokenizer"),
    "half a tokenizer": (garbled("tokenizer.json", b'{"model": '), "tokenizer.json: is not JSON"),
    "another's tokenizer": (too_many_tokens, "but the model's vocabulary has"),
    "settings": (garbled("generation_config.json", b'{"top_p": '), "generation_config.json: line"),
    "a list": (garbled("tokenizer_config.json", b"[]"), "tokenizer_config.json: not a JSON obj"),
    "other JSON": (garbled("more.json", b"{,}"), "more.json: is not JSON"),
    "template": (garbled("chat_template.jinja", b"\xff\xfe"), "jinja: is not UTF-8 text"),
    "a link to nothing": (
        lambda folder: (folder / "LICENCE").symlink_to(folder / "gone"),
        "LICENCE: is a broken link",
    ),
}


@pytest.mark.parametrize("command", ["convert", "export", "merge"])
@pytest.mark.parametrize("what", GARBLED)
def test_files_are_checked_before_they_are_copied(
    command: str, what: str, places: Path, tmp_path: Path, capsys: Capsys
) -> None:
    damage, message = GARBLED[what]
    damage(places / COMMANDS[command][0])
    assert message in error_message(capsys, *words(command, places, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_names_reserved_by_native_checkpoints_are_refused(places: Path, capsys: Capsys) -> None:
    (places / "release" / "extras").mkdir()
    (places / "release" / "extras" / "notes.txt").write_text("")
    error = error_message(capsys, "convert", places / "release", places / "new")
    assert "extras/notes.txt: native checkpoints reserve the name extras" in error


def test_the_index_of_another_checkpoint_is_refused(places: Path, capsys: Capsys) -> None:
    index = places / "native" / native.EXTRAS / "model.safetensors.index.json"
    assert contents(index.parent)[index.name] == (places / "release" / index.name).read_bytes()
    index.write_text('{"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}}')
    assert "does not list the tensors" in error_message(
        capsys, "export", places / "native", places / "new"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("command", ["export-adapter", "merge"])
def test_a_state_with_non_finite_values_is_refused(
    command: str, value: float, home: Path, tmp_path: Path, capsys: Capsys
) -> None:
    factors = training_runs.learned(CFG, SETTINGS)
    name = min(factors)
    factors[name]["b"][0, 1, 0] = value
    run = training_runs.write(tmp_path / "run", home / "release", SETTINGS, factors)
    line = {
        "merge": ("merge", home / "release", run, tmp_path / "new", "--weights", "keep"),
        "export-adapter": ("export-adapter", run, tmp_path / "new"),
    }[command]
    error = error_message(capsys, *line)
    assert f"'{name}.b' has values that are not finite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Killed(BaseException):
    """Stands for a signal that kills the process."""


@pytest.mark.parametrize("command", COMMANDS)
def test_leftovers_of_a_kill_after_the_last_rename_are_removed(
    command: str, home: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new"

    def killed(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "_remove", killed)
        with pytest.raises(Killed):
            main([str(word) for word in words(command, home, target)])
    leftovers = unfinished.scratch(target)
    assert leftovers.exists()
    finished = contents(target)
    assert "exists; choose another place" in error_message(capsys, *words(command, home, target))
    assert not leftovers.exists()
    assert contents(target) == finished


def test_readers_remove_leftovers_too(home: Path, tmp_path: Path) -> None:
    target, leftovers = tmp_path / "adapter", tmp_path / "adapter.unfinished"
    shutil.copytree(home / "adapter", target)
    leftovers.mkdir()
    (leftovers / "journal.jsonl").write_text('{"v4jax": "export-adapter", "identity": ""}\n')
    updates.read(target, CFG)
    assert not leftovers.exists()


def test_unfinished_work_is_not_removed(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with contextlib.suppress(Killed), unfinished.begin(target, "export-adapter", "") as work:
        work.add("a part")
        raise Killed
    unfinished.check_target(target)
    shutil.copytree(home / "adapter", target)
    updates.read(target, CFG)
    assert (unfinished.scratch(target) / "result").exists()
    with pytest.raises(CheckpointError, match="is unfinished"):
        updates.read(unfinished.scratch(target) / "result", CFG)


def test_work_without_a_finished_part_is_restarted_by_any_command(
    home: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new"
    scratch = unfinished.scratch(target)
    (scratch / "result").mkdir(parents=True)
    (scratch / "result" / "half").write_text("")
    (scratch / "journal.jsonl").write_text('{"v4jax": "merge", "identity": "other"}\n')
    convert.convert(home / "release", target)
    assert contents(target) == contents(home / "native")
    assert os.listdir(tmp_path) == ["new"]
