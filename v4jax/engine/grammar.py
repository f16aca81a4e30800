"""Constraints that hold an answer to JSON or to calls of tools, compiled by llguidance."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from jaxtyping import UInt32

from v4jax.engine.dsml_grammar import (
    ANSWER_FILTER,
    BLOCK_FILTER,
    OPENING,
    TRIGGER,
    block_grammar,
    json_grammar,
)
from v4jax.text.chat import DSML, END_THINK, SPECIAL_TOKENS, THINK
from v4jax.text.tokenizer import Tokenizer

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_SCHEMA_BYTES = 128 * 1024
MAX_SCHEMA_DEPTH = 64
CACHED_GRAMMARS = 64
_TOOL_KEYS = ("name", "parameters", "strict")

# Sets of tokens whose masks are computed once. They leave out "<", with which marks begin.
_SLICES = [rf'[^"\\<\x00-\x1F\x7F]{count}' for count in ("{1,10}", "{1,30}", "+")] + ["[^<]+"]


class Grammars:
    """Compiles what the answers of a model may be; threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        """Read the vocabulary; this takes seconds if it is large.

        Args:
          tokenizer: of the checkpoint.
          vocab_size: number of the model's logits; ids that have no token are never allowed.
          eos_ids: ids that end an answer, at least one.

        Raises:
          ValueError: the tokenizer has more tokens than the model, or `eos_ids` are not in it.
        """
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}; use "
                "the tokenizer.json of the model's checkpoint."
            )
        # The marks that an answer may have are text, whether or not each is a token.
        special = [name for name in SPECIAL_TOKENS if name not in (DSML, THINK, END_THINK)]
        ids = [i for name in special if (i := tokenizer.token_id(name)) is not None]
        self._tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self._end_think = tokenizer.encode(END_THINK)
        vocabulary = _Vocabulary(self._tokens, eos_ids[0], [*ids, *eos_ids], tokenizer.encode)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), eos_token=list(eos_ids), slices=_SLICES
        )
        self._cached = functools.lru_cache(CACHED_GRAMMARS)(self._compile)

    def compile(
        self,
        *,
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> "Grammar":
        """Compile what an answer may be; it may take a second: call it off the event loop.

        The last `CACHED_GRAMMARS` are kept and shared by the requests that ask for the same.

        Args:
          schema: JSON Schema of the answer's text, such as `JSON_OBJECT`; None for any text.
          tools: functions as {"name", "parameters", "strict"}.
          tool_choice: "none"; "auto", for calls if the model begins one; "required", for calls and
            no text; or {"name"}, for one call of that function and no text.

        Raises:
          ValueError: a schema is too large or not supported, a tool cannot be written in DSML, or
            there is no tool to choose.
        """
        if tool_choice == "none":
            tools = ()
        elif isinstance(tool_choice, Mapping):
            tools = [tool for tool in tools if tool["name"] == tool_choice["name"]]
        if not tools and tool_choice not in ("none", "auto"):
            raise ValueError(f"tool_choice is {tool_choice!r}; there is no such tool.")
        asked = {
            "schema": schema,
            "tools": [{key: tool.get(key) for key in _TOOL_KEYS} for tool in tools],
            "must_call": tool_choice not in ("none", "auto"),
            "once": isinstance(tool_choice, Mapping),
        }
        try:
            return self._cached(json.dumps(asked))
        except RecursionError:
            raise ValueError(f"A schema is deeper than {MAX_SCHEMA_DEPTH} levels.") from None

    def _compile(self, asked: str) -> "Grammar":
        """Compile for the JSON text of what `compile` was asked."""
        schema, tools, must_call, once = json.loads(asked).values()
        answer = block = None
        if tools:
            for tool in tools:
                _check_tool(tool)
            block = self._matcher(block_grammar(tools, once=once), BLOCK_FILTER)
        texts = [json.dumps(OPENING)] if tools else []
        if schema is not None and not must_call:
            _check_schema(schema, "The answer's schema")
            texts.append(json_grammar(schema))
        if must_call or schema is not None:
            answer = self._matcher(f"start: {' | '.join(texts)}", ANSWER_FILTER)
        return Grammar(self._tokens, self._end_think, answer, block)

    def _matcher(self, *grammars: str) -> "_Matcher":
        # Forced text would be split into tokens up to a branch; the model's may reach beyond it.
        head = '%llguidance {"no_forcing": true}\n'
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matchers = [
            llguidance.LLMatcher(self._tokenizer, head + grammar, log_level=0, limits=limits)
            for grammar in grammars
        ]
        for matcher in matchers:
            _refuse("The schemas", matcher.get_error())
        return _Matcher(self._tokenizer, matchers)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer may be, compiled.

    Attributes:
      tokens: the bytes of each token.
      end_think: the tokens that close the thinking.
      answer: what the text after the thinking may be; None for any text.
      block: what tool calls may be; None if there are no tools.
    """

    tokens: Sequence[bytes]
    end_think: Sequence[int]
    answer: "_Matcher | None"
    block: "_Matcher | None"

    def constraint(self, *, thinking: bool, budget: int | None = None) -> "_Matcher | _Switch":
        """A new constraint of one answer.

        Its masks raise RuntimeError if schemas contradict themselves or are too complex to follow.

        Args:
          thinking: whether the answer begins with thinking, which may be any text, but for calls.
          budget: most tokens of thinking; then it has to be closed. None for no limit.
        """
        constraint = self.answer and self.answer.copy()
        if thinking:
            before = None if budget is None else _Budget(budget, self.end_think, len(self.tokens))
            constraint = _Switch(self.tokens, END_THINK, before, constraint)
        if self.block or not constraint:
            block = self.block and self.block.copy()
            constraint = _Switch(self.tokens, TRIGGER, constraint, block)
        return constraint


class _Matcher:
    """The place of a text in grammars that all hold for it."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, matchers: Sequence[llguidance.LLMatcher]):
        self._tokenizer, self._matchers = tokenizer, matchers

    def copy(self) -> "_Matcher":
        """One for another text, from the same place; cheap."""
        return _Matcher(self._tokenizer, [matcher.deep_copy() for matcher in self._matchers])

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """Tokens that every grammar allows.

        Raises:
          RuntimeError: there are none, or llguidance ran into one of its limits.
        """
        words = -(-self._tokenizer.vocab_size // 32)  # llguidance's masks may be a word longer
        masks = [np.frombuffer(m.compute_bitmask(), np.uint32)[:words] for m in self._matchers]
        allowed = np.bitwise_and.reduce(masks)
        self._check()
        if not allowed.any():
            raise RuntimeError("No token can follow under the request's schema.")
        return allowed

    def push(self, token: int) -> None:
        for matcher in self._matchers:
            matcher.consume_token(token)
        self._check()

    def push_text(self, text: bytes) -> None:
        """Advance by a text, unless the grammars do not allow it."""
        tokens = self._tokenizer.tokenize_bytes(text)
        if all(matcher.validate_tokens(tokens) == len(tokens) for matcher in self._matchers):
            for token in tokens:
                self.push(token)

    def _check(self) -> None:
        for matcher in self._matchers:
            if matcher.is_error():
                error = matcher.get_error().partition("\n")[0]
                raise RuntimeError(f"The request's schema cannot be followed: {error}.")


class _Switch:
    """A constraint in force until a text is written, and the one that follows."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        text: str,
        before: "_Matcher | _Switch | _Budget | None",
        after: _Matcher | None,
    ):
        self._tokens, self._text = tokens, text.encode()
        self._before, self._after = before, after
        self._is_after, self._tail = False, b""

    def mask(self) -> UInt32[np.ndarray, " words"] | None:
        current = self._after if self._is_after else self._before
        return current.mask() if current else None

    def push(self, token: int) -> None:
        current = self._after if self._is_after else self._before
        if current:
            current.push(token)
        if self._is_after:
            return
        self._tail += self._tokens[token]
        before, text, rest = self._tail.partition(self._text)
        self._tail = before[-len(self._text) :]
        if text:
            self._is_after = True
            if self._after:
                self._after.push_text(rest)


class _Budget:
    """Any text for some tokens, and then only a given one."""

    def __init__(self, budget: int, end: Sequence[int], vocab_size: int):
        self._left, self._end, self._vocab_size = budget, [*end], vocab_size

    def mask(self) -> UInt32[np.ndarray, " words"] | None:
        if self._left > 0:
            return None
        allowed = np.zeros(-(-self._vocab_size // 32), np.uint32)
        allowed[self._end[0] // 32] = 1 << self._end[0] % 32
        return allowed

    def push(self, token: int) -> None:
        if self._left > 0:
            self._left -= 1
        else:
            self._end.pop(0)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    tokens: list[bytes]
    eos_token_id: int
    special_token_ids: list[int]
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


def _check_tool(tool: Mapping[str, Any]) -> None:
    """Refuse a tool whose parameters are too large, or not supported by llguidance."""
    where = f"The parameters of tool {tool['name']!r}"
    parameters = tool["parameters"] or {}
    _check_schema(parameters, where, strict=bool(tool["strict"]))
    if not isinstance(parameters.get("properties", {}), dict):
        raise ValueError(f"{where} are invalid: properties is not an object.")


def _check_schema(schema: Any, where: str, *, strict: bool = True) -> None:
    """Refuse a schema that is too large or, if it is to be followed, not supported."""
    if not isinstance(schema, dict):
        raise ValueError(f"{where} must be a JSON Schema, an object.")
    if len(text := json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"{where} has {len(text)} bytes; {MAX_SCHEMA_BYTES} are supported.")
    if _deeper(schema, MAX_SCHEMA_DEPTH):
        raise ValueError(f"{where} is deeper than {MAX_SCHEMA_DEPTH} levels; make it flatter.")
    if strict:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        _refuse(where, llguidance.LLMatcher.validate_grammar(grammar))


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than some levels."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(item, levels - 1) for item in inner)


def _refuse(where: str, error: str) -> None:
    """Raise llguidance's error, if there is one."""
    if error:
        raise ValueError(f"{where} cannot be followed: {' '.join(error.split())}")
