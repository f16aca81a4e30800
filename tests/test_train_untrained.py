"""Documents, pieces and evaluations without a token to train: they are left out, or refused."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from v4jax.checkpoints import hub
from v4jax_train import preparation, preview, recipe
from v4jax_train.data import packing
from v4jax_train.data.dataset import Packs
from v4jax_train.data.packing import PackSettings


def chat(asked: int, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "a" * asked}
    return {"messages": [question, {"role": "assistant", "content": answer, **fields}]}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return written


def settings(file: str, **tables: dict[str, Any]) -> recipe.Recipe:
    data = {"files": [file], "seq_len": 128, "too_long": "truncate", "thinking_mode": "chat"}
    base: dict[str, Any] = {
        "model": {"path": str(hub.TINY)},
        "data": data,
        "adapter": {},
        "steps": {"epochs": 1, "batch": 1},
    }
    return recipe.from_table({k: base.get(k, {}) | tables.get(k, {}) for k in base | tables})


def packs(chosen: recipe.Recipe) -> Packs:
    tokenizer = preparation.text_tokenizer(chosen)
    read = preparation.read_data(chosen, tokenizer, chosen.data.files)
    return preparation.packs(chosen, read)[0]


def said(chosen: recipe.Recipe, samples: int = 9) -> str:
    out = io.StringIO()
    preview.show(chosen, Console(file=out, width=400), samples=samples)
    return out.getvalue()


def test_an_answer_that_is_cut_away_is_no_step(write: Any) -> None:
    # All simulated devices share the one pack of a batch.
    chosen = settings(write(chat(300), chat(3), chat(900)), mesh={"tensor": jax.device_count()})
    found = packs(chosen)
    assert len(found) == 1
    assert found[0]["trained"].any()
    plan = found.packing(0)
    assert (plan.untrained, plan.too_long, len(plan)) == (2, 2, 1)
    told = "2 documents or pieces of them have no token to train within seq_len, 128"
    assert told in found.notes()[0]
    assert told in said(chosen)
    tokenizer = preparation.text_tokenizer(chosen)
    read = preparation.read_data(chosen, tokenizer, chosen.data.files)
    with pytest.warns(UserWarning, match="positions hold a token"), pytest.warns(match=told):
        assert len(preparation.batches(chosen, read)) == 1


def test_pieces_of_a_split_document_that_train_nothing_are_no_step(write: Any) -> None:
    chosen = settings(write(chat(600)), data={"too_long": "split"})
    found = packs(chosen)
    assert [bool(found[i]["trained"].any()) for i in range(len(found))] == [True] * len(found)
    assert found.packing(0).untrained >= 3
    shown = said(chosen)
    assert "yes" in shown
    assert "a" * 10 in shown
    assert shown.count("a") < 200
    assert "tokens are left out" in shown


def test_a_piece_whose_only_trained_token_is_its_first_trains_nothing() -> None:
    trained_S = np.zeros(256, bool)
    trained_S[[5, 128]] = True
    how = PackSettings(seq_len=128, too_long="split")
    plan = packing.pack(np.array([256]), how, trained_S=trained_S)
    assert (len(plan), plan.untrained, plan.trained, plan.dropped) == (1, 1, 1, 128)


@pytest.mark.parametrize("rows", [[chat(300), chat(3)], [chat(3), chat(5), chat(200)]])
def test_they_are_refused_if_asked(rows: list[dict], write: Any) -> None:
    chosen = settings(write(*rows), data={"untrained": "error"})
    for read in (packs, said):
        with pytest.raises(
            ValueError, match=r"rows\.jsonl:\d has no token to train within seq_len"
        ):
            read(chosen)


@pytest.mark.parametrize("evaluation", [False, True])
def test_files_that_train_nothing_are_refused(evaluation: bool, write: Any) -> None:
    right, wrong = write(chat(3)), write(chat(300), chat(400), name="cut.jsonl")
    tables = {"evaluation": {"files": [wrong]}} if evaluation else {"data": {"files": [wrong]}}
    with pytest.raises(ValueError, match=r"cut\.jsonl:1 has no token.*so have 2 of 2 documents"):
        said(settings(right, **tables))
    if evaluation:
        chosen = settings(right, **tables)
        tokenizer = preparation.text_tokenizer(chosen)
        held_out = preparation.read_data(chosen, tokenizer, chosen.evaluation.files)
        with pytest.raises(ValueError, match="has no token to train"):
            preparation.held_out_packs(chosen, held_out)


def test_a_preview_shows_what_is_seen_after_the_cut(write: Any) -> None:
    shown = said(settings(write(chat(3, "b" * 40 + "z" * 400))))
    assert "b" * 40 in shown
    assert "z" * 10 in shown
    assert shown.count("z") < 128
    assert "tokens are left out" in shown


def test_reasoning_that_is_left_out_is_counted(write: Any) -> None:
    thinks = chat(3, reasoning_content="because")
    later = {"messages": thinks["messages"] * 2, "thinking_mode": "thinking"}
    kept = {**thinks, "enable_thinking": True}
    chosen = settings(write(thinks, chat(3, reasoning=""), later, kept, chat(3, reasoning="so")))
    told = "the reasoning of 3 messages is left out"
    assert any(told in note for note in packs(chosen).notes())
    assert told in said(chosen)


def test_packs_that_are_mostly_empty_are_warned_of(write: Any) -> None:
    chosen = settings(write(*[chat(3)] * 8), data={"seq_len": 512})
    told = "of the packs' positions hold a token"
    assert any(told in note for note in packs(chosen).notes())
    assert told in said(chosen)
    well = settings(write(*[chat(100)] * 8), data={"seq_len": 512})
    assert not packs(well).notes()
    assert told not in said(well)


def test_rows_that_are_skipped_are_told_of(write: Any) -> None:
    chosen = settings(write(chat(100), {"text": 3}), data={"skip_wrong": True})
    assert "1 of 2 rows are wrong and left out" in packs(chosen).notes()[0]
