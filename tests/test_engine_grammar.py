"""Grammars: whatever tokens a mask lets through, the answer parses and satisfies its schema."""

import datetime
import ipaddress
import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_chat_parser import CLOSE, OPEN, invoke, parameter
from v4jax.engine.grammar import JSON_OBJECT, Grammars
from v4jax.engine.request import Constraint
from v4jax.text.chat import DSML, END_THINK, EOS, SPECIAL_TOKENS, THINK, encode_chat
from v4jax.text.chat_parser import parse_chat
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import Tokenizer, byte_chars

CLOSE_VALUE = f"</{DSML}parameter>"
# Pieces of text that come near the marks, and ends of strings, objects and numbers.
PIECES = ["<", "</", DSML, "parameter", CLOSE_VALUE, EOS, END_THINK, f"<{DSML}"]
PIECES += ['"', "\\", "}", "]", "9"]
EXTRA = 70  # logits without a token
EOS_ID = 1
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["C", "<F>", ""]},
            "days": {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^next/[0-9]$"}]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
            "any": {},
        },
        "required": ["city", "tags"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": ["string", "number", "null"]}},
    },
}
STRICT = {**WEATHER, "strict": True}
SIMPLE = {"name": "simple", "parameters": {"properties": {"a": {}, "b c": {}}}}
EMPTY = {"name": "empty"}


def split_tokenizer() -> Tokenizer:
    """One whose vocabulary lacks the marks, and whose tokens cross their borders."""
    special = [token for token in SPECIAL_TOKENS if token not in (DSML, THINK, END_THINK)]
    crossing = ["think>\n", '": "', '"}', "1</", "\uff5c", "\\n", '">x', '">{"', '" string="']
    crossing += [f"<{DSML}", f"{DSML}tool", f"<{DSML}tool_calls>\n", f'"</{DSML}']
    crossing += [CLOSE_VALUE, f"a{CLOSE_VALUE}\n"]
    chars = byte_chars()
    words = ["".join(chars[byte] for byte in text.encode()) for text in crossing]
    vocab = {token: i for i, token in enumerate([*special, *chars, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    return Tokenizer(inner)


TOKENIZERS = {"marks": Tokenizer(build_demo_tokenizer(512)), "split": split_tokenizer()}
GRAMMARS = {
    kind: Grammars(tokenizer, tokenizer.vocab_size + EXTRA, [EOS_ID])
    for kind, tokenizer in TOKENIZERS.items()
}


@pytest.fixture(params=TOKENIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def ids(mask: np.ndarray | None) -> list[int]:
    """The tokens of a mask."""
    assert mask is not None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def start(
    kind: str, *, thinking: bool = False, budget: int | None = None, **asked: Any
) -> Constraint:
    """A new constraint of what is asked."""
    return GRAMMARS[kind].compile(**asked).constraint(thinking=thinking, budget=budget)


def follow(kind: str, constraint: Constraint, text: str) -> str:
    """Push a text's tokens while they are allowed; the rest of the text."""
    tokens = TOKENIZERS[kind].encode(text)
    for i, token in enumerate(tokens):
        mask = constraint.mask()
        if mask is not None and not mask[token // 32] >> token % 32 & 1:
            return TOKENIZERS[kind].decode(tokens[i:])
        constraint.push(token)
    return ""


class Walk:
    """Random answers: some tokens of any kind and near the marks, then ones that lead to an end."""

    def __init__(self, kind: str, seed: int, free: int = 40):
        tokenizer = TOKENIZERS[kind]
        self.rng, self.free = np.random.default_rng(seed), free
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.pieces = {token for piece in PIECES for token in tokenizer.encode(piece)}

    def __call__(self, constraint: Constraint) -> str:
        """The text of an answer, to its end."""
        text = b""
        for step in range(2000):
            mask = constraint.mask()
            assert mask is not None
            allowed = {*ids(mask)}
            ending = step > self.free
            if EOS_ID in allowed and (ending or len(allowed) == 1):
                constraint.push(EOS_ID)
                return text.decode()
            allowed -= {EOS_ID}
            likely = allowed & (self.ends(text) if ending else self.pieces)
            pool = likely if likely and self.rng.random() < (0.9 if ending else 0.5) else allowed
            token = sorted(pool)[self.rng.integers(len(pool))]
            constraint.push(token)
            text += self.tokens[token]
        raise AssertionError(f"There is no end: {text.decode(errors='replace')}")

    def ends(self, text: bytes) -> set[int]:
        """Tokens that go on with a closing tag, or close a string, object or list."""
        close = CLOSE_VALUE.encode()
        begun = max(i for i in range(len(close)) if text.endswith(close[:i]))
        rest = close[begun:]
        wanted = [rest[:size] for size in range(1, len(rest) + 1)]
        wanted += [] if begun else [b'"', b"}", b"]"]
        return {self.ids[token] for token in wanted if token in self.ids}


def calls(text: str, mode: str = "chat") -> list[tuple[str, Any]]:
    """The names and arguments of an answer that is calls only, all of them complete."""
    message = parse_chat(text, mode)
    assert message["content"] == ""
    assert not any(call.get("incomplete") for call in message["tool_calls"])
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


@pytest.mark.parametrize("seed", range(10))
def test_calls_are_complete_and_valid_whatever_the_tokens(kind: str, seed: int) -> None:
    tools = [STRICT, SIMPLE, EMPTY] if seed % 2 else [STRICT]
    constraint = start(kind, tools=tools, tool_choice="required")
    called = calls(Walk(kind, seed)(constraint))
    assert called
    for name, arguments in called:
        assert name in [tool["name"] for tool in tools]
        if name == "get_weather":
            jsonschema.validate(arguments, STRICT["parameters"])
    assert ids(constraint.mask()) == [EOS_ID]


def test_a_named_function_is_called_once(kind: str) -> None:
    asked = {"tools": [EMPTY, STRICT, SIMPLE], "tool_choice": {"name": "get_weather"}}
    for seed in range(3):
        text = Walk(kind, seed, free=5)(start(kind, **asked))
        assert [name for name, _ in calls(text)] == ["get_weather"]
    assert follow(kind, start(kind, **asked), OPEN + invoke("empty", "")) != ""


@pytest.mark.parametrize(
    ("tool", "parameters", "refused"),
    [
        (STRICT, [parameter("tags", "[]", False), parameter("city", "Bonn")], ""),
        (STRICT, [parameter("city", 'a </b> "" </' + DSML), parameter("tags", "[1]", False)], ""),
        (STRICT, [parameter("city", "")], f"/{DSML}invoke>"),  # tags are required
        (STRICT, [parameter("city", "a"), parameter("city", "b")], 'city"'),
        (STRICT, [parameter("town", "a")], "own"),
        (STRICT, [parameter("city", "1", False)], "false"),
        (STRICT, [parameter("unit", "K")], "K"),
        (STRICT, [parameter("days", "next/x")], "x"),
        (STRICT, [parameter("days", "1.5", False)], ".5"),
        (STRICT, [parameter("tags", "[true]", False)], "true"),
        (STRICT, [parameter("tags", f'["{CLOSE_VALUE}"]', False)], 'r>"]'),
        (STRICT, [parameter("tags", "[1e999]", False)], "9]"),
        (STRICT, [parameter("any", f"a{EOS[:5]}{EOS[5:]}")], EOS),
        (SIMPLE, [parameter("other", "[1, {}]", False), parameter("b c", "x")], ""),
        (SIMPLE, [parameter("a", "x"), parameter("a", "x")], '" string'),
        (SIMPLE, [parameter("a", "NaN", False)], "NaN"),
    ],
)
def test_which_calls_are_refused_and_where(
    tool: dict[str, Any], parameters: list[str], refused: str
) -> None:
    constraint = start("marks", tools=[tool], tool_choice="required")
    rest = follow("marks", constraint, OPEN + invoke(tool["name"], *parameters) + CLOSE)
    assert rest.startswith(refused)
    assert bool(rest) == bool(refused)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(-1e99, 1e99)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b c", "\u65e5"]), VALUES)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_whatever_the_encoder_writes_is_accepted(arguments: list[dict[str, Any]]) -> None:
    written = [{"function": {"name": "simple", "arguments": a}} for a in arguments]
    messages = [{"role": "user"}, {"role": "assistant", "tool_calls": written, "wo_eos": True}]
    text = encode_chat(messages).partition(END_THINK)[2]
    constraint = start("marks", tools=[SIMPLE])
    assert follow("marks", constraint, text) == ""
    assert ids(constraint.mask()) == [EOS_ID]
    assert calls(text) == [("simple", a) for a in arguments]


def as_object(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has exactly these properties."""
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {**schema, "additionalProperties": False}


# Schemas of the strict subset.
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            *({"type": kind} for kind in ("string", "number", "integer", "boolean", "null")),
            *({}, JSON_OBJECT, {"enum": ["a", 'q"<', 3, None]}),
            {"type": "string", "pattern": r"^[a-c]{1,4}\d?$"},
            {"type": ["string", "null"], "maxLength": 3},
            {"type": "integer", "minimum": -5, "maximum": 12},
        ]
    ),
    lambda inner: (
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner)
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
        | st.dictionaries(st.sampled_from(["a", "b", "c d"]), inner, max_size=3).map(as_object)
    ),
    max_leaves=5,
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SCHEMAS, st.sampled_from([*TOKENIZERS]), st.integers(0, 2**32))
def test_json_satisfies_its_schema_whatever_the_tokens(
    schema: dict[str, Any], kind: str, seed: int
) -> None:
    walk = Walk(kind, seed, free=15)
    text = walk(start(kind, schema=schema))
    assert parse_chat(text)["content"] == text
    jsonschema.validate(json.loads(text), schema)

    tool = {"name": "f", "parameters": as_object({"x": schema}), "strict": True}
    ((_, arguments),) = calls(walk(start(kind, tools=[tool], tool_choice={"name": "f"})))
    jsonschema.validate(arguments, tool["parameters"])


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("date", datetime.date.fromisoformat),
        ("date-time", lambda text: datetime.datetime.fromisoformat(text.upper())),
        ("ipv4", ipaddress.IPv4Address),
        ("ipv6", ipaddress.IPv6Address),
        ("uuid", uuid.UUID),
        ("email", re.compile(r"\S+@[\w-]+(\.[\w-]+)+").fullmatch),
        ("hostname", re.compile(r"[\w-]+(\.[\w-]+)*").fullmatch),
    ],
)
def test_text_has_the_declared_format(name: str, check: Callable[[str], Any]) -> None:
    schema = as_object({"x": {"type": "string", "format": name}})
    tool = {"name": "f", "parameters": schema, "strict": True}
    for seed in range(3):
        text = Walk("marks", seed)(start("marks", tools=[tool], tool_choice={"name": "f"}))
        ((_, arguments),) = calls(text)
        assert check(arguments["x"]) is not None


def test_thinking_and_prose_are_free_until_a_call_begins(kind: str) -> None:
    for thinking, prose in [(False, "A < b, {"), (True, "Hm <b>"), (True, f"Hm{END_THINK}So:")]:
        constraint = start(kind, thinking=thinking, tools=[STRICT])
        assert follow(kind, constraint, prose) == ""
        assert constraint.mask() is None
        assert follow(kind, constraint, f"\n\n<{DSML}") == ""
        assert constraint.mask() is not None
        text = f"{prose}\n\n<{DSML}{Walk(kind, 0, free=5)(constraint)}"
        message = parse_chat(text, "thinking" if thinking else "chat")
        assert message["reasoning_content"] + message["content"] == prose.replace(END_THINK, "")
        assert message["tool_calls"]
        assert not any(call.get("incomplete") for call in message["tool_calls"])


def test_the_answer_is_held_after_the_thinking(kind: str) -> None:
    asked = {"thinking": True, "schema": JSON_OBJECT, "tools": [EMPTY]}
    constraint = start(kind, **asked)
    assert follow(kind, constraint, 'Hm "{" </think') == ""
    assert constraint.mask() is None
    assert follow(kind, constraint, f"{END_THINK}no") == "no"
    call = OPEN + invoke("empty", "") + CLOSE
    assert follow(kind, start(kind, **asked), f"Hm{END_THINK}{call}") == ""
    assert follow(kind, start(kind, **asked), f'Hm{END_THINK}{{"a": 1}}') == ""
    asked["tool_choice"] = "required"
    assert follow(kind, start(kind, **asked), f"Hm{END_THINK}{{") == "{"


def test_a_budget_closes_the_thinking(kind: str) -> None:
    for budget in (0, 2):
        constraint = start(kind, thinking=True, budget=budget, schema=JSON_OBJECT)
        for token in TOKENIZERS[kind].encode("ab")[:budget]:
            assert constraint.mask() is None
            constraint.push(token)
        for token in TOKENIZERS[kind].encode(END_THINK):
            assert ids(constraint.mask()) == [token]
            constraint.push(token)
        assert follow(kind, constraint, "{}") == ""

    early = start(kind, thinking=True, budget=40)
    assert follow(kind, early, f"a{END_THINK}" + "b" * 50) == ""
    assert early.mask() is None
    assert follow(kind, start(kind), f"<{DSML}tool_calls>") == ""


def test_masks_are_as_wide_as_the_model(kind: str) -> None:
    size = TOKENIZERS[kind].vocab_size
    for constraint in (start(kind, schema=JSON_OBJECT), start(kind, thinking=True, budget=0)):
        mask = constraint.mask()
        assert mask is not None
        assert (mask.shape, mask.dtype) == ((-(-(size + EXTRA) // 32),), np.uint32)
        assert max(ids(mask)) < size
    with pytest.raises(ValueError, match="tokens and the model"):
        Grammars(TOKENIZERS[kind], size - 1, [0])


def test_requests_of_the_same_schemas_share_a_grammar() -> None:
    compiled = GRAMMARS["marks"].compile(tools=[STRICT])
    assert GRAMMARS["marks"].compile(tools=[json.loads(json.dumps(STRICT))]) is compiled
    assert GRAMMARS["marks"].compile(tools=[STRICT], tool_choice="required") is not compiled
    one, other = start("marks", tools=[STRICT]), start("marks", tools=[STRICT])
    assert follow("marks", one, f"<{DSML}") == ""
    assert other.mask() is None


def nested(levels: int) -> dict[str, Any]:
    """A schema of lists of lists."""
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def strict(schema: Any) -> dict[str, Any]:
    return {"tools": [{"name": "f", "parameters": {"properties": {"x": schema}}, "strict": True}]}


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"schema": {"type": "strin"}}, "answer's schema cannot be followed: Invalid type"),
        ({"schema": {"a": "x" * 2**17}}, "bytes; 131072 are supported"),
        ({"schema": nested(70)}, "The answer's schema is deeper than 64 levels"),
        ({"schema": nested(9999)}, "deeper than 64 levels"),
        ({"tools": [{"name": "f", "parameters": [1]}]}, "tool 'f' must be a JSON Schema"),
        (strict({"not": {}}), "tool 'f' cannot be followed"),
        (strict({"type": "string", "format": "duration"}), "Tool 'f' has the format 'duration'"),
        (strict({"type": "string", "pattern": "a(^b|c$)"}), "Start in regex"),
        (strict({"$ref": "#/properties/x"}), "a .ref that leads to itself"),
        (strict(False), "no value satisfies"),
        ({"tools": [{**STRICT, "parameters": {"anyOf": [{}]}}]}, "'get_weather' is strict and has"),
        ({"tools": [{**STRICT, "parameters": {"required": ["x"]}}]}, "requires x"),
        ({"tools": [{"name": "f", "parameters": {"properties": [1]}}]}, "not an object"),
        ({"tools": [{"name": 'a"'}]}, "in the name"),
        ({"tools": [EMPTY], "tool_choice": {"name": "g"}}, "no such tool"),
        ({"tool_choice": "required"}, "no such tool"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(asked: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        GRAMMARS["marks"].compile(**asked)


def test_an_end_without_a_token_is_an_error() -> None:
    constraint = start("marks", schema={"const": END_THINK})
    with pytest.raises(RuntimeError, match="No token can follow"):
        follow("marks", constraint, f'"{END_THINK[:-1]}"')
