"""Generation: the compiled loop, its end conditions, its results, and bad arguments."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models
from v4jax.decoding.loaded import NotFiniteError
from v4jax.generation import Generation, Timings
from v4jax.language_model import LanguageModel
from v4jax.model import params
from v4jax.model.numerics import HF
from v4jax.model.transformer import Model
from v4jax.text.chat import encode_chat
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer

VOCAB = 300
CFG = models.config(
    models.SLIDING, models.CSA, models.HCA, vocab_size=VOCAB, max_position_embeddings=512
)
PROMPT = models.tokens(CFG, 1, 40)[0].tolist()


def language_model(**changes: Any) -> LanguageModel:
    cfg = models.config(
        models.SLIDING,
        models.CSA,
        models.HCA,
        **({"vocab_size": VOCAB, "max_position_embeddings": 512} | changes),
    )
    tokenizer = Tokenizer(build_demo_tokenizer(VOCAB))
    return LanguageModel(models.weights(cfg), cfg, HF, jnp.dtype("float32"), tokenizer)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model()


def test_greedy_text_is_the_argmax_of_the_logits_of_the_full_text(model: LanguageModel) -> None:
    out = model.generate(PROMPT, max_tokens=70, temperature=0.0)
    logits_TV = model.logits([PROMPT + out.tokens])[0]
    assert out.tokens == logits_TV[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert len(out.tokens) == 70
    assert out.finish_reason == "length"


def test_logprobs_are_those_of_the_raw_logits(model: LanguageModel) -> None:
    out = model.generate(PROMPT, max_tokens=12, temperature=0.7, top_p=0.9, seed=3, top_logprobs=4)
    logits_TV = model.logits([PROMPT + out.tokens])[0, len(PROMPT) - 1 : -1].astype(np.float64)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    expected = logprobs_TV[np.arange(12), out.tokens]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)
    for row, top in zip(logprobs_TV, out.top_logprobs, strict=True):
        assert [token for token, _ in top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob in top], np.sort(row)[::-1][:4], atol=1e-4
        )


def test_an_end_of_sequence_token_ends_the_text_and_is_not_part_of_it(model: LanguageModel) -> None:
    free = model.generate(PROMPT, max_tokens=30, temperature=0.0)
    stop = free.tokens[9]
    first = free.tokens.index(stop)
    out = language_model(eos_token_ids=(stop,)).generate(PROMPT, max_tokens=30, temperature=0.0)
    assert out.tokens == free.tokens[: first + 1]
    assert out.finish_reason == "stop"
    assert model.tokenizer is not None
    assert out.text == model.tokenizer.decode(free.tokens[:first])


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(model: LanguageModel) -> None:
    free = model.generate(PROMPT, max_tokens=40, temperature=0.0).text
    stop = free[7:10]
    out = model.generate(PROMPT, max_tokens=40, temperature=0.0, stop=[stop])
    assert out.text == free[: free.index(stop)]
    assert out.finish_reason == "stop"


def test_the_context_limit_ends_the_text(model: LanguageModel) -> None:
    out = model.generate(PROMPT * 12, max_tokens=1000, temperature=0.0)
    assert len(out.tokens) == 512 - 480
    assert out.finish_reason == "length"


def test_streamed_pieces_join_to_the_text(model: LanguageModel) -> None:
    settings: dict[str, Any] = {"max_tokens": 50, "temperature": 1.0, "seed": 11}
    pieces = list(model.stream(PROMPT, **settings))
    assert "".join(pieces) == model.generate(PROMPT, **settings).text
    assert len(pieces) > 1


def test_a_seed_determines_the_text(model: LanguageModel) -> None:
    text = lambda seed: model.generate(PROMPT, max_tokens=20, seed=seed).tokens
    assert text(1) == text(1)
    assert text(1) != text(2)


def test_prompts_are_continued_together_as_if_alone(model: LanguageModel) -> None:
    chat = [{"role": "user", "content": "hi"}]
    prompts: Any = [PROMPT, PROMPT[:7], PROMPT[3:30], "text", chat]
    done: list[tuple[str, int, int]] = []
    progress = lambda *report: done.append(report)
    settings: dict[str, Any] = {"max_tokens": 15, "seed": 5, "top_k": 9}
    together: Any = model.generate(prompts, **settings, progress=progress)
    assert [(out.tokens, out.text) for out in together] == [
        (out.tokens, out.text) for out in (model.generate(p, **settings) for p in prompts)
    ]
    assert done == [("Generating", i, 5) for i in range(6)]
    stop = together[1].text[5:7]
    stopped: Any = model.generate(prompts, **settings, stop=stop)
    for out, free in zip(stopped, together, strict=True):
        assert out.text == free.text.split(stop)[0]
    assert stopped[1].finish_reason == "stop"


def test_windows_of_compressors_need_not_divide_blocks() -> None:
    kinds = models.SLIDING, ("csa", 6), ("hca", 20)
    cfg = models.config(*kinds, vocab_size=VOCAB, max_position_embeddings=512)
    odd = LanguageModel(models.weights(cfg), cfg, HF, jnp.dtype("float32"))
    prompt = (PROMPT * 4)[:131]
    tokens = odd.generate(prompt, max_tokens=30, temperature=0.0).tokens
    logits_TV = odd.logits([prompt + tokens])[0, len(prompt) - 1 : -1]
    assert tokens == logits_TV.argmax(-1).tolist()


def test_drafts_do_not_change_the_text() -> None:
    drafting = language_model(num_nextn_predict_layers=1)
    outputs = [
        drafting.generate(PROMPT, max_tokens=20, seed=1, speculate=k) for k in (None, "mtp:2")
    ]
    assert outputs[0].tokens == outputs[1].tokens


def test_texts_are_scored(model: LanguageModel) -> None:
    texts: Any = [PROMPT * 4, PROMPT[:2], "text"]
    tokenizer = Tokenizer(build_demo_tokenizer(VOCAB))
    scores: Any = model.score(texts)
    for text, score in zip(texts, scores, strict=True):
        tokens = tokenizer.encode(text) if isinstance(text, str) else text
        logits_TV = model.logits([tokens])[0, :-1].astype(np.float64)
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected = logprobs_TV[np.arange(len(tokens) - 1), tokens[1:]]
        assert score.tokens == tokens
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)
    assert model.score(PROMPT).tokens == PROMPT
    with pytest.raises(ValueError, match="nothing to score"):
        model.score([PROMPT, [1]])


def test_a_conversation_is_answered(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    user = {"role": "user", "content": "hi"}
    prompts: list[str] = []
    text = "so</think>It is<|DSML|tool_calls>\n".replace("|DSML|", "\uff5cDSML\uff5c")

    def generate(self: LanguageModel, prompt: str, **settings: Any) -> Generation:
        prompts.append(prompt)
        assert settings == {"max_tokens": 4096, "stop": (), "speculate": None, "temperature": 0.0}
        return Generation(text, [], [], [], "stop", Timings(0.0, 0.0, 0.0))

    monkeypatch.setattr(LanguageModel, "generate", generate)
    answer = model.chat([user], tools=[tool], thinking="high", temperature=0.0)
    system = {"role": "system", "content": "", "tools": [tool]}
    settings: dict[str, Any] = {"thinking_mode": "thinking", "reasoning_effort": "high"}
    assert prompts == [encode_chat([system, user], **settings)]
    assert (answer.reasoning, answer.content, answer.tool_calls) == ("so", "It is", [])
    assert answer.message["reasoning_content"] == "so"
    with pytest.raises(ValueError, match="low"):
        model.chat([user], thinking="low")


def test_one_program_serves_all_lengths_and_settings_of_a_bucket(model: LanguageModel) -> None:
    generate = lambda length, new, temperature: model.generate(
        (PROMPT * 2)[:length],
        max_tokens=new,
        temperature=temperature,
        top_k=length,
        seed=length,
        # Used by no other test, so that the program is new.
        top_logprobs=7,
    )
    with models.programs() as first:
        generate(48, 60, 1.0)
    assert "jit(advance)" in first
    with models.programs() as later:
        for length, new, temperature in ((5, 3, 0.0), (40, 80, 0.5), (63, 60, 1.3)):
            generate(length, new, temperature)
    assert not later


def test_text_is_encoded_and_decoded(model: LanguageModel) -> None:
    tokenizer = Tokenizer(build_demo_tokenizer(VOCAB))
    prompt = "Hello, w\u00f6rld: \u4f60\u597d"
    out = model.generate(prompt, max_tokens=9, temperature=0.0)
    assert len(out.tokens) == 9
    assert (
        out.tokens == model.generate(tokenizer.encode(prompt), max_tokens=9, temperature=0.0).tokens
    )
    assert out.text == tokenizer.decode(out.tokens) != ""
    reverse = model.generate(prompt[::-1], max_tokens=9, temperature=0.0)
    assert reverse.tokens != out.tokens


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([VOCAB], {}, "vocabulary"),
        ([-1], {}, "vocabulary"),
        ([1] * 512, {}, "context"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"stop": [""]}, "stop"),
        ([1], {"top_logprobs": -1}, "top_logprobs"),
    ],
)
def test_bad_arguments_are_named(
    model: LanguageModel, prompt: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **settings)
    if message != "top_logprobs":
        with pytest.raises(ValueError, match=message):
            model.stream(prompt, **settings)


@pytest.mark.parametrize("tokens", [[1, 2], [[]], np.zeros((0, 3), np.int32)])
def test_logits_of_no_tokens_are_rejected(model: LanguageModel, tokens: Any) -> None:
    with pytest.raises(ValueError, match="tokens must be"):
        model.logits(tokens)


def test_tokens_work_without_a_tokenizer(model: LanguageModel) -> None:
    bare = dataclasses.replace(model, tokenizer=None)
    out = bare.generate(PROMPT, max_tokens=4, temperature=0.0)
    assert out.tokens == model.generate(PROMPT, max_tokens=4, temperature=0.0).tokens
    assert out.text == ""
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        bare.generate("text")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        bare.stream(PROMPT)


def damaged(model: LanguageModel, leaf: str, row: int, value: float) -> LanguageModel:
    """The model with one row of a weight replaced."""

    def fill(name: str, _: Any, weight: jax.Array) -> jax.Array:
        return weight.at[row].set(value) if name == leaf else weight

    weights = params.map_leaves(fill, Model(CFG), model.weights)
    return dataclasses.replace(model, weights=weights)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("leaf", "value"),
    [("norm_D", np.nan), ("norm_D", np.inf), ("head_VD", np.nan), ("head_VD", -np.inf)],
)
def test_logits_that_are_not_finite_raise(
    model: LanguageModel, leaf: str, value: float, temperature: float
) -> None:
    broken = damaged(model, leaf, 7, value)
    settings: dict[str, Any] = {"max_tokens": 5, "temperature": temperature, "seed": 0}
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        broken.generate(PROMPT, **settings)
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        list(broken.stream(PROMPT, **settings))
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        broken.logits([PROMPT])


def test_tokens_before_the_first_bad_logits_are_streamed(model: LanguageModel) -> None:
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 0.0}
    tokens = model.generate(PROMPT, **settings).tokens
    at, token = next((i, t) for i, t in enumerate(tokens) if t not in PROMPT)
    broken = damaged(model, "embed_VD", token, np.nan)
    pieces = broken.stream(PROMPT, **settings)
    assert model.tokenizer is not None
    text = model.tokenizer.decode(tokens[: at + 1])
    # The last piece may be part of a character.
    assert text.startswith(next(pieces))
    with pytest.raises(NotFiniteError):
        assert text.startswith("".join(pieces))


def test_a_tokenizer_larger_than_the_vocabulary_is_rejected(tmp_path: Path) -> None:
    import v4jax
    from tests import checkpoints

    cfg = checkpoints.tiny(vocab_size=280)
    checkpoints.write_release(tmp_path, cfg, 0)
    build_demo_tokenizer(VOCAB).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: has 300 tokens"):
        v4jax.load(tmp_path)


def test_tokens_unknown_to_the_tokenizer_have_no_text() -> None:
    tokenizer = Tokenizer(build_demo_tokenizer(VOCAB))
    assert tokenizer.decode([VOCAB + 5]) == ""
