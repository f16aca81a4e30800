"""Recipes: files, flags over them, and errors that name the key."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import v4jax_configs

from v4jax.lora import Lora
from v4jax_train import recipe, tables
from v4jax_train.recipe import Recipe

MINIMAL = "[adapter]\n[steps]\nsteps = 5\n"


def read(tmp_path: Path, text: str, **overrides: str) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    return recipe.read(file, {name.replace("__", "."): text for name, text in overrides.items()})


def test_flags_override_the_file(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        '[model]\npath = "a"\n[adapter]\nrank = 4\n[steps]\nsteps = 5\n',
        model__path="some/where",
        adapter__rank="8",
        optimizer__rate="3e-4",
        data__files='["x.jsonl:2", "y.jsonl"]',
        model__keep="false",
    )
    assert found.model.path == "some/where"
    assert not found.model.keep
    assert found.adapter == Lora(rank=8)
    assert found.optimizer.rate == 3e-4
    assert found.data.files == ("x.jsonl:2", "y.jsonl")


def test_targets_are_a_word_or_a_list(tmp_path: Path) -> None:
    names = '["q_a_proj", "kv_proj"]'
    found = read(tmp_path, MINIMAL, adapter__targets=names)
    assert found.adapter == Lora(("q_a_proj", "kv_proj"))
    assert recipe.from_table(json.loads(json.dumps(tables.to_table(found)))) == found
    for text in ("all", '["all"]'):
        assert read(tmp_path, MINIMAL, adapter__targets=text).adapter == Lora("all")


def test_a_recipe_is_the_same_after_a_trip_through_json(tmp_path: Path) -> None:
    found = read(tmp_path, MINIMAL, data__files='["x.jsonl"]', evaluation__prompts='["Once"]')
    assert recipe.from_table(json.loads(json.dumps(tables.to_table(found)))) == found


@pytest.mark.parametrize("name", ["train_lora", "train_full"])
def test_recipes_that_are_shipped_are_valid(name: str) -> None:
    path = Path(v4jax_configs.__path__[0]) / f"{name}.toml"
    assert dataclasses.asdict(recipe.read(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[adapter", "is not TOML"),
        ("[steps]\nsteps = 5", "one of the tables [adapter] and [full]"),
        ("[adapter]\n[full]\n[steps]\nsteps = 5", "one of the tables"),
        ("[adapter]", "The run has no end"),
        (
            "[adapter]\nranks = 4\n[steps]\nsteps = 5",
            "adapter has no 'ranks'; did you mean 'rank'?",
        ),
        ("[adapter]\nrank = 0\n[steps]\nsteps = 5", "adapter: rank is 0; it is at least 1."),
        ('[adapter]\ntargets = ["attn", "kv"]', "adapter: targets has 'kv'; it is one of attn, "),
        ("[adapter]\ntargets = 3", "adapter.targets is 3; it is a list of strings."),
        ("[adapter]\nalpha = nan", "adapter: alpha is nan; it is a finite number."),
        ("[adaptor]\n", "The recipe has no 'adaptor'; did you mean 'adapter'?"),
        ("adapter = 3\n", "adapter is 3; it is a table."),
        (MINIMAL + "batch = 6\nparts = 4", "steps: batch is 6; use a multiple of parts, 4."),
        (MINIMAL + "batch = true", "steps.batch is True; it is a int."),
        (MINIMAL + '[model]\ndtype = "half"', "model.dtype is 'half'; it is one of 'bfloat16'"),
        (MINIMAL + "[data]\nseq_len = 100", "data: seq_len is 100; use a multiple of 128."),
        (MINIMAL + "[losses]\nmtp = 0.1", "[losses] trains MTP blocks, routers and indexers"),
        (MINIMAL + "[optimizer]\nrate = 0.0", "optimizer: rate is 0.0; it is above 0.0."),
        (MINIMAL + "[guard]\nspike = 0.5", "guard: spike is 0.5"),
        ("[full]\nindexers = true\n[steps]\nsteps = 5", "set both or neither"),
        ("[full]\nmtp = false\n[losses]\nmtp = 0.1\n[steps]\nsteps = 5", "losses.mtp is set"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "recipe.toml"))
