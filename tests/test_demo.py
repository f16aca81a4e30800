"""The demo model that ships with the package, and the demo command."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import v4jax
from v4jax import presets
from v4jax.__main__ import main
from v4jax.checkpoints import hub
from v4jax.checkpoints.safetensors_directory import Checkpoint
from v4jax.commands import demo, inspect
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine.batch import answer
from v4jax.engine.request import Request
from v4jax.language_model import LanguageModel
from v4jax.model import params
from v4jax.model.transformer import Model
from v4jax_train import loss, tiny


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return v4jax.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def output() -> str:
    """The output of the demo."""
    with pytest.MonkeyPatch.context() as patch:
        parts: list[str] = []
        patch.setattr(demo, "_say", lambda text, end="\n": parts.append(text + end))
        assert demo.main(None) == 0
    return "".join(parts)


def test_the_model_is_the_preset_in_the_release_format_and_under_4_mb() -> None:
    assert sum(file.stat().st_size for file in hub.TINY.iterdir()) < 4e6
    with Checkpoint.open(hub.TINY) as files:
        dtypes = {name: files.info(name).dtype for name in files.names}
    assert dtypes["layers.0.attn.wq_a.weight"] == "F8_E4M3"
    assert dtypes["mtp.0.ffn.experts.7.w2.weight"] == "I8"
    subject = inspect.find(str(hub.TINY))
    assert subject.config == presets.get("tiny")
    assert subject.held == inspect.report(presets.get("tiny")).bytes_by_dtype


def test_the_model_has_one_to_four_million_parameters() -> None:
    assert 1e6 < params.count(Model(presets.get("tiny"))) < 4e6


def test_its_repr_is_one_short_line(model: LanguageModel) -> None:
    assert repr(model) == (
        "LanguageModel(5 layers, 3,233,294 parameters in 12.9 MB, computing in float32,"
        " with tokenizer)"
    )


def test_its_text_consists_of_words(model: LanguageModel) -> None:
    """Most words that it writes occur in its training text."""
    texts = [row["text"] for row in tiny.rows() if "text" in row]
    known = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    for seed, prompt in enumerate(tiny.PROMPTS):
        text = model.generate(prompt, max_tokens=150, temperature=0.8, seed=seed).text
        words = [word for word in re.findall(r"[a-z]+", text.lower())[:-1] if len(word) > 3]
        assert len(words) >= 20, text
        assert sum(word in known for word in words) > 0.85 * len(words), text
        assert len(set(words)) > 0.4 * len(words), text


def test_more_than_half_of_its_drafts_are_accepted(model: LanguageModel) -> None:
    """On text that it generates, greedily and by sampling."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    rows = []
    for seed, prompt in enumerate(tiny.PROMPTS):
        for temperature in (0.0, 1.0):
            new = model.generate(prompt, max_tokens=112, temperature=temperature, seed=seed).tokens
            rows.append([0, *tokenizer.encode(prompt), *new][:112])
    tokens = np.zeros((len(rows), 128), np.int32)
    document = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], document[number, : len(row)] = row, 1
    batch = {"tokens": tokens, "document": document, "trained": document > 0}
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    how = model.weights, model.config, model.numerics
    sums, _ = loss.sums(*how, batch, mtp=True, agreement=True)
    counts = loss.counts(batch, sums)
    assert float(sums["mtp_agreement"] / counts["mtp_agreement"]) > 0.5


def test_drafts_do_not_change_the_distribution_of_samples(model: LanguageModel) -> None:
    """Where a sample lies in the distribution that the model gives it is uniform on 0 to 1."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    requests = [
        Request(
            tokens=tokenizer.encode(tiny.PROMPTS[seed % len(tiny.PROMPTS)]),
            max_tokens=100,
            sampling=SamplingParams(temperature=0.8, seed=seed),
        )
        for seed in range(32)
    ]
    texts = [[*request.tokens] for request in requests]
    drafted = accepted = 0
    for i, event in answer(model, requests, speculate="mtp:2"):
        texts[i] += [token.id for token in event.tokens]
        if event.finish:
            drafted += event.usage.drafted_tokens
            accepted += event.usage.accepted_tokens
    assert accepted > 0.2 * drafted > 300
    length = max(len(text) for text in texts)
    logits_BTV = model.logits_of([text + [0] * (length - len(text)) for text in texts])

    def places(temperature: float) -> list[float]:
        """Shares of probability before each sample, the most probable tokens first."""
        rng, values = np.random.default_rng(0), []
        probability_BTV = np.asarray(jax.nn.softmax(logits_BTV / temperature))
        for request, text, probability_TV in zip(requests, texts, probability_BTV, strict=True):
            for at in range(len(request.tokens), len(text)):
                own_V, token = probability_TV[at - 1], text[at]
                before = own_V[own_V > own_V[token]].sum()
                values.append(before + rng.uniform() * own_V[token])
        return values

    assert scipy.stats.kstest(places(0.8), "uniform").pvalue > 0.01
    assert scipy.stats.kstest(places(0.9), "uniform").pvalue < 1e-6


def test_the_demo_streams_text_and_reports_its_speed(output: str) -> None:
    text = output.split("text:\n\n")[1].split("\n\nThat took")[0]
    assert text.startswith(demo.PROMPT)
    assert len(text) > len(demo.PROMPT) + 50
    assert re.search(r"decodes \d+ tokens/s", output)
    assert 'v4jax generate tiny -p "' in output


def test_the_demo_copies_the_model_and_reuses_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_generate", lambda _: None)
    copy = tmp_path / "copy"
    for _ in range(2):
        assert demo.main(copy) == 0
        names = {file.name for file in copy.iterdir()}
        assert names == {file.name for file in hub.TINY.iterdir()}
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_the_demo_rejects_a_directory_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear all")
    with pytest.raises(ValueError, match=f"{tmp_path}: exists"):
        demo.main(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_directory_named_tiny_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny") == hub.TINY
    Path("tiny").mkdir()
    assert hub.resolve("tiny") == Path("tiny")


def test_generate_accepts_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "tiny", "-p", "Return a list of", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
