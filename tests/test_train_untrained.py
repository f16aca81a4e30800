"""Documents, pieces and evaluations without a token to train: left out, or rejected."""

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
    def write_rows(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write_rows


def settings(file: str, **tables: dict[str, Any]) -> recipe.Recipe:
    data = {"files": [file], "seq_len": 128, "too_long": "truncate", "thinking_mode": "chat"}
    base: dict[str, Any] = {
        "model": {"path": str(hub.TINY)},
        "data": data,
        "adapter": {},
        "steps": {"epochs": 1, "batch": 1},
    }
    return recipe.from_table({k: base.get(k, {}) | tables.get(k, {}) for k in base | tables})


def packs(config: recipe.Recipe) -> Packs:
    tokenizer = preparation.text_tokenizer(config)
    documents = preparation.read_data(config, tokenizer, config.data.files)
    return preparation.packs(config, documents)[0]


def preview_of(config: recipe.Recipe, samples: int = 9) -> str:
    out = io.StringIO()
    preview.show(config, Console(file=out, width=400), samples=samples)
    return out.getvalue()


def test_a_truncated_answer_makes_no_step(write: Any) -> None:
    # All simulated devices share the one pack of a batch.
    config = settings(write(chat(300), chat(3), chat(900)), mesh={"tensor": jax.device_count()})
    loaded = packs(config)
    assert len(loaded) == 1
    assert loaded[0]["trained"].any()
    plan = loaded.packing(0)
    assert (plan.untrained, plan.too_long, len(plan)) == (2, 2, 1)
    message = "2 documents or pieces of documents have no token to train within seq_len, 128"
    assert message in loaded.notes()[0]
    assert message in preview_of(config)
    tokenizer = preparation.text_tokenizer(config)
    documents = preparation.read_data(config, tokenizer, config.data.files)
    with pytest.warns(UserWarning, match="positions hold a token"), pytest.warns(match=message):
        assert len(preparation.batches(config, documents)) == 1


def test_pieces_of_a_split_document_without_trained_tokens_make_no_step(write: Any) -> None:
    config = settings(write(chat(600)), data={"too_long": "split"})
    loaded = packs(config)
    assert [bool(loaded[i]["trained"].any()) for i in range(len(loaded))] == [True] * len(loaded)
    assert loaded.packing(0).untrained >= 3
    shown = preview_of(config)
    assert "yes" in shown
    assert "a" * 10 in shown
    assert shown.count("a") < 200
    assert "tokens are left out" in shown


def test_a_piece_whose_only_trained_token_is_its_first_trains_nothing() -> None:
    trained_S = np.zeros(256, bool)
    trained_S[[5, 128]] = True
    pack_settings = PackSettings(seq_len=128, too_long="split")
    plan = packing.pack(np.array([256]), pack_settings, trained_S=trained_S)
    assert (len(plan), plan.untrained, plan.trained, plan.dropped) == (1, 1, 1, 128)


@pytest.mark.parametrize("rows", [[chat(300), chat(3)], [chat(3), chat(5), chat(200)]])
def test_untrained_documents_are_an_error_on_request(rows: list[dict], write: Any) -> None:
    config = settings(write(*rows), data={"untrained": "error"})
    for function in (packs, preview_of):
        with pytest.raises(
            ValueError, match=r"rows\.jsonl:\d has no token to train within seq_len"
        ):
            function(config)


@pytest.mark.parametrize("evaluation", [False, True])
def test_files_without_trained_tokens_are_rejected(evaluation: bool, write: Any) -> None:
    good, untrained = write(chat(3)), write(chat(300), chat(400), name="cut.jsonl")
    tables = {"evaluation" if evaluation else "data": {"files": [untrained]}}
    with pytest.raises(ValueError, match=r"cut\.jsonl:1 has no token.*true of 2 of 2 documents"):
        preview_of(settings(good, **tables))
    if evaluation:
        config = settings(good, **tables)
        tokenizer = preparation.text_tokenizer(config)
        held_out = preparation.read_data(config, tokenizer, config.evaluation.files)
        with pytest.raises(ValueError, match="has no token to train"):
            preparation.held_out_packs(config, held_out)


def test_a_preview_shows_what_remains_after_truncation(write: Any) -> None:
    shown = preview_of(settings(write(chat(3, "b" * 40 + "z" * 400))))
    assert "b" * 40 in shown
    assert "z" * 10 in shown
    assert shown.count("z") < 128
    assert "tokens are left out" in shown


def test_reasoning_that_is_left_out_is_counted(write: Any) -> None:
    reasoned = chat(3, reasoning_content="because")
    later = {"messages": reasoned["messages"] * 2, "thinking_mode": "thinking"}
    thinking = {**reasoned, "enable_thinking": True}
    config = settings(
        write(reasoned, chat(3, reasoning=""), later, thinking, chat(3, reasoning="so"))
    )
    message = "the reasoning of 3 messages is left out"
    assert any(message in note for note in packs(config).notes())
    assert message in preview_of(config)


def test_mostly_empty_packs_are_warned_about(write: Any) -> None:
    config = settings(write(*[chat(3)] * 8), data={"seq_len": 512})
    message = "of the packs' positions hold a token"
    assert any(message in note for note in packs(config).notes())
    assert message in preview_of(config)
    filled = settings(write(*[chat(100)] * 8), data={"seq_len": 512})
    assert not packs(filled).notes()
    assert message not in preview_of(filled)


def test_skipped_rows_are_reported(write: Any) -> None:
    config = settings(write(chat(100), {"text": 3}), data={"skip_wrong": True})
    assert "1 of 2 rows are invalid and left out" in packs(config).notes()[0]
