"""Recipes: files, flags that override them, and errors that name the key."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import v4jax_configs

from v4jax.adapters.lora import Lora
from v4jax_train import recipe, recipe_help, tables
from v4jax_train.__main__ import main
from v4jax_train.full_settings import Full
from v4jax_train.recipe import Recipe

MINIMAL = "[adapter]\n[steps]\nsteps = 5\n"


def read(tmp_path: Path, text: str, **overrides: str) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    return recipe.read(file, {name.replace("__", "."): text for name, text in overrides.items()})


def test_flags_override_the_file(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        '[model]\npath = "a"\n[adapter]\nrank = 4\n[steps]\nsteps = 5\n',
        model__path="some/where",
        adapter__rank="8",
        optimizer__rate="3e-4",
        data__files='["x.jsonl:2", "y.jsonl"]',
        model__keep_quantised="false",
    )
    assert settings.model.path == "some/where"
    assert not settings.model.keep_quantised
    assert settings.adapter == Lora(rank=8)
    assert settings.optimizer.rate == 3e-4
    assert settings.data.files == ("x.jsonl:2", "y.jsonl")


def test_the_former_name_of_a_field_is_read_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=r"model\.keep is now called keep_quantised"):
        assert not read(tmp_path, MINIMAL, model__keep="false").model.keep_quantised
    with pytest.raises(ValueError, match="has keep_quantised and keep, its old name"):
        read(tmp_path, MINIMAL, model__keep="false", model__keep_quantised="true")


def test_targets_are_a_word_or_a_list(tmp_path: Path) -> None:
    names = '["q_a_proj", "kv_proj"]'
    settings = read(tmp_path, MINIMAL, adapter__targets=names)
    assert settings.adapter == Lora(("q_a_proj", "kv_proj"))
    assert recipe.from_table(json.loads(json.dumps(tables.to_table(settings)))) == settings
    for text in ("all", '["all"]'):
        assert read(tmp_path, MINIMAL, adapter__targets=text).adapter == Lora("all")


def test_a_recipe_round_trips_through_json(tmp_path: Path) -> None:
    settings = read(tmp_path, MINIMAL, data__files='["x.jsonl"]', evaluation__prompts='["Once"]')
    assert recipe.from_table(json.loads(json.dumps(tables.to_table(settings)))) == settings


@pytest.mark.parametrize("name", ["train_lora", "train_full"])
def test_shipped_recipes_are_valid(name: str) -> None:
    path = Path(v4jax_configs.__path__[0]) / f"{name}.toml"
    assert dataclasses.asdict(recipe.read(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[adapter", "is not TOML"),
        ("[steps]\nsteps = 5", "one of the tables [adapter] and [full]"),
        ("[adapter]\n[full]\n[steps]\nsteps = 5", "one of the tables"),
        ("[adapter]", "The run has no end"),
        (
            "[adapter]\nranks = 4\n[steps]\nsteps = 5",
            "adapter has no 'ranks'; did you mean 'rank'?",
        ),
        ("[adapter]\nrank = 0\n[steps]\nsteps = 5", "adapter: rank is 0; it must be at least 1."),
        (
            '[adapter]\ntargets = ["attn", "kv"]',
            "adapter: targets has 'kv'; a target must be one of attn, ",
        ),
        ("[adapter]\ntargets = 3", "adapter.targets is 3; it must be a list of strings."),
        ("[adapter]\nalpha = nan", "adapter.alpha is nan; it must be a finite number."),
        ("[adaptor]\n", "The recipe has no 'adaptor'; did you mean 'adapter'?"),
        ("adapter = 3\n", "adapter is 3; it must be a table."),
        (MINIMAL + "batch = 6\nparts = 4", "steps: batch is 6; use a multiple of parts, 4."),
        (MINIMAL + "batch = true", "steps.batch is True; it must be an integer."),
        (
            MINIMAL + '[model]\ndtype = "half"',
            "model.dtype is 'half'; it must be one of 'bfloat16'",
        ),
        (MINIMAL + "[data]\nseq_len = 100", "data: seq_len is 100; use a multiple of 128."),
        (
            MINIMAL + "seed = 4294967296",
            "steps.seed is 4294967296; it must be at most 2.14748e+09.",
        ),
        (MINIMAL + "[guard]\nspike = nan", "guard.spike is nan; it must be a finite number."),
        (
            "[adapter]\nalpha = inf\n[steps]\nsteps = 5",
            "adapter.alpha is inf; it must be a finite number.",
        ),
        ("a = " + "[" * 3000, "is not TOML"),
        ("[steps]\nsteps = " + "9" * 5000, "is not TOML"),
        (MINIMAL + "[losses]\nmtp = 0.1", "[losses] trains MTP blocks, routers and indexers"),
        (MINIMAL + "[optimizer]\nrate = 0.0", "optimizer: rate is 0.0; it must be above 0.0."),
        (MINIMAL + "[guard]\nspike = 0.5", "guard: spike is 0.5"),
        (MINIMAL + "[evaluation]\npatience = 2", "evaluation: patience is 2, but there are no"),
        ("[full]\nindexers = true\n[steps]\nsteps = 5", "set both or neither"),
        ("[full]\nmtp = false\n[losses]\nmtp = 0.1\n[steps]\nsteps = 5", "losses.mtp is set"),
        (
            '[full]\ndtype = "float32"\n[steps]\nsteps = 5',
            "full.dtype is set by model.dtype; remove it.",
        ),
    ],
)
def test_errors_name_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "recipe.toml"))


def test_full_dtype_may_repeat_the_dtype_of_the_model(tmp_path: Path) -> None:
    text = '[full]\ndtype = "float32"\n[model]\ndtype = "float32"\n[steps]\nsteps = 5\n'
    settings = read(tmp_path, text)
    assert isinstance(settings.what, Full)
    assert settings.what.dtype == "float32"


@pytest.mark.parametrize("command", ["train", "preview"])
def test_help_has_the_type_default_and_meaning_of_every_field(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    tables = recipe_help.tables(Recipe)
    table_names = {name.split(".")[0] for name, _ in fields(Recipe) if "." in name}
    assert tables.keys() == table_names
    for table, kind in tables.items():
        assert [field.name for field in recipe_help.fields(kind)] == list(get_type_hints(kind))
        for field in recipe_help.fields(kind):
            assert len(field.meaning) > 10, f"{table}.{field.name}"
            meaning = field.meaning.rstrip(".")
            entry = f"--{table}.{field.name} {field.type} {meaning} (default: {field.default})"
            assert entry in text


def test_help_shows_types_and_defaults_as_a_recipe_has_them() -> None:
    shown = {
        f"{table}.{field.name}": (field.type, field.default)
        for table, kind in recipe_help.tables(Recipe).items()
        for field in recipe_help.fields(kind)
    }
    assert shown["model.dtype"] == ("{bfloat16,float32}", '"bfloat16"')
    assert shown["data.files"] == ("[str,...]", "[]")
    assert shown["steps.epochs"] == ("int", "unset")
    assert shown["steps.remat"] == ("[str,...]", '["full"]')
    assert shown["adapter.targets"] == ("[str,...]|str", '"attn"')
    assert shown["optimizer.rate"] == ("float", "0.0001")


def test_every_attribute_that_is_described_is_a_field() -> None:
    kinds = [Recipe, *recipe_help.tables(Recipe).values(), *recipe.Data.described_by]
    for kind in kinds:
        assert recipe_help.attributes(kind)
        assert recipe_help.attributes(kind).keys() <= get_type_hints(kind).keys()


def test_help_imports_no_jax() -> None:
    code = (
        "import sys; from v4jax_train.__main__ import main\n"
        "try: main(['train', '--help'])\nfinally: print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")


def fields(kind: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Each field of a recipe by its dotted name, and its annotated type."""
    for name, hint in get_type_hints(kind).items():
        plain = next((x for x in get_args(hint) if dataclasses.is_dataclass(x)), hint)
        if dataclasses.is_dataclass(plain):
            yield f"{where}{name}", dict
            yield from fields(plain, f"{where}{name}.")
        else:
            yield f"{where}{name}", hint


# Values in TOML, and the annotations that accept them.
VALUES: dict[str, tuple[Any, ...]] = {
    "4": (int, float, int | None),
    "2.5": (float,),
    "nan": (),
    "-inf": (),
    "1e300": (),
    "9223372036854775808": (float,),
    "true": (bool,),
    '"word"': (str, str | None, tuple[str, ...]),
    "[1, 2]": (),
    "[[]]": (),
    '["word", 3]': (),
    "[]": (tuple[str, ...],),
    "{}": (dict,),
    "{ a = { b = 1 } }": (dict,),
    "[{ a = 1 }]": (),
    "2026-11-29": (),
    "2026-11-29T10:00:00Z": (),
    "10:00:00": (),
}


@pytest.mark.parametrize(("name", "hint"), list(fields(Recipe)))
def test_a_value_of_the_wrong_type_is_a_one_line_error(
    name: str, hint: Any, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    table, _, field = name.rpartition(".")
    values = [value for value, hints in VALUES.items() if hint not in hints]
    assert len(values) > 10
    for value in values:
        line = f"{field} = {value}\n"
        text = f"[{table}]\n{line}" if table else line
        file.write_text(text + "[adapter]\n" * (name.split(".")[0] != "adapter"))
        with pytest.raises(
            ValueError, match=rf"recipe\.toml: ({name} is |{table}: {field} (has|is) )"
        ) as error:
            recipe.read(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["4", "true", '"word"', "[1]", "2026-11-29"])
def test_a_flag_into_a_key_that_is_not_a_table_is_a_one_line_error(
    value: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"adapter is .*; it must be a table"):
        read(tmp_path, f"adapter = {value}\n", adapter__rank="3")


def test_a_flag_is_a_single_value(tmp_path: Path) -> None:
    settings = read(tmp_path, MINIMAL, model__path='"a"\nother = 3')
    assert settings.model.path == '"a"\nother = 3'


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert recipe.read(file).steps.steps == 5
