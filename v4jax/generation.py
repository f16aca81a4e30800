"""What a model generates: texts, answers of a chat, scores."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from v4jax.engine.request import Event, Token
from v4jax.text.stopping import StopStrings
from v4jax.text.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock times.

    Attributes:
      prefill_seconds: seconds from the call to the first token, including compilation.
      decode_seconds: seconds from the first token to the last.
      tokens_per_second: rate of the tokens after the first; 0 if there are none.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
      text: the new text, without a stop string or special tokens at its end.
      tokens: the new tokens, including an end-of-sequence token.
      logprobs: log-probability of each token under the raw logits.
      top_logprobs: for each token, the requested number of most probable tokens with their
        log-probabilities.
      finish_reason: 'stop' after an end-of-sequence token or a stop string, else 'length'.
      timings: wall-clock times.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    finish_reason: Literal["stop", "length"]
    timings: Timings


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
    """A model's answer in a conversation.

    Attributes:
      content: what it says.
      reasoning: what it thought before; empty without thinking.
      tool_calls: the tools that it calls, in OpenAI's format.
      generation: the text and tokens that these were read from.
    """

    content: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    generation: Generation

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": self.tool_calls} if self.tool_calls else {})


@dataclasses.dataclass(frozen=True)
class Score:
    """How probable a text is.

    Attributes:
      tokens: tokens of the text.
      logprobs: log-probability of each token after the first, given those before it.
    """

    tokens: list[int]
    logprobs: list[float]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability."""
        return math.exp(-sum(self.logprobs) / len(self.logprobs))


class Answer:
    """An answer as it arrives: tokens, and text in whole characters up to a stop string.

    It is the `watcher` of its request.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder, self._stops = tokenizer and StreamDecoder(tokenizer), StopStrings(stop)
        self._pieces: list[str] = []
        self._tokens: list[Token] = []
        self._last: Event | None = None

    def push(self, token: int) -> bool:
        """Read a token; whether a stop string ends the text with it."""
        piece, stopped = self._stops.push(self._decoder.push(token) if self._decoder else "")
        self._pieces.append(piece)
        return stopped

    def add(self, event: Event) -> str:
        """The text that an event of the engine adds."""
        self._last = event
        self._tokens += event.tokens
        if event.finish is not None:
            piece, stopped = self._stops.push(self._decoder.flush() if self._decoder else "")
            self._pieces += [piece, "" if stopped else self._stops.flush()]
        text, self._pieces = "".join(self._pieces), []
        return text

    def generation(self, text: str) -> Generation:
        """All of it, once it has ended with this text."""
        assert self._last is not None, "it has not begun"
        usage, count = self._last.usage, len(self._tokens)
        seconds = usage.seconds - usage.first_token_seconds
        stopped = self._last.finish == "stop" or self._stops.matched is not None
        return Generation(
            text=text,
            tokens=[token.id for token in self._tokens],
            logprobs=[token.logprob for token in self._tokens],
            top_logprobs=[token.top for token in self._tokens],
            finish_reason="stop" if stopped else "length",
            timings=Timings(
                prefill_seconds=usage.first_token_seconds,
                decode_seconds=seconds,
                tokens_per_second=(count - 1) / seconds if count > 1 else 0.0,
            ),
        )
