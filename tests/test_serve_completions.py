"""Text completions, the filling in of a middle, models and tokens, through the `openai` client."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tokenizers

from tests import serving
from v4jax.text.chat import BOS
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.serve(lambda _: "") as running:
        yield running


@pytest.fixture
def client(server: serving.Running) -> Iterator[Any]:
    with serving.openai_client(server) as api:
        yield api


def test_text_is_continued_unchanged(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda text: f" after {text}"
    answer = client.completions.create(model="tiny", prompt="Once", max_tokens=50)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (" after Once", "stop")
    assert [*server.engine.requests[-1].tokens] == serving.tokenizer().encode("Once")
    again = client.completions.create(model="tiny", prompt="Once", max_tokens=2, stream=True)
    parts = [chunk.choices[0] for chunk in again]
    assert " after Once".startswith("".join(part.text for part in parts))
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_several_prompts_are_answered_in_order(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda text: text.upper()
    ids = [serving.tokenizer().encode(text) for text in "abcdefghijkl"]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny",
            prompt=ids,
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        texts = [""] * len(ids)
        parts = [*answer] if stream else [answer]
        for choice in (choice for part in parts for choice in part.choices):
            texts[choice.index] += choice.text
        assert texts == [*"ABCDEFGHIJKL"]
        usage = parts[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (12, 24)


def test_echo_with_logprobs_scores_a_prompt(server: serving.Running, client: Any) -> None:
    """What lm-eval's `local-completions` asks and reads."""
    server.engine.script = lambda _: " more"
    prompt = serving.tokenizer().encode("two \u20ac")
    fields: dict[str, Any] = {"prompt": [prompt], "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = client.completions.create(model="tiny", **fields).choices[0]
    logprobs = answer.logprobs
    assert answer.text.startswith("two \u20ac")
    assert len(logprobs.tokens) == len(prompt) + 1
    assert logprobs.token_logprobs == [None] + [-0.5] * len(prompt)
    assert logprobs.top_logprobs[0] is None
    for token, top in zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], strict=True):
        assert token == max(top, key=top.get)
    # The parts of a character that several tokens make up are told apart.
    assert len({*logprobs.tokens}) == len(logprobs.tokens)
    assert server.engine.requests[-1].prompt_logprobs
    scored = client.completions.create(model="tiny", **(fields | {"max_tokens": 0})).choices[0]
    assert (scored.text, len(scored.logprobs.tokens)) == ("two \u20ac", len(prompt))


def test_stop_strings_end_the_text(server: serving.Running, client: Any) -> None:
    server.engine.script = lambda _: "one\ntwo"
    fields = {"model": "tiny", "prompt": "a", "stop": "\n", "max_tokens": 50}
    assert client.completions.create(**fields).choices[0].text == "one"
    streamed = client.completions.create(stream=True, **fields)
    assert "".join(part.choices[0].text for part in streamed) == "one"


def test_a_middle_is_filled_in(server: serving.Running, client: Any) -> None:
    begin, hole, end = (f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end"))
    fields: dict[str, Any] = {"model": "tiny", "prompt": "def f", "suffix": "return"}
    with pytest.raises(openai.BadRequestError, match="no tokens"):
        client.completions.create(**fields)
    inner = build_demo_tokenizer(1024)
    marks = [tokenizers.AddedToken(m, normalized=False, special=True) for m in (begin, hole, end)]
    inner.add_special_tokens(marks)
    tokenizer = server.service.tokenizer
    server.service.tokenizer, server.service.vocab_size = Tokenizer(inner), 2000
    try:
        beta = client.with_options(base_url=f"{server.url}/beta")
        server.engine.script = lambda _: []
        beta.completions.create(**fields)
        asked = Tokenizer(inner).decode([*server.engine.requests[-1].tokens])
        assert asked == f"{BOS}{begin}def f{hole}return{end}"
    finally:
        server.service.tokenizer, server.service.vocab_size = tokenizer, tokenizer.vocab_size


def test_models_are_listed(server: serving.Running, client: Any) -> None:
    server.service.adapters = ("pirate",)
    assert [model.id for model in client.models.list()] == ["tiny", "pirate"]
    assert client.models.retrieve("pirate").owned_by == "deepseek"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("other")
    client.completions.create(model="pirate", prompt="a")
    assert server.engine.requests[-1].adapter == "pirate"
    server.service.adapters = ()
    with pytest.raises(openai.NotFoundError, match=r"pirate.*use one of tiny"):
        client.completions.create(model="pirate", prompt="a")


def test_texts_become_tokens_and_back(server: serving.Running, client: Any) -> None:
    ask = lambda path, **body: httpx.post(server.url + path, json=body).json()
    tokens = ask("/tokenize", prompt="Hello \u20ac")["tokens"]
    assert tokens == serving.tokenizer().encode("Hello \u20ac")
    assert ask("/detokenize", tokens=tokens) == {"prompt": "Hello \u20ac"}
    messages = [{"role": "user", "content": "Hi"}]
    client.chat.completions.create(model="tiny", messages=messages)
    chat = ask("/tokenize", messages=messages)
    assert chat["tokens"] == [*server.engine.requests[-1].tokens]
    assert (chat["count"], chat["max_model_len"]) == (len(chat["tokens"]), serving.CONTEXT)


def test_the_chosen_experts_are_reported(server: serving.Running, client: Any) -> None:
    asked = {"extra_body": {"return_routed_experts": True}}
    whole = client.completions.create(model="tiny", prompt="A", max_tokens=3, **asked)
    read = whole.usage.total_tokens - 1
    encoded = whole.choices[0].routed_experts
    expert_TLA = np.load(io.BytesIO(base64.b64decode(encoded)))
    assert expert_TLA.dtype == np.int16
    np.testing.assert_array_equal(expert_TLA, np.arange(read * 6).reshape(read, 2, 3))
    stream = client.completions.create(model="tiny", prompt="A", max_tokens=3, stream=True, **asked)
    *before, last = [chunk.choices[0] for chunk in stream]
    assert last.routed_experts == encoded
    assert not any(hasattr(choice, "routed_experts") for choice in before)
    messages = [{"role": "user", "content": "A"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, **asked)
    assert chat.choices[0].routed_experts
    for choice in client.completions.create(model="tiny", prompt="A").choices:
        assert not hasattr(choice, "routed_experts")
