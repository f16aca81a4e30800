"""Public calls accept what they document and reject everything else in one clear sentence."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import v4jax
from tests.doors import USER, VOCAB, small_model, stub
from v4jax.arguments import ArgumentError
from v4jax.decoding.sampling import SamplingParams
from v4jax.language_model import LanguageModel
from v4jax.model import sharding


@pytest.fixture(autouse=True)
def no_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for users: annotations are checked only in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return small_model()


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return stub(monkeypatch)


# Rejected arguments and their messages


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (USER, {}, "prompt is a dictionary; pass the messages of a chat as a list"),
        ([{"role": "nobody"}], {}, "nobody"),
        ([[["a"]]], {}, "prompt"),
        ([USER, 1], {}, "message"),
        (b"hello", {}, "prompt is b'hello'; it must be text or a list of token ids"),
        ([1.5], {}, r"prompt\[0\] is 1.5; token ids are integers"),
        ([1, True], {}, r"prompt\[1\] is True; token ids are integers"),
        (np.array([True]), {}, r"prompt\[0\] is True"),
        (np.array([1.0]), {}, r"prompt\[0\] is 1.0"),
        (None, {}, "prompt is None; it must be text"),
        ({1, 2}, {}, r"prompt is \{1, 2\}; it must be text"),
        ([10**5000], {}, "Token a very large number at position 0 is outside the vocabulary"),
        ("a", {"max_new_tokens": 5}, "no argument 'max_new_tokens'; did you mean 'max_tokens'?"),
        ("a", {"temprature": 5}, "no argument 'temprature'; did you mean 'temperature'?"),
        ("a", {"num_beams": 5}, "no argument 'num_beams'; it takes prompt, max_tokens, stop,"),
        ("a", {"max_tokens": None}, "max_tokens is None; it must be an integer of 1 or more"),
        ("a", {"max_tokens": 5.0}, r"max_tokens is 5\.0; it must be an integer"),
        ("a", {"max_tokens": True}, "max_tokens is True"),
        ("a", {"stop": None}, "stop is None; it must be a string or a list of strings"),
        ("a", {"stop": [1]}, r"stop is \[1\]; it must be"),
        ("a", {"stop": b"x"}, "stop is b'x'; it must be"),
        ("a", {"stop": ["x"] * 17}, "17 stop strings; at most 16"),
        ("a", {"temperature": "hot"}, "temperature is 'hot'; it must be a finite number"),
        (
            "a",
            {"top_p": np.ones(3)},
            r"top_p is an array of shape \(3,\) and dtype float64; it must be",
        ),
        ("a", {"seed": 10**5000}, "seed is a very large number; it must be None or an integer"),
    ],
)
def test_bad_prompts_and_settings_are_rejected(
    model: Any, passed: Any, prompt: Any, settings: Any, message: str
) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=message):
            call(prompt, **settings)
    assert not passed


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", 1], r"prompt\[1\] is 1; it must be text"),
        ([[1], "a", [2.5]], r"prompt\[2\]\[0\] is 2.5; token ids are integers"),
        ([[1], ["a"]], r"prompt\[1\] is a list of texts; pass one text per call"),
        ([[1], [[2]]], r"prompt\[1\] has rows of token ids; pass one row per call"),
        ([[1], []], "The prompt is empty"),
        (["a", [VOCAB]], "outside the vocabulary"),
        (["a", [1] * 64], "The prompt has 64 tokens"),
    ],
)
def test_bad_prompts_among_several_are_rejected(
    model: Any, passed: Any, prompts: Any, message: str
) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=message if call == model.generate else "prompt"):
            call(prompts)
    assert not passed


def test_several_prompts_are_accepted_in_every_form(model: Any, passed: Any) -> None:
    for prompts in (["a", "b"], np.array(["a", "b"]), [[1], [2, 3]], jnp.ones((2, 3), jnp.int32)):
        assert len(model.generate(prompts)) == 2
    assert len(model.generate([[USER], [USER, USER], "a", [1]])) == 4
    assert model.generate([USER]).text == ""
    assert passed["prompt"] == model.tokenizer.encode(v4jax.encode_chat([USER]))


def test_bad_top_logprobs_are_rejected(model: Any, passed: Any) -> None:
    for value, message in (
        ("3", "top_logprobs is '3'; it must be an integer of 0 or more"),
        (None, "top_logprobs is None"),
        (VOCAB + 1, "top_logprobs is 301; it must be 0 to the vocabulary's size"),
        (10**5000, "top_logprobs is a very large number"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate("a", top_logprobs=value)
    with pytest.raises(ArgumentError, match="stream has no argument 'top_logprobs'; it takes"):
        model.stream("a", top_logprobs=3)
    assert not passed


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [[1, 2, 3], [4, 5]],
            "tokens must be .*; row 0 has 3 and row 1 has 2: pass rows of equal len",
        ),
        ([[1], []], "row 0 has 1 and row 1 has 0"),
        ([1, 2], r"tokens must be non-empty token ids \[batch, length\]; got \[1, 2\]"),
        (
            np.ones((0, 3), int),
            r"tokens must be .*; got an array of shape \(0, 3\) and dtype int64",
        ),
        ("text", "tokens must be .*; got 'text'"),
        (["text"], r"tokens must be .*; got \['text'\]"),
        ([[1, 2.5]], r"tokens\[0\]\[1\] is 2.5; token ids are integers"),
        (np.ones((1, 2)), r"tokens\[0\]\[0\] is 1.0"),
        (jnp.ones((2, 2), bool), r"tokens\[0\]\[0\] is True"),
        ([[[1]]], r"tokens\[0\] has rows of token ids"),
        ([[1], [VOCAB]], f"Token {VOCAB} at position 0 is outside the vocabulary"),
    ],
)
def test_bad_tokens_are_rejected(model: Any, tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.logits(tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": 5}, "path is 5; it must be a path"),
        ({"path": ""}, "path is ''; it must be"),
        ({"path": None}, "path is None"),
        ({"path": b"tiny"}, "path is b'tiny'"),
        (
            {"mesh": "cpu"},
            "mesh is 'cpu'; it must be None or a mesh from v4jax.model.sharding.make_mesh",
        ),
        (
            {"mesh": jax.sharding.Mesh(np.array(jax.devices()), ("x",))},
            "mesh is an object of type M",
        ),
        ({"mesh": 4}, "mesh is 4"),
        ({"keep_quantised": "no"}, "keep_quantised is 'no'; it must be True or False"),
        ({"keep_quantised": 1}, "keep_quantised is 1"),
        ({"keep_quantised": None}, "keep_quantised is None"),
        ({"dtype": "float16"}, "dtype is 'float16'; use one of bfloat16, float32"),
        ({"dtype": jnp.float16}, "dtype is .*float16'>; use one of"),
        ({"dtype": float}, "dtype is <class 'float'>; use one of"),
        ({"dtype": np.ones(2, np.float32)}, r"dtype is an array of shape \(2,\) and dtype float32"),
        ({"numerics": "exact"}, "numerics is 'exact'; use one of official, hf"),
        ({"numerics": ["hf"]}, "numerics is .*; use one of"),
        ({"adapter": 5}, "adapter is 5; it must be None or a path"),
        ({"progress": True}, "progress is True; it must be None or a function"),
        ({"device": "cpu"}, "load has no argument 'device'; it takes path, dtype, numerics"),
        ({"torch_dtype": "bfloat16"}, "no argument 'torch_dtype'; did you mean 'dtype'"),
    ],
)
def test_bad_load_arguments_are_rejected(passed: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        v4jax.load(**{"path": "tiny"} | settings)
    assert not passed


def test_malformed_calls_are_rejected(model: Any) -> None:
    load, make_mesh, params = (
        cast(Any, x) for x in (v4jax.load, sharding.make_mesh, SamplingParams)
    )
    for call, message in (
        (lambda: load(), "load: missing a required argument: 'path'; it takes path, dtype"),
        (lambda: load("tiny", "float32"), "load: too many positional arguments; it takes path"),
        (lambda: model.generate(), "generate: missing a required argument: 'prompt'"),
        (
            lambda: model.generate("a", prompt="b"),
            "generate: multiple values for argument 'prompt'",
        ),
        (lambda: params(0.5), "SamplingParams: too many positional arguments"),
        (lambda: make_mesh(model=8), "make_mesh has no argument 'model'; it takes data, fsdp"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([], {}, r"messages is \[\]; it must be a list of one or more messages"),
        ((), {}, r"messages is \(\); it must be"),
        ("hi", {}, "messages is 'hi'; it must be a list of one or more messages"),
        (USER, {}, "messages is {'content': 'hi', 'role': 'user'}; it must be a list"),
        (None, {}, "messages is None"),
        (["hi"], {}, r"messages\[0\] is str; a message is an object"),
        (
            [{"role": np.ones(3)}],
            {},
            r"messages\[0\].role is an array of shape \(3,\) and dtype float64",
        ),
        ([USER | {"task": ["title"]}], {}, r"messages\[0\].task is \['title'\]; leave it out"),
        ([USER], {"thinking_mode": True}, "thinking_mode is True; use one of chat, thinking"),
        ([USER], {"thinking_mode": ["chat"]}, "thinking_mode is .*; use one of"),
        (
            [USER],
            {"reasoning_effort": ["high"]},
            "reasoning_effort is .*; it must be None or a string",
        ),
        ([USER], {"reasoning_effort": 3}, "reasoning_effort is 3; it must be None or a string"),
        ([USER], {"reasoning_effort": "low"}, "reasoning_effort is 'low'; revision april has None"),
        ([USER], {"revision": {}}, "revision is {}; use one of april, 0731"),
        ([USER], {"drop_thinking": "no"}, "drop_thinking is 'no'; it must be True or False"),
        ([USER], {"add_bos": None}, "add_bos is None; it must be True or False"),
        ([USER], {"context": USER}, "context is .*; it must be a list of messages"),
        ([USER], {"add_generation_prompt": True}, "no argument 'add_generation_prompt'; it takes"),
        ([USER], {"thinking": True}, "no argument 'thinking'; did you mean 'thinking_mode'"),
    ],
)
def test_bad_chat_arguments_are_rejected(messages: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        v4jax.encode_chat(messages, **settings)


# Accepted arguments


FIVES = [5, np.int8(5), np.uint64(5), np.array(5), jnp.int32(5)]


@pytest.mark.parametrize("five", FIVES, ids=lambda five: type(five).__name__)
def test_integers_of_any_library_are_accepted(model: Any, passed: Any, five: Any) -> None:
    model.generate([five], max_tokens=five, top_logprobs=five, top_k=five, seed=five)
    assert passed["prompt"] == [5]
    numbers = [passed["max_tokens"], passed["top_logprobs"], passed["params"].seed]
    assert numbers == [5, 5, 5]
    assert {type(value) for value in (*numbers, *passed["prompt"], passed["params"].top_k)} == {int}
    assert model.tokenizer.decode([five]) == model.tokenizer.decode([5])
    assert model.tokenizer.token_bytes(five) == model.tokenizer.token_bytes(5)


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5)], ids=repr)
def test_floats_of_any_library_are_accepted(half: Any) -> None:
    params = SamplingParams(temperature=half, top_p=half)
    assert params == SamplingParams(temperature=0.5, top_p=0.5)
    assert type(params.top_p) is float


@pytest.mark.parametrize(
    "tokens",
    [(1, 2), range(1, 3), np.array([1, 2], np.uint8), jnp.array([1, 2]), list(jnp.array([1, 2]))],
    ids=lambda tokens: type(tokens).__name__,
)
def test_token_ids_of_any_library_are_accepted(model: Any, passed: Any, tokens: Any) -> None:
    model.generate(tokens)
    assert passed["prompt"] == [1, 2]
    assert model.tokenizer.decode(tokens) == model.tokenizer.decode([1, 2])
    np.testing.assert_array_equal(model.logits([tokens]), model.logits([[1, 2]]))
    np.testing.assert_array_equal(model.logits(np.array([[1, 2]])), model.logits([[1, 2]]))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), jnp.zeros(1, jnp.bfloat16).dtype]
)
def test_dtypes_of_any_library_are_accepted(passed: Any, dtype: Any) -> None:
    v4jax.load("tiny", dtype=dtype)
    assert passed["dtype"] == "bfloat16"
    v4jax.load("tiny", dtype=np.float32, keep_quantised=cast(Any, np.bool_(True)))
    assert passed["dtype"] == "float32"
    assert passed["keep_quantised"] is True


def test_the_former_name_of_an_argument_is_read_with_a_warning(passed: Any) -> None:
    load = cast(Any, v4jax.load)
    with pytest.warns(FutureWarning, match="load: the argument keep is now called keep_quantised"):
        load("tiny", keep=True)
    assert passed["keep_quantised"] is True
    with pytest.raises(ValueError, match="load got keep_quantised and keep, its old name"):
        load("tiny", keep=True, keep_quantised=True)


def test_every_form_of_paths_and_stop_strings_is_accepted(model: Any, passed: Any) -> None:
    for path in ("tiny", Path("tiny")):
        v4jax.load(path, adapter=path)
        assert passed["path"] == passed["adapter"] == path
    for stop in ("END", ["END"], ("END",), np.array(["END"])):
        model.generate("a", stop=stop)
        assert passed["stop"].push("to the END") == ("to the ", True)
    model.generate("a", stop=[])
    assert passed["stop"].push("to the END") == ("to the END", False)


def test_stop_strings_need_a_tokenizer(model: Any) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json, so there is no text to stop"):
        dataclasses.replace(model, tokenizer=None).generate([1], stop="x")


def test_signatures_stay_readable() -> None:
    for call in (v4jax.load, LanguageModel.generate, v4jax.encode_chat, SamplingParams):
        parameters = inspect.signature(call).parameters
        assert "args" not in parameters
        assert call.__doc__
    assert inspect.signature(LanguageModel.generate).parameters["max_tokens"].default == 256
