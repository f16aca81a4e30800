"""Any value for any argument of any public call works as documented or is rejected."""

import traceback
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import v4jax
from tests.doors import CFG, USER, small_model, stub
from v4jax import facts, presets
from v4jax.adapters import merge, updates
from v4jax.arguments import ArgumentError
from v4jax.checkpoints import convert, export, random_release
from v4jax.commands import inspect as inspection
from v4jax.decoding.sampling import SamplingParams
from v4jax.language_model import LanguageModel
from v4jax.model import sharding
from v4jax.text.chat_parser import ChatParser
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.stopping import StopStrings
from v4jax.text.tokenizer import StreamDecoder, Tokenizer

PACKAGE = Path(v4jax.__file__).parent
VALUES: dict[str, Any] = {
    "None": None,
    "5": 5,
    "-1": -1,
    "1.5": 1.5,
    "nan": float("nan"),
    "huge": 10**5000,
    "True": True,
    "bytes": b"x",
    "text": "x",
    "no text": "",
    "long text": "x" * 5000,
    "list": [],
    "lists": [[]],
    "ragged": [[1, 2], [1]],
    "texts": ["x", "y"],
    "bools": [True],
    "messages": [USER],
    "dict": {},
    "set": {1},
    "floats": np.array([1.5]),
    "ints": np.array([[1, 2], [3, 4]]),
    "empty": np.zeros((0, 3), int),
    "device": jnp.ones(3),
    "object": object(),
    "iterator": iter(()),
    "function": len,
    "class": np.float32,
}
TEXT = {"text", "no text", "long text"}
PATHS = {"text"}
SAMPLING = {
    "temperature": {"5", "1.5"},
    "top_k": {"5", "huge"},
    "top_p": set(),
    "min_p": set(),
    "repetition_penalty": {"5", "1.5"},
    "presence_penalty": {"-1", "1.5"},
    "frequency_penalty": {"-1", "1.5"},
    "seed": {"None", "5", "-1"},
}
ANSWER = {
    "max_tokens": {"5", "huge"},
    "stop": {"text", "long text", "list", "texts", "empty"},
    "speculate": {"None"},
} | SAMPLING
CHAT = {
    "messages": {"messages"},
    "thinking_mode": set(),
    "reasoning_effort": {"None"},
    "drop_thinking": {"True"},
    "revision": set(),
    "context": {"list", "messages", "empty"},
    "add_bos": {"True"},
}
LOAD = {
    "path": PATHS,
    "dtype": {"class"},
    "numerics": set(),
    "keep_quantised": {"True"},
    "adapter": {"None", *PATHS},
    "mesh": {"None"},
    "progress": {"None", "function", "class"},
}
CHECKPOINT = {"directory": PATHS, "cfg": set(), "seed": {"5", "huge"}, "tokenizer": {"None"}}
# The source does not exist, so calls with valid arguments fail with that.
FILES = {"source": "absent", "target": "new"}


def rejects_all(*arguments: str) -> dict[str, set[str]]:
    return {argument: set() for argument in arguments}


# The call, valid arguments, and for each tested argument the values that it accepts.
Call = tuple[Any, dict[str, Any], dict[str, set[str]]]


def calls(model: LanguageModel) -> dict[str, Call]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    cfg = {"cfg": CFG}
    checkpoint = {"directory": "x", "cfg": CFG, "seed": 0}
    return {
        "load": (v4jax.load, {"path": "tiny"}, LOAD),
        "generate": (
            model.generate,
            {"prompt": [1]},
            ANSWER
            | {"prompt": {"text", "texts", "messages", "ints", "ragged"}, "top_logprobs": {"5"}},
        ),
        "stream": (model.stream, {"prompt": [1]}, ANSWER | {"prompt": {"text", "messages"}}),
        "logits": (model.logits, {}, {"tokens": {"ints"}}),
        "with_adapter": (model.with_adapter, {}, {"path": {"None"}}),
        "LanguageModel": (
            LanguageModel,
            {name: getattr(model, name) for name in ("weights", "config", "numerics", "dtype")},
            {"tokenizer": {"None"}, "dtype": {"class"}}
            | rejects_all("weights", "config", "numerics"),
        ),
        "chat": (model.chat, {"messages": [USER]}, ANSWER | {"messages": {"messages"}}),
        "score": (model.score, {"text": [1, 2]}, {"text": {"messages", "ints"}}),
        "encode_chat": (v4jax.encode_chat, {"messages": [USER]}, CHAT),
        "parse_chat": (v4jax.parse_chat, {"text": ""}, {"text": TEXT, "thinking_mode": set()}),
        "ChatParser": (ChatParser, {}, {"thinking_mode": set()}),
        "feed": (ChatParser().feed, {}, {"text": TEXT}),
        "SamplingParams": (SamplingParams, {}, SAMPLING),
        "StopStrings": (StopStrings, {}, {"stops": {"list", "texts", "empty"}}),
        "Tokenizer": (Tokenizer, {}, {"inner": set()}),
        "Tokenizer.load": (Tokenizer.load, {}, {"path": set()}),
        "encode": (tokenizer.encode, {}, {"text": TEXT}),
        "decode": (tokenizer.decode, {}, {"ids": {"list", "empty"}}),
        "token_id": (tokenizer.token_id, {}, {"token": TEXT}),
        "token_bytes": (tokenizer.token_bytes, {}, {"token_id": {"5"}}),
        "StreamDecoder": (StreamDecoder, {}, {"tokenizer": set()}),
        "demo tokenizer": (build_demo_tokenizer, {}, {"vocab_size": set()}),
        "make_checkpoint": (random_release.make_checkpoint, checkpoint, CHECKPOINT),
        "convert": (convert.convert, FILES, rejects_all("source", "target", "weights", "progress")),
        "export": (export.export, FILES, rejects_all("source", "target", "progress")),
        "merge": (
            merge.merge,
            FILES | {"update": "absent", "weights": "keep"},
            rejects_all("source", "update", "target", "weights", "best", "progress"),
        ),
        "export_adapter": (
            updates.export_adapter,
            {"run": "absent", "target": "new"},
            rejects_all("run", "target", "model", "best"),
        ),
        "presets.get": (presets.get, {}, {"name": set()}),
        "presets.get_json": (presets.get_json, {}, {"name": set()}),
        "make_mesh": (sharding.make_mesh, {}, rejects_all(*sharding.AXES, "devices")),
        "report": (facts.report, {}, {"cfg": set()}),
        "devices": (facts.devices, {}, {"nbytes": {"5"}}),
        "release_bytes": (facts.release_bytes, {}, {"cfg": set()}),
        "cache_bytes": (facts.cache_bytes, {}, {"cfg": set()}),
        "find": (inspection.find, {}, {"name": set()}),
        "config_of": (inspection.config_of, {}, {"name": set()}),
        "show": (inspection.show, cfg, {"cfg": set(), "what": TEXT}),
    }


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return small_model()


@pytest.fixture
def nothing_runs(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch)
    # As for users: annotations are checked only in tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.chdir(tmp_path)


def error_of(call: Any) -> ValueError | None:
    try:
        call()
    except ValueError as error:
        return error
    return None


def fault(argument: str, accepts: bool, error: ValueError | None) -> str:
    """What is wrong with an outcome, if anything.

    An error must be raised by the package, name the argument and end with a full stop.
    """
    if error is None or accepts:
        return "" if accepts == (error is None) else f"should be accepted: {accepts}; {error}"
    message, where = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
    places = ("The prompt", "Token", "No preset", "x", "absent", str(Path("absent").absolute()))
    named = argument in message or message.startswith(places)
    ours = Path(where).is_relative_to(PACKAGE)
    return "" if named and ours and message.endswith(".") else f"{error!r} in {where}"


@pytest.mark.usefixtures("nothing_runs")
def test_every_value_works_or_is_rejected_by_name(model: LanguageModel) -> None:
    faults = [
        f"{name}({argument}={label}): {problem}"
        for name, (call, valid, arguments) in calls(model).items()
        for argument, accepted in arguments.items()
        for label, value in VALUES.items()
        for error in [error_of(lambda: call(**valid | {argument: value}))]  # noqa: B023
        if (problem := fault(argument, label in accepted, error))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.usefixtures("nothing_runs")
def test_an_unknown_argument_is_rejected_with_the_known_ones(model: LanguageModel) -> None:
    for call, valid, arguments in calls(model).values():
        with pytest.raises(ArgumentError, match="has no argument 'zzz'; it takes") as caught:
            call(**valid, zzz=1)
        assert all(argument in str(caught.value) for argument in arguments)
